"""The sandbox of a process that a guest may take over: system calls, files, privileges."""
