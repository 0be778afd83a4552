"""The lab's images: cpio, modules, kernels in the cache, addresses."""

import lzma
import os
import re
import stat
from pathlib import Path

import pytest

from lab import initramfs, kernels
from lab.addresses import LANS
from lab.errors import LabError


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """name -> (mode, data), read by the newc rules."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        assert archive[at + 110 + name_size - 1] == 0
        data_at = (at + 110 + name_size + 3) & ~3
        at = (data_at + size + 3) & ~3
        if name == "TRAILER!!!":
            assert at == len(archive)
            return found
        found[name] = (mode, archive[data_at : data_at + size])


def test_archive_is_newc() -> None:
    archive = initramfs.Archive()
    archive.directory("dev")
    archive.console()
    archive.file("init", b"12345", 0o755)
    archive.link("sh", "init")
    found = entries(archive.finish())
    assert found["dev"] == (stat.S_IFDIR | 0o755, b"")
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"")
    assert found["init"] == (stat.S_IFREG | 0o755, b"12345")
    assert found["sh"] == (stat.S_IFLNK | 0o777, b"init")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GODWIT_CACHE", str(tmp_path))
    return tmp_path


def fake_kernel(cache: Path) -> kernels.Kernel:
    root = cache / "kernels/cloud-6.1"
    modules = root / "lib/modules/6.1.0-9"
    modules.mkdir(parents=True)
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-6.1.0-9").write_bytes(bytes(0x1000))
    (modules / "modules.dep").write_text(
        "kernel/a/kvm-amd.ko.xz: kernel/a/kvm.ko.xz kernel/a/irqbypass.ko.xz\n"
        "kernel/a/kvm.ko.xz: kernel/a/irqbypass.ko.xz\nkernel/a/irqbypass.ko.xz:\n"
    )
    kernel = kernels.cached("cloud-6.1")
    assert kernel is not None
    return kernel


def test_an_unpacked_kernel_needs_no_apt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.cached("cloud-6.1") is None
    kernel = fake_kernel(cache)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert kernels.get("cloud-6.1") == kernel
    assert kernel.release == "6.1.0-9"


def test_an_unknown_kernel_is_named_with_those_known(cache: Path) -> None:
    with pytest.raises(LabError, match=r"'7\.0'.*cloud-6\.1, cloud-6\.12, full-6\.12"):
        kernels.get("7.0")


def test_an_image_of_unknown_packing_is_used_as_it_is(cache: Path) -> None:
    kernel = fake_kernel(cache)
    assert kernels.uncompressed(kernel) == kernel.vmlinuz


def test_modules_come_in_load_order_and_missing_ones_are_empty(cache: Path) -> None:
    orders = initramfs.load_orders(fake_kernel(cache), ["kvm_amd", "virtio_pci"])
    names = [initramfs.unpacked_name(path) for path in orders["kvm_amd"]]
    assert names == ["irqbypass.ko", "kvm.ko", "kvm-amd.ko"]
    assert orders["virtio_pci"] == []


def test_a_module_is_unpacked_and_its_signature_cut_on_request(tmp_path: Path) -> None:
    signature = bytes(8) + (5).to_bytes(4, "big") + b"~Module signature appended~\n"
    path = tmp_path / "x.ko.xz"
    path.write_bytes(lzma.compress(b"\x7fELF" + b"sig__" + signature))
    assert initramfs.unpacked(path).endswith(signature)
    assert initramfs.unpacked(path, signed=False) == b"\x7fELF"


def test_a_file_is_built_once_and_never_half(cache: Path) -> None:
    def fail(target: Path) -> None:
        target.write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        initramfs.cached_file("bin/x", fail)
    assert os.listdir(cache / "bin") == []
    built = initramfs.cached_file("bin/x", lambda target: void(target.write_bytes(b"whole")))
    assert built.read_bytes() == b"whole"
    assert initramfs.cached_file("bin/x", fail) == built


def void(_: object) -> None:
    return None


def test_the_guest_uses_the_same_addresses_as_python() -> None:
    source = (initramfs.DATA / "guest_files/net.c").read_text()
    rows = re.findall(r'\{ (\d+), "([^"]+)", "([^"]+)" \}', source)
    assert [(int(vlan), v4, v6) for vlan, v4, v6 in rows] == [
        (lan.vlan, *lan.guest) for lan in LANS
    ]
