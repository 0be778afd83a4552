"""The command line, from argv to action: the only place that exits and prints for people."""
