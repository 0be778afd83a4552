"""A guest in a file: it goes there whole or not at all, and is announced when it comes back."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm_bench import ONE_BACKEND, Bench, Guest, Watched, announced, rarps

from godwit.client.qmp import CommandRefused
from lab.judge import announcements
from lab.scenario import MAC


def _save(bench: Bench, guest: Guest, name: str) -> Path:
    """Have the guest saved; its process ends with code 0."""
    path = bench.folder / name
    vm = guest.vm
    vm.start_migration(f"file:{path}")
    info = vm.wait_migration()
    assert info["status"] == "completed", info
    assert vm.status() == "postmigrate"
    assert vm.transitions() == [("running", "finish-migrate"), ("finish-migrate", "postmigrate")]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 < info["ram"]["transferred"] + (4 << 20)
    assert vm.quit() == 0
    return path


def _restore(bench: Bench, guest: Guest, path: Path, *arguments: str) -> Watched:
    """On the other host."""
    vm = bench.run(bench.other(guest.vm), "--incoming", f"file:{path}", *arguments, nic=guest.nic)
    vm.qmp.execute("query-status")
    return vm


def test_a_saved_guest_comes_back_elsewhere_and_announces_itself(
    bench: Bench, guest: Guest
) -> None:
    agent = guest.agent
    checksum = agent.mem_start(16)
    agent.hot_start(8)
    path = _save(bench, guest, "announced")
    with bench.capture("restored") as capture:
        # Loaded, it waits for the cont.
        vm = _restore(bench, guest, path, "--no-autostart")
        vm.event("RUN_STATE", lambda data: data["to"] == "prelaunch-migrate")
        assert not vm.news("ANNOUNCE_STARTED", "RESUME")
        released = time.time()
        vm.qmp.execute("cont")
        guest.vm = vm
        announced(vm)
        agent.ping(60)
        capture.stop()
    assert vm.transitions()[-1] == ("prelaunch-migrate", "running")
    frames = announcements(capture.path, MAC)
    assert {f.vlan for f in frames} == {0, 100, 200}
    assert min(f.at for f in frames) > released
    assert {f.sender for f in frames if f.kind != "RARP"} == {"guest"}
    assert len(rarps(capture.path)) == 5
    assert agent.hot_stop() > 0
    assert agent.mem_check() == checksum
    bench.answers()


@contextmanager
def _full(bench: Bench) -> Iterator[Path]:
    """A file system with less room than a guest needs."""
    path = bench.folder / "full"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "full", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
        path.rmdir()


@ONE_BACKEND
def test_a_guest_that_cannot_be_saved_goes_on(bench: Bench, guest: Guest) -> None:
    vm = guest.vm
    with _full(bench) as folder:
        vm.start_migration(f"file:{folder}/guest")
        info = vm.wait_migration()
        assert info["status"] == "failed"
        assert "No space left" in info["error-desc"]
        assert list(folder.iterdir()) == []
    vm.start_migration(f"file:{bench.folder}/nowhere/guest")
    assert "No such file or directory" in vm.wait_migration()["error-desc"]
    # One that would replace a file, and is cancelled.
    kept = bench.folder / "kept"
    kept.write_text("as it was")
    vm.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
    vm.start_migration(f"file:{kept}")
    vm.event("MIGRATION", lambda data: data["status"] == "active")
    vm.qmp.execute("migrate_cancel")
    assert vm.wait_migration()["status"] == "cancelled"
    assert kept.read_text() == "as it was"
    assert [name for name in os.listdir(bench.folder) if name.startswith("kept")] == ["kept"]
    vm.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    assert vm.status() == "running"
    assert not vm.news("ANNOUNCE_STARTED"), "nobody saw it elsewhere"
    guest.agent.ping()
    # What is no regular file is not replaced.
    link = bench.folder / "link"
    link.symlink_to("/dev/null")
    for path in ("/dev/null", link, bench.folder):
        vm.start_migration(f"file:{path}")
        assert "no regular file" in vm.wait_migration()["error-desc"]
    assert link.is_symlink()
    with pytest.raises(CommandRefused, match="absolute path"):
        vm.qmp.execute("migrate", {"uri": "file:guest"})


@ONE_BACKEND
def test_a_file_that_is_not_whole_or_anothers_is_refused(bench: Bench, guest: Guest) -> None:
    path = _save(bench, guest, "whole")
    cut = bench.folder / "cut"
    cut.write_bytes(path.read_bytes()[:-20])
    altered = bench.folder / "altered"
    data = bytearray(path.read_bytes())
    at = (2 << 20) + (16 << 20) + 4321  # of the kernel's text: a chunk that is never zeros
    data[at] ^= 1
    altered.write_bytes(data)
    del data
    foreign = bench.folder / "foreign"
    foreign.write_bytes(b"#!/bin/sh\n" * 1000)
    fifo = bench.folder / "fifo"
    os.mkfifo(fifo)
    host = bench.other(guest.vm)
    vms = {
        "it is not whole": bench.run(host, "--incoming", f"file:{cut}"),
        f"(offset {at // (256 << 10) * (256 << 10)}) was altered": bench.run(
            host, "--incoming", f"file:{altered}"
        ),
        "no snapshot of Godwit's": bench.run(host, "--incoming", f"file:{foreign}"),
        "128 MiB of RAM, and this VM 160 MiB; give --memory 128M": bench.run(
            host, "--incoming", f"file:{path}", memory="160M"
        ),
        "cannot read the snapshot": bench.run(host, "--incoming", "file:/nowhere"),
        "it is no regular file": bench.run(host, "--incoming", f"file:{fifo}"),
    }
    for words, vm in vms.items():
        assert vm.wait(60) == 1
        assert words in vm.console
    vm = _restore(bench, guest, path)
    vm.event("RESUME")
    guest.vm = vm
    guest.agent.ping(60)
