"""Taps, and the host's network around them: links, packet sockets, filters."""
