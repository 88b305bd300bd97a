"""The process that builds a sandbox and starts the program in it, run as a script with only the standard library."""
