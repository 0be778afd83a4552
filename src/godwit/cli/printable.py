"""Text of a peer, a VM or a guest for the terminal, where no text may move the cursor."""

from __future__ import annotations


def printable(text: object) -> str:
    """Return ``text`` as one line, with a question mark for each control character."""
    return "".join(char if char.isprintable() else "?" for char in str(text))
