"""vsock with stock drivers: streams both ways, reset by a migration, and new ones after it."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm_bench import Bench, Guest, Watched

from lab.agent import Agent
from lab.scenario import wait_for

PORT, HOST_PORT = 1024, 2048
CID = 4711
#: A reset, as a program sees it that waited, or that came later.
_RESET = (errno.ECONNRESET, errno.ENOTCONN)
_MODULE = "vmw_vsock_virtio_transport"
#: 0 as well: the kernel marks a reset stream as shut down by its peer, and shows an error once.
_ENDED = (0, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)


@contextmanager
def _connected(cid: int) -> Iterator[socket.socket]:
    """A connection from the host to the guest's echo server."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as stream:
        stream.settimeout(30)
        stream.connect((cid, PORT))
        yield stream


def _echoes(stream: socket.socket, size: int) -> None:
    """What is sent comes back as it was."""
    data = os.urandom(size)
    sender = threading.Thread(target=stream.sendall, args=(data,))
    sender.start()
    back = bytearray()
    while len(back) < size:
        piece = stream.recv(1 << 16)
        assert piece, "the guest ended the stream"
        back += piece
    sender.join()
    assert bytes(back) == data


@contextmanager
def _host_echo() -> Iterator[list[socket.socket]]:
    """An echo server of the host's; yields its connections."""
    found: list[socket.socket] = []
    ended = threading.Event()

    def echo(stream: socket.socket) -> None:
        try:
            while data := stream.recv(1 << 16):
                stream.sendall(data)
        except OSError:
            pass  # reset, as the test expects

    def accept() -> None:
        while not ended.is_set():
            try:
                stream, _ = server.accept()
            except TimeoutError:
                continue
            stream.settimeout(None)
            found.append(stream)
            threading.Thread(target=echo, args=(stream,), daemon=True).start()

    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as server:
        server.bind((socket.VMADDR_CID_ANY, HOST_PORT))
        server.listen()
        server.settimeout(0.5)
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield found
        finally:
            ended.set()
            acceptor.join()
            for stream in found:
                stream.close()


def _serve(agent: Agent) -> None:
    agent.sh(f"modprobe {_MODULE}")
    assert agent.vsock(f"serve {PORT}") == "ok"


def _cid(vm: Watched) -> int:
    (found,) = (one for one in vm.qmp.execute("query-devices") if one["kind"] == "virtio-vsock")
    return int(found["properties"]["cid"])


def _end(stream: socket.socket) -> int:
    """How the host's end of a stream is over: an errno, or 0 for an orderly end."""
    try:
        while stream.recv(1 << 16):
            pass
    except OSError as error:
        return error.errno or -1
    return 0


def _works(agent: Agent, cid: int) -> None:
    with _connected(cid) as stream:
        _echoes(stream, 300_000)
    assert agent.vsock(f"connect {HOST_PORT}") == "ok"
    assert agent.vsock("exchange 300000") == "ok 300000"


@pytest.mark.parametrize("kernel", ["cloud-6.12", "cloud-6.1"])
def test_streams_carry_bytes_and_end_with_a_migration(bench: Bench, kernel: str) -> None:
    target = bench.run(bench.net.b, "--incoming", "defer", "--vsock", "cid=auto")
    guest = bench.boot("--vsock", f"cid={CID}", kernel=kernel, keep=[target])
    agent = guest.agent
    _serve(agent)
    assert _cid(guest.vm) == CID
    with _host_echo(), _connected(CID) as stream:
        _works(agent, CID)
        _echoes(stream, 1 << 20)
        target.qmp.execute("query-status")
        # Bytes that the guest has received, and not read: on their way when it stops.
        stop = threading.Event()
        wrong: list[bytes] = []
        sender = threading.Thread(target=_babble, args=(stream, stop, wrong))
        sender.start()
        try:
            bench.move(guest, target)
        finally:
            stop.set()
        sender.join(30)
        assert not sender.is_alive()
        assert wrong == []
        assert _end(stream) in _ENDED
        # The guest's ends: of its own connection, and of the one that it served.
        assert int(agent.vsock("end")) in _RESET
        wait_for(lambda: int(agent.vsock("served")) in _RESET, 20)
        assert _cid(target) == CID
        _works(agent, CID)
    assert target.news("GUEST_ERROR") == []


def _babble(stream: socket.socket, stop: threading.Event, wrong: list[bytes]) -> None:
    """Send and read what comes back until the stream's end; what is not what was sent is wrong."""
    data = bytes(range(256)) * 64
    try:
        while not stop.is_set():
            stream.sendall(data)
            left = len(data)
            while left:
                piece = stream.recv(left)
                if not piece:
                    return
                if piece != data[len(data) - left :][: len(piece)]:
                    wrong.append(piece)
                left -= len(piece)
    except OSError:
        pass  # how it ended is asked behind this


def test_a_migration_that_fails_before_the_stop_resets_nothing(bench: Bench) -> None:
    guest = bench.boot("--vsock", f"cid={CID}")
    _serve(guest.agent)
    vm = guest.vm
    with _connected(CID) as stream:
        _echoes(stream, 100_000)
        wrong = bench.run(bench.net.b, "--incoming", "defer", "--vsock", f"cid={CID + 1}")
        vm.start_migration(bench.listen(wrong))
        info = vm.wait_migration()
        assert f"cid: {CID} at the source, {CID + 1} here" in info["error-desc"]
        _echoes(stream, 100_000)
        # One that is cancelled while its log is on: the buffers passed through the process.
        vm.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
        target = bench.run(bench.net.b, "--incoming", "defer", "--vsock", "cid=auto")
        vm.start_migration(bench.listen(target))
        vm.event("MIGRATION", lambda data: data["status"] == "active")
        for _ in range(4):
            _echoes(stream, 500_000)
        vm.qmp.execute("migrate_cancel")
        assert vm.wait_migration()["status"] == "cancelled"
        _echoes(stream, 1 << 20)
    assert vm.news("GUEST_ERROR") == []


def test_a_cid_is_one_guests(bench: Bench) -> None:
    guest = bench.boot("--vsock", f"cid={CID}")
    second = bench.run(
        bench.net.b, *_image(bench), "--vsock", f"cid={CID}", mac="52:54:00:00:00:99"
    )
    assert second.wait(60) == 1
    assert f"CID {CID} is another guest's on this host" in second.console
    third = bench.run(bench.net.b, *_image(bench), "--vsock", "cid=auto", mac="52:54:00:00:00:99")
    third.qmp.execute("query-status")
    assert _cid(third) not in (0, CID)
    guest.agent.ping()


def _image(bench: Bench) -> list[str]:
    from lab import guest as guest_image
    from lab import kernels

    kernel = kernels.cached("cloud-6.12")
    assert kernel is not None
    argv = ["--kernel", str(kernel.vmlinuz), "--initrd", str(guest_image.build(kernel))]
    return [*argv, "--append", f"{guest_image.CMDLINE} godwit.net=off"]


def test_a_guest_from_a_file_has_its_cid_and_no_connections(bench: Bench) -> None:
    guest = bench.boot("--vsock", f"cid={CID}")
    agent = guest.agent
    _serve(agent)
    path = bench.folder / "with-vsock"
    with _host_echo(), _connected(CID) as stream:
        _works(agent, CID)
        _echoes(stream, 1000)
        _save(guest, path)
        assert _end(stream) in _ENDED
        # Paused in between: the event waits for the guest to run.
        vm = bench.run(
            bench.net.b, "--incoming", f"file:{path}", "--no-autostart", "--vsock", "cid=auto"
        )
        vm.event("RUN_STATE", lambda data: data["to"] == "prelaunch-migrate")
        vm.qmp.execute("cont")
        guest.vm = vm
        agent.ping(60)
        assert int(agent.vsock("end")) in _RESET
        assert _cid(vm) == CID
        _works(agent, CID)


def _save(guest: Guest, path: Path) -> None:
    vm = guest.vm
    vm.start_migration(f"file:{path}")
    assert vm.wait_migration()["status"] == "completed"
    assert vm.quit() == 0
