"""The command line of iiverl."""
