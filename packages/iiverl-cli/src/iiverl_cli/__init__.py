"""The command line of iiverl: it reads arguments, loads the configuration and calls the core; nothing else."""
