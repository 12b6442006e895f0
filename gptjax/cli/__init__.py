"""The command line: its flags, modes, help texts and exit codes."""
