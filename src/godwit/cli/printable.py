"""Words of others on the terminal: a peer's, a VM's or a guest's text moves no cursor."""

from __future__ import annotations


def printable(text: object) -> str:
    """Return ``text`` as one line, a question mark for each control character in it."""
    return "".join(char if char.isprintable() else "?" for char in str(text))
