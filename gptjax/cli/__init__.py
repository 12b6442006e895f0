"""The command line: flags, modes, exit codes."""
