"""The streams that are kept here; README.md says what they are."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Stream:
    """What was recorded, and of which machine."""

    machine: str
    model: str
    kernel: str
    memory: str
    cpus: int = 2

    @property
    def name(self) -> str:
        """Its file's, without the suffix."""
        return f"{self.machine}-{self.model}"

    def path(self, folder: Path = _FOLDER) -> Path:
        """Its file."""
        return folder / f"{self.name}.xz"

    def read(self) -> tuple[bytes, bytes]:
        """The payloads of HELLO and STATE."""
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
        """Keep a new one, as the frames were on the line. What is there is never replaced."""
        frames = messages.message(Kind.HELLO, hello) + messages.message(Kind.STATE, state)
        with self.path(folder).open("xb") as file:
            file.write(lzma.compress(frames, preset=9 | lzma.PRESET_EXTREME))


STREAMS = (
    Stream("godwit-0.1", "virtio-net", "cloud-6.12", "128M"),
    Stream("godwit-0.2", "virtio-net", "cloud-6.12", "128M"),
    Stream("godwit-0.2", "e1000", "full-6.12", "256M"),  # the cloud kernels have no e1000
)
