"""vhost writes behind KVM's back, so it keeps a log of its own; without it a move loses packets'
contents, and nothing shows it at once. Hence this look at the log itself."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator

import pytest
from vm_bench import Bench

from godwit.host.loop import Loop
from godwit.hw.console import Console
from godwit.hw.memory import PAGE, GuestMemory
from godwit.hw.virtio.net.device import VirtioNet
from godwit.hw.virtio.net.vhost import VhostBackend
from godwit.hw.virtio.queue import Virtqueue
from godwit.machine.board import Board
from godwit.machine.machine import Machine
from godwit.machine.vcpu import install_kick_handler
from godwit.spec.config import NicConfig, VmConfig
from godwit.spec.values import parse_mac
from lab import guest as guest_image
from lab import kernels
from lab.agent import Agent
from lab.netns import inside
from lab.scenario import MAC, wait_for


@pytest.fixture
def machine(bench: Bench) -> Iterator[Machine]:
    """A guest that runs in this process."""
    bench.drop_guest()
    kernel = kernels.cached("cloud-6.12")
    assert kernel is not None
    install_kick_handler()
    host = bench.net.a
    config = VmConfig(
        memory=128 << 20,
        kernel=str(kernel.vmlinuz),
        initrd=str(guest_image.build(kernel)),
        command_line=guest_image.CMDLINE,
        devices=(NicConfig("nic0", bench.free_tap(host), parse_mac(MAC)),),
    )
    ours, theirs = os.pipe()
    loop, console = Loop(), Console(theirs)
    thread = threading.Thread(target=loop.run)
    errors: list[str] = []
    with inside(host.netns):
        board = Board(config)
        machine = Machine(
            board, loop, console, lambda *end: None, lambda *what: errors.append(str(what))
        )
    thread.start()
    try:
        board.boot()
        machine.resume()
        text = b""
        while guest_image.READY.encode() not in text:
            text += os.read(ours, 4096)
        yield machine
        assert errors == []
    finally:
        machine.close()
        loop.stop()
        thread.join()
        console.close()
        loop.close()
        os.close(ours)
        os.close(theirs)


def test_what_vhost_writes_is_in_its_log(bench: Bench, machine: Machine) -> None:
    (nic,) = machine.nics
    assert isinstance(nic, VirtioNet)
    backend = nic.backend
    assert isinstance(backend, VhostBackend)
    queue = nic.queues[0]
    memory = machine.memory
    with Agent("10.0.0.2", bench.net.client.netns) as agent:
        agent.ping(60)
        backend.start_log()
        backend.take_log()
        before = _used_index(memory, queue)
        for _ in range(20):
            agent.ping()
        wait_for(lambda: _used_index(memory, queue) - before & 0xFFFF >= 20, 10)
        # vhost is halted while the rings are read: what it wrote is written, and logged.
        machine.pause()
        logged = _pages(backend.take_log())
        more = _pages(backend.take_log())
        written = _received_pages(memory, queue, before)
        ring = (queue.used + 4) // PAGE
        backend.stop_log()
        machine.resume()
        agent.ping(60)
    assert len(written) > 0
    assert written <= logged | more
    assert ring in logged | more
    assert max(logged) * PAGE < memory.size


def _used_index(memory: GuestMemory, queue: Virtqueue) -> int:
    return int(struct.unpack("<H", memory.view(queue.used + 2, 2))[0])


def _received_pages(memory: GuestMemory, queue: Virtqueue, since: int) -> set[int]:
    """The pages that the buffers used since then lie in (virtio 1.2, 2.7.8: the used ring)."""
    pages = set()
    for index in range((_used_index(memory, queue) - since) & 0xFFFF):
        slot = (since + index) % queue.size
        head, length = struct.unpack("<II", memory.view(queue.used + 4 + 8 * slot, 8))
        address, room, flags, _ = struct.unpack("<QIHH", memory.view(queue.desc + 16 * head, 16))
        assert flags & 2, "a buffer that the device may not write"
        for byte in (address, address + min(length, room) - 1):
            pages.add(byte // PAGE)
    return pages


def _pages(log: bytes) -> set[int]:
    bits = int.from_bytes(log, "little")
    return {page for page in range(bits.bit_length()) if bits >> page & 1}
