"""The lab's networks: what is read from other projects' programs, and the guest's programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.utils import wrpcap

from lab import guest, initramfs, kernels
from lab.networks import arpwatch, memtest, programs
from lab.networks.claims import claims

_MAC, _OTHER = "52:54:00:67:77:01", "02:00:00:00:00:02"
_REPORT = """
From: arpwatch (Arpwatch lab)
To: root
Subject: {subject} (10.9.9.2) net0

            hostname: <unknown>
          ip address: 10.9.9.2
           interface: net0
    ethernet address: 2:0:0:0:0:a1
old ethernet address: 02:00:00:00:00:01
"""


def test_arpwatch_reports_changes_and_new_stations() -> None:
    text = "".join(
        _REPORT.format(subject=subject)
        for subject in ("new station", "changed ethernet address", "flip flop")
    )
    assert arpwatch.changes(text) == [
        "10.9.9.2 changed ethernet address 02:00:00:00:00:a1",
        "10.9.9.2 flip flop 02:00:00:00:00:a1",
    ]


def test_the_newest_that_memtest_showed() -> None:
    first = (
        "Time:  0:00:02  Status: Testing  /  \x1b[9;1HUsing: Core #0 | Pass:  0        Errors: 0 "
    )
    text = f"#0  [Address test, own address]{first}"
    assert memtest.screen("Time:  0:00:02") is None
    assert memtest.screen(text) == memtest.Screen(test=0, passes=0, errors=0, time_s=2)
    text += "#10 [Bit fade test]Time:  1:02:03  S\x1b[9;1HUs| Pass:  2        Errors: 17 "
    assert memtest.screen(text) == memtest.Screen(test=10, passes=2, errors=17, time_s=3723)


def test_who_claims_what(tmp_path: Path) -> None:
    frames = [
        Ether(src=_MAC) / ARP(op=1, hwsrc=_MAC, psrc="0.0.0.0", pdst="10.0.0.50"),
        Ether(src=_MAC) / ARP(op=1, hwsrc=_MAC, psrc="10.0.0.2", pdst="10.0.0.50"),
        Ether(src=_OTHER) / ARP(op=2, hwsrc=_OTHER, psrc="10.0.0.50", pdst="10.0.0.1"),
        Ether(src=_MAC, type=0x8035) / bytes(ARP(op=3, hwsrc=_MAC, hwdst=_MAC)),
        Ether(src=_MAC) / IPv6(src="::", dst="ff02::1:ff00:50") / ICMPv6ND_NS(tgt="fd00::50"),
        Ether(src=_MAC) / IPv6(src="fd00::2", dst="ff02::1") / ICMPv6ND_NS(tgt="fd00::50"),
        Ether(src=_MAC) / IPv6(src="fd00::2", dst="ff02::1") / ICMPv6ND_NA(tgt="fd00::2", R=1),
    ]
    path = tmp_path / "x.pcap"
    wrpcap(str(path), frames)
    assert [(one.kind, one.address, one.router) for one in claims(path, mac=_MAC)] == [
        ("ARP", "10.0.0.2", False),
        ("RARP", _MAC, False),
        ("NS", "fd00::2", False),
        ("NA", "fd00::2", True),
    ]
    assert [one.mac for one in claims(path, "10.0.0.50")] == [_OTHER]


def test_a_program_comes_with_its_libraries_behind_the_guests_own_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GODWIT_CACHE", str(tmp_path))
    own = tmp_path / "own.cpio"
    own.write_bytes(b"own!")
    monkeypatch.setattr(guest, "build", lambda kernel: own)
    monkeypatch.setitem(programs.IMAGES, "some", ("env",))
    kernel = kernels.Kernel("x", "6", tmp_path, tmp_path)
    built = programs.build(kernel, "some")
    data = built.read_bytes()
    assert data.startswith(b"own!" + b"070701")
    for name in (b"/env\0", b"/libc.so.6\0", b"ld-linux", b"var/run\0"):
        assert name in data
    assert data.index(b"usr/bin\0") < data.index(b"/env\0")
    assert programs.build(kernel, "some") == built
    assert initramfs.cached_file(f"images/{built.name}", lambda path: None) == built
