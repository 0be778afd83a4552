"""Memory in pieces, against the kernel's own reads and writes."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.host import iovec
from godwit.host.iovec import Vector

_sizes = st.lists(st.integers(0, 40), max_size=12)


@given(sizes=_sizes, count=st.integers(0, 500))
@settings(deadline=None)
def test_a_part_of_a_vector_is_the_bytes_behind(sizes: list[int], count: int) -> None:
    parts = [bytearray(os.urandom(size)) for size in sizes]
    whole = b"".join(parts)
    vector = Vector.of(parts)
    assert (vector.size, vector.read()) == (len(whole), whole)
    count = min(count, len(whole))
    rest = vector.after(count)
    assert (rest.size, rest.read()) == (len(whole) - count, whole[count:])


@given(sizes=_sizes, pieces=st.integers(1, 13))
@settings(deadline=None)
def test_the_parts_of_a_vector_are_the_vector(sizes: list[int], pieces: int) -> None:
    buffers = [bytearray(os.urandom(size)) for size in sizes]
    vector = Vector.of(buffers)
    parts = list(vector.parts(pieces))
    assert b"".join(part.read() for part in parts) == vector.read()
    assert [part.size for part in parts] == [len(part.read()) for part in parts]
    assert all(0 < part.pieces <= pieces for part in parts)
    assert sum(part.pieces for part in parts) == vector.pieces


@given(sizes=_sizes, data=st.binary(max_size=200))
@settings(deadline=None)
def test_a_vector_takes_what_it_has_room_for(sizes: list[int], data: bytes) -> None:
    parts = [bytearray(size) for size in sizes]
    assert Vector.of(parts).fill(bytearray(data)) == min(len(data), sum(sizes))
    assert b"".join(parts) == data[: sum(sizes)].ljust(sum(sizes), b"\0")


@given(sizes=_sizes, room=st.integers(0, 500))
@settings(deadline=None)
def test_a_buffer_takes_what_it_has_room_for(sizes: list[int], room: int) -> None:
    parts = [bytearray(os.urandom(size)) for size in sizes]
    buffer = bytearray(room)
    Vector.of(parts).copy_to(buffer)
    assert buffer == b"".join(parts)[:room].ljust(room, b"\0")


@given(sizes=_sizes, at=st.integers(0, 1000))
@settings(deadline=None)
def test_the_kernel_reads_and_writes_all_pieces(sizes: list[int], at: int) -> None:
    there = [bytearray(os.urandom(size)) for size in sizes]
    back = [bytearray(size) for size in reversed(sizes)]
    with tempfile.TemporaryFile() as file:
        assert iovec.write(file.fileno(), Vector.of(there), at) == sum(sizes)
        assert iovec.read(file.fileno(), Vector.of(back), at) == sum(sizes)
        assert os.pread(file.fileno(), 1000, at) == b"".join(there) == b"".join(back)


def test_errors_are_the_kernels() -> None:
    with tempfile.TemporaryFile() as file:
        readonly = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
        with pytest.raises(OSError, match="Bad file descriptor"):
            iovec.write(readonly, Vector.of([bytearray(8)]), 0)
        os.close(readonly)
        assert iovec.write(file.fileno(), Vector.of([bytearray(8)]), 0) == 8
        with pytest.raises(OSError, match="Bad address"):
            iovec.read(file.fileno(), Vector(iovec.ENTRY.pack(1 << 46, 8), 8), 0)
