"""Godwit and QEMU side by side: ``make bench``. See docs/performance.md."""
