"""Fakes that stand for a kernel, a tap or a driver in tests."""
