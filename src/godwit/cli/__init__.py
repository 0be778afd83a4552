"""The command line: argv to action; the only place that exits and prints for people."""
