"""The QEMU Machine Protocol: server, stream and commands (docs/design.md)."""
