"""What the lab's load programs print, and QEMU's command line."""

from __future__ import annotations

from lab import load, qemu


def test_rates_are_bytes_by_the_time_each_direction_took() -> None:
    assert load.rates("out 3000000 1500000\nin 500 1000000\n") == {"out": 2e6, "in": 500.0}


def test_a_qemu_that_waits_has_the_kernel_as_well() -> None:
    argv = qemu.arguments(128, 2, "tap0", "52:54:00:00:00:01", ("k", "i", "quiet"), "unix:/s")
    assert argv[-2:] == ["-incoming", "unix:/s"]
    for option, value in (("-kernel", "k"), ("-initrd", "i"), ("-append", "quiet")):
        assert argv[argv.index(option) + 1] == value
    assert "vhost=on" in argv[argv.index("-netdev") + 1]
