"""Taps, and the host's network around taps: links, packet sockets, filters."""
