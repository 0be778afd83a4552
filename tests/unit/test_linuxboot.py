"""Loading a bzImage: what ends up where, and what is refused."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.errors import ConfigError
from godwit.hw import boot as linuxboot
from godwit.hw.memory import GuestMemory

M = 1 << 20
SIZE = 64 * M
SETUP = 4 * 512 + 512
PREFERRED, INIT = 16 * M, 8 * M


def _image(
    body: bytes = b"\xcc" * 10_000,
    *,
    init: int = INIT,
    change: Callable[[bytearray], None] | None = None,
) -> bytes:
    image = bytearray(SETUP) + body
    image[0x1F1] = 4
    image[0x200:0x206] = b"\xeb\x6cHdrS"
    struct.pack_into("<H", image, 0x206, 0x020F)
    image[0x211] = 1
    struct.pack_into("<I", image, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<H", image, 0x236, 0x7F)
    struct.pack_into("<I", image, 0x238, 2047)
    struct.pack_into("<Q", image, 0x258, PREFERRED)
    struct.pack_into("<I", image, 0x260, init)
    if change:
        change(image)
    return bytes(image)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(SIZE)
    yield memory
    memory.close()


def _load(
    memory: GuestMemory,
    tmp_path: Path,
    image: bytes,
    initrd: bytes | None = None,
    line: str = "console=ttyS0 quiet",
) -> linuxboot.Boot:
    kernel, disk = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(image)
    if initrd is not None:
        disk.write_bytes(initrd)
    return linuxboot.load(memory, str(kernel), str(disk) if initrd is not None else None, line)


def test_everything_is_where_the_protocol_wants_it(memory: GuestMemory, tmp_path: Path) -> None:
    body = bytes(range(256)) * 40
    image = _image(body)
    initrd = b"initrd" * 1000
    boot = _load(memory, tmp_path, image, initrd)
    assert boot.entry == 0x100200
    assert memory.read(0x100000, len(body)) == body
    zero = memory.read(boot.zero_page, 4096)
    assert zero[0x1F1:0x210] == image[0x1F1:0x210]
    assert zero[0x212:0x218] == image[0x212:0x218]
    assert zero[0x22C:0x268] == image[0x22C:0x268]
    assert (zero[0x210], zero[0x211]) == (0xFF, 1)
    at, size = struct.unpack_from("<II", zero, 0x218)
    assert size == len(initrd)
    assert at % 4096 == 0
    assert at + size <= SIZE
    assert memory.read(at, size) == initrd
    line = struct.unpack_from("<I", zero, 0x228)[0]
    assert memory.read(line, 20) == b"console=ttyS0 quiet\0"
    assert struct.unpack_from("<Q", zero, 0x70)[0] == 0xE0000


def test_the_memory_map(memory: GuestMemory, tmp_path: Path) -> None:
    boot = _load(memory, tmp_path, _image())
    zero = memory.read(boot.zero_page, 4096)
    entries = [struct.unpack_from("<QQI", zero, 0x2D0 + 20 * i) for i in range(zero[0x1E8])]
    assert [(start, start + size, kind) for start, size, kind in entries] == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x100000, 2),
        (0x100000, SIZE, 1),
    ]


def test_the_memory_map_over_four_gib(tmp_path: Path) -> None:
    memory = GuestMemory(4 << 30)
    try:
        boot = _load(memory, tmp_path, _image(), b"initrd")
        zero = memory.read(boot.zero_page, 4096)
        assert zero[0x1E8] == 4
        assert struct.unpack_from("<QQI", zero, 0x2D0 + 60) == (4 << 30, 1 << 30, 1)
        assert struct.unpack_from("<I", zero, 0x218)[0] < 0x7FFF_FFFF  # initrd_addr_max
    finally:
        memory.close()


def test_the_page_tables_map_four_gib_one_to_one(memory: GuestMemory, tmp_path: Path) -> None:
    _load(memory, tmp_path, _image())
    for address in (0, 0x100200, 0x7000, 0xFEE0_0000, 0xFFFF_FFFF):
        table = 0x9000
        for shift in (39, 30):
            entry = struct.unpack("<Q", memory.read(table + 8 * (address >> shift & 511), 8))[0]
            assert entry & 3 == 3
            table = entry & ~0xFFF
        entry = struct.unpack("<Q", memory.read(table + 8 * (address >> 21 & 511), 8))[0]
        assert entry & 0x83 == 0x83
        assert entry & ~0x1FFFFF == address & ~0x1FFFFF


def _no_magic(image: bytearray) -> None:
    image[0x202:0x206] = b"hdrS"


def _old(image: bytearray) -> None:
    struct.pack_into("<H", image, 0x206, 0x020B)


def _not_64(image: bytearray) -> None:
    struct.pack_into("<H", image, 0x236, 0)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", "not a bzImage"),
        (b"\x7fELF" + bytes(2000), "not a bzImage"),
        (_image()[:0x26F], "not a bzImage"),
        (_image(change=_no_magic), "not a bzImage"),
        (_image(change=_old), r"2\.11.*64-bit"),
        (_image(change=_not_64), "64-bit"),
        (_image()[:0x270], "cut off"),
        (_image()[:SETUP], "cut off"),
        (_image(init=SIZE - PREFERRED + 1), "more than 64 MiB.*--memory"),
        (_image(bytes(SIZE - M + 1)), "more than 64 MiB.*--memory"),
    ],
    ids=["empty", "ELF", "short", "magic", "old", "32-bit", "cut", "no body", "init", "body"],
)
def test_kernels_that_are_refused(
    memory: GuestMemory, tmp_path: Path, image: bytes, says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        _load(memory, tmp_path, image)
    assert "vmlinuz" in str(caught.value)


def test_setup_sectors_of_0_mean_4(memory: GuestMemory, tmp_path: Path) -> None:
    def zero(image: bytearray) -> None:
        image[0x1F1] = 0

    _load(memory, tmp_path, _image(b"body", change=zero))
    assert memory.read(0x100000, 4) == b"body"


def test_an_initrd_must_not_meet_the_unpacked_kernel(memory: GuestMemory, tmp_path: Path) -> None:
    space = SIZE - PREFERRED - INIT
    boot = _load(memory, tmp_path, _image(), bytes(space))
    assert struct.unpack_from("<I", memory.read(boot.zero_page, 4096), 0x218)[0] == PREFERRED + INIT
    with pytest.raises(ConfigError, match=r"initrd.*does not fit.*--memory"):
        _load(memory, tmp_path, _image(), bytes(space + 1))


def test_the_initrd_stays_below_the_kernels_limit(memory: GuestMemory, tmp_path: Path) -> None:
    def limit(image: bytearray) -> None:
        struct.pack_into("<I", image, 0x22C, 32 * M - 1)

    boot = _load(memory, tmp_path, _image(change=limit), bytes(M))
    assert struct.unpack_from("<I", memory.read(boot.zero_page, 4096), 0x218)[0] == 31 * M


def test_a_command_line_too_long(memory: GuestMemory, tmp_path: Path) -> None:
    _load(memory, tmp_path, _image(), line="x" * 2047)
    with pytest.raises(ConfigError, match=r"2048 bytes.*2047"):
        _load(memory, tmp_path, _image(), line="x" * 2048)


def test_files_that_cannot_be_read(memory: GuestMemory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kernel .*absent: No such file"):
        linuxboot.load(memory, str(tmp_path / "absent"), None, "")
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(_image())
    with pytest.raises(ConfigError, match=r"initrd .*: Is a directory"):
        linuxboot.load(memory, str(kernel), str(tmp_path), "")


def test_a_long_setup_header_does_not_break_the_zero_page(
    memory: GuestMemory, tmp_path: Path
) -> None:
    def long(image: bytearray) -> None:
        image[0x201] = 0xFF

    boot = _load(memory, tmp_path, _image(b"b", change=long))
    zero = memory.read(boot.zero_page, 4096)
    assert zero[0x1E8] == 3
    assert struct.unpack_from("<QQI", zero, 0x2D0) == (0, 0x9FC00, 1)
