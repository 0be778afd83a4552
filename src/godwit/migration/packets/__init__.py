"""Packets that follow a guest to its new host."""
