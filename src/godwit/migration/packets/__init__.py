"""Packet handover: packets that follow a guest to its new host."""
