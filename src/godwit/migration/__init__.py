"""Moving a running guest: codec, RAM, source, destination, report. See docs/design.md."""
