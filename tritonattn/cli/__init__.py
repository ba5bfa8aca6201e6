"""The command line: `tritonattn <command>`."""
