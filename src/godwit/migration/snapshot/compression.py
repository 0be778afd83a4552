"""zstd for chunks of RAM: the standard library's (Python 3.14), else the package zstandard.

Imported for a compressed snapshot alone. However little is decompressed, the result has the length
of the given buffer, and no window is larger than :data:`_WINDOW_LOG` allows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from godwit.errors import ConfigError, StreamError

#: Returns compressed bytes.
Compress = Callable[[bytes | bytearray | memoryview], bytes]
#: Fills a buffer from compressed bytes, or raises StreamError.
Decompress = Callable[[bytes | bytearray, memoryview], None]

#: A window of 1 MiB: more than a chunk has.
_WINDOW_LOG = 20
#: Of zstd's levels the one that its own tool takes, too.
_LEVEL = 3


def compressor() -> Compress:
    """Return a function for compressing.

    Raises:
        ConfigError: there is no zstd.
    """
    own, other = _modules()
    if own is not None:
        return lambda data: bytes(own.compress(data, level=_LEVEL))
    made = other.ZstdCompressor(level=_LEVEL)
    return lambda data: bytes(made.compress(data))


def decompressor() -> Decompress:
    """Return a function for decompressing.

    Raises:
        ConfigError: there is no zstd.
    """
    own, other = _modules()
    return _by_own(own) if own is not None else _by_other(other)


def _modules() -> tuple[Any, Any]:
    for name in ("compression.zstd", "zstandard"):
        try:
            found = importlib.import_module(name)
        except ImportError:
            continue
        return (None, found) if name == "zstandard" else (found, None)
    raise ConfigError(
        "this Python has no zstd: install the package (pip install zstandard), take Python 3.14, "
        "or save without --compress"
    )


def _by_own(zstd: Any) -> Decompress:
    options = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}

    def decompress(data: bytes | bytearray, target: memoryview) -> None:
        made = zstd.ZstdDecompressor(options=options)
        try:
            found = made.decompress(data, max_length=len(target))
            whole = made.eof or not made.decompress(b"", max_length=1)
        except zstd.ZstdError as error:
            raise StreamError(f"zstd: {error}") from error
        _take(found, whole and not made.unused_data, target)

    return decompress


def _by_other(zstandard: Any) -> Decompress:
    made = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)

    def decompress(data: bytes | bytearray, target: memoryview) -> None:
        try:
            with made.stream_reader(data) as reader:
                found = reader.read(len(target))
                whole = not reader.read(1)
        except (zstandard.ZstdError, MemoryError) as error:
            raise StreamError(f"zstd: {error}") from error
        _take(found, whole, target)

    return decompress


def _take(found: bytes, whole: bool, target: memoryview) -> None:
    if len(found) != len(target) or not whole:
        raise StreamError(f"zstd: more or less than {len(target)} bytes of RAM")
    target[:] = found
