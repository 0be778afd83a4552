"""Measurements of Godwit and QEMU side by side (``make bench``, docs/performance.md)."""
