"""A fuzzing target: a function of bytes that raises on a finding, and the form of its input."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

#: Changes an input in its own way.
Mutator = Callable[[random.Random, bytes], bytes]
#: The longest input, bytes.
LONGEST = 16 << 10
CORPUS = Path(__file__).parent / "corpus"


class Finding(AssertionError):
    """A rule that the program under test broke."""


class Target(NamedTuple):
    """One subject of the fuzzing.

    ``run`` raises on a finding, whatever it raises.
    """

    name: str
    run: Callable[[bytes], None]
    #: Parts of the paths of the modules whose coverage guides; none: nothing guides.
    subjects: tuple[str, ...] = ()
    #: Draws inputs with the form that the target reads.
    strategy: st.SearchStrategy[bytes] | None = None
    #: Words that the input is made of.
    tokens: Sequence[bytes] = ()
    #: The bytes of a record, if inputs are lists of records behind a head.
    record: int = 0
    #: The bytes before the first record.
    head: int = 0
    mutators: Sequence[Mutator] = ()
    #: The longest that one input may take, seconds.
    limit: float = 5.0
    #: The inputs of a quick run that are not of the corpus.
    quick: int = 60

    @property
    def corpus(self) -> list[Path]:
        """The files of the corpus, in order."""
        return sorted((CORPUS / self.name).glob("*"))


def require(truth: object, what: str) -> None:
    """Raise a finding unless ``truth``."""
    if not truth:
        raise Finding(what)


@contextmanager
def allowed(*errors: type[Exception]) -> Iterator[None]:
    """Let these errors pass, which the contract of the code in the block names."""
    try:
        yield
    except errors:
        pass


class Choices:
    """Decisions read from an input's bytes; all are the first once the input is over."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, length: int) -> bytes:
        """Return the next bytes, at most ``length``."""
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken

    def number(self, length: int = 1) -> int:
        """Return a little-endian number of ``length`` bytes."""
        return int.from_bytes(self.take(length), "little")

    def pick(self, choices: Sequence[object]) -> object:
        """Return one of the choices."""
        return choices[self.number() % len(choices)]

    def piece(self, most: int = 4096) -> bytes:
        """Return bytes that have their length before them."""
        return self.take(self.number(2) % (most + 1))

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))


def piece(data: bytes) -> bytes:
    """Return ``data`` as :meth:`Choices.piece` reads it."""
    return struct.pack("<H", len(data)) + data
