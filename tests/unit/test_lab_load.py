"""What the lab's load programs print, and QEMU's command line."""

from __future__ import annotations

from godwit.lab import load, qemu, traffic


def test_rates_are_bytes_by_the_time_each_direction_took() -> None:
    assert load.rates("out 3000000 1500000\nin 500 1000000\n") == {"out": 2e6, "in": 500.0}


def test_a_pinger_tells_when_answers_came_and_how_many_were_sent() -> None:
    text = b"1000.000000 0\n1000.250000 2\n1000.260000 1\n1000.300000 "  # the last: half
    seen = traffic.answers(text)
    assert (seen.sent, seen.received) == (2, 3)
    assert seen.gap_ms(1000.1, 1000.2) == 250.0
    ended = traffic.answers(text + b"3\nsent 7\n")
    assert (ended.sent, ended.received) == (7, 4)


def test_a_qemu_that_waits_has_the_kernel_as_well() -> None:
    argv = qemu.arguments(128, 2, "tap0", "52:54:00:00:00:01", ("k", "i", "quiet"), "unix:/s")
    assert argv[-2:] == ["-incoming", "unix:/s"]
    for option, value in (("-kernel", "k"), ("-initrd", "i"), ("-append", "quiet")):
        assert argv[argv.index(option) + 1] == value
    assert "vhost=on" in argv[argv.index("-netdev") + 1]
