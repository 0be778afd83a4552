"""Migration of a running guest: stream, RAM, source, destination, report. See docs/design.md."""
