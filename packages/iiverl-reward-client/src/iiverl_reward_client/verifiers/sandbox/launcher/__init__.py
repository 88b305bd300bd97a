"""The process that builds a sandbox and starts the program in it: standard library alone, run as a script of its own."""
