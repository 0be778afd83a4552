"""The recorded streams of this folder (README.md describes each)."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Stream:
    """A recorded stream, with the kind of machine behind the stream."""

    machine: str
    model: str
    kernel: str
    memory: str
    cpus: int = 2

    @property
    def name(self) -> str:
        """The name of the stream's file, without the suffix."""
        return f"{self.machine}-{self.model}"

    def path(self, folder: Path = _FOLDER) -> Path:
        """Return the path of the stream's file."""
        return folder / f"{self.name}.xz"

    def read(self) -> tuple[bytes, bytes]:
        """Return the payloads of HELLO and STATE."""
        data = lzma.decompress(self.path().read_bytes())
        payloads = []
        for due in (Kind.HELLO, Kind.STATE):
            kind, length = messages.parse_header(data[: messages.HEADER.size])
            assert kind is due
            data = data[messages.HEADER.size :]
            payloads.append(data[:length])
            data = data[length:]
        assert not data
        return payloads[0], payloads[1]

    def write(self, folder: Path, hello: bytes, state: bytes) -> None:
        """Keep a new stream, with the messages as on the connection.

        Raises:
            FileExistsError: the stream is kept already, and is never replaced.
        """
        data = messages.message(Kind.HELLO, hello) + messages.message(Kind.STATE, state)
        with self.path(folder).open("xb") as file:
            file.write(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


STREAMS = (
    Stream("godwit-0.1", "virtio-net", "cloud-6.12", "128M"),
    Stream("godwit-0.2", "virtio-net", "cloud-6.12", "128M"),
    Stream("godwit-0.2", "e1000", "full-6.12", "256M"),  # the cloud kernels have no e1000
    Stream("godwit-0.3", "virtio-net", "cloud-6.12", "128M"),
    Stream("godwit-0.3", "e1000", "full-6.12", "256M"),
)
