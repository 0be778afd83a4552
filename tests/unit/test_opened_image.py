"""An image that qemu-storage-daemon opens and closes: the commands, their order, and failures."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import HostError
from godwit.host import storage_daemon
from godwit.host.storage_daemon import StorageDaemon
from godwit.hw.virtio.vhost_user.image import OpenedImage
from godwit.spec.back_ends import ImageFile


class Daemon:
    """A monitor in a thread, with the nodes of a daemon that exports nothing."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.nodes = {"nothing", "disk"}
        self.shows = "nothing"
        self.got: list[tuple[str, Any]] = []
        #: By command and node: what the daemon answers.
        self.fails: dict[tuple[str, str], str] = {}
        #: What it answers to a file that is to be read by io_uring.
        self.aio_fails = ""
        self.raw: bytes | None = None
        #: A command on a node that is done late: once the event is set.
        self.late: tuple[str, str] | None = None
        self.go_on = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with suppress(ConnectionError):  # closed with an answer on its way
            self._serve()

    def _serve(self) -> None:
        self._send({"QMP": {"version": {}, "capabilities": []}})
        with self._theirs.makefile("r") as lines:
            for line in lines:
                request = json.loads(line)
                given = request["arguments"]
                self.got.append((request["execute"], given))
                if self.raw is not None:
                    self._theirs.sendall(self.raw)
                    self._theirs.shutdown(socket.SHUT_RDWR)
                    return
                self._send({"event": "SOMETHING", "data": {}})
                self._send({**self._done(request["execute"], given), "id": request["id"]})

    def _send(self, value: Any) -> None:
        self._theirs.sendall(json.dumps(value).encode() + b"\r\n")

    def _done(self, command: str, given: Any) -> Any:
        node = _node_of(given)
        if command == "blockdev-reopen":
            (given,) = given["options"]
        if command == "query-named-block-nodes":
            return {"return": [{"node-name": node, "drv": "x"} for node in self.nodes]}
        if (command, node) == self.late:
            assert self.go_on.wait(20)
        if "aio" in given and self.aio_fails:
            return {"error": {"class": "GenericError", "desc": self.aio_fails}}
        if (command, node) in self.fails:
            return {"error": {"class": "GenericError", "desc": self.fails[command, node]}}
        if command == "blockdev-add":
            assert node not in self.nodes
            assert given.get("file", "nothing") in self.nodes
            self.nodes.add(node)
        elif command == "blockdev-reopen":
            assert (given["node-name"], given["driver"]) == ("disk", "raw")
            assert node in self.nodes
            self.shows = node
        elif command == "blockdev-del":
            assert node != self.shows
            self.nodes.remove(node)
        return {"return": {}}

    def close(self) -> None:
        self.go_on.set()
        self.ours.close()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._theirs.close()


def _node_of(given: Any) -> Any:
    """Return the node of a command, which for 'blockdev-reopen' is the one to show."""
    return given["options"][0]["file"] if "options" in given else given.get("node-name", "")


@contextmanager
def _late(daemon: Daemon, step: tuple[str, str]) -> Iterator[None]:
    """Have the daemon be late with a step, and the time be up at once from there on."""
    daemon.late = step
    send, answer = StorageDaemon._send, StorageDaemon._answer
    up = False

    def watched(storage: StorageDaemon, line: bytes) -> None:
        nonlocal up
        request = json.loads(line)
        up = up or (request["execute"], _node_of(request["arguments"])) == step
        send(storage, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorageDaemon, "_send", watched)
        patch.setattr(StorageDaemon, "_answer", lambda s, until: answer(s, 0 if up else until))
        yield
    daemon.go_on.set()


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon that runs."""
    daemon = Daemon()
    yield daemon
    daemon.close()


@pytest.fixture
def image(daemon: Daemon, tmp_path: Path) -> Iterator[OpenedImage]:
    """An image of that daemon."""
    path = tmp_path / "image.qcow2"
    path.write_bytes(b"QFI\xfb")
    file = ImageFile(str(path), "qcow2", direct=True, discard=True, size=1 << 20)
    image = OpenedImage(file, StorageDaemon(daemon.ours))
    yield image
    image.close()
    image.close()


def test_it_is_opened_and_closed(daemon: Daemon, image: OpenedImage, tmp_path: Path) -> None:
    for _ in range(2):
        image.acquire()
        image.acquire()
        assert daemon.nodes == {"nothing", "disk", "file", "image"}
        assert daemon.shows == "image"
        image.sync()
        image.release()
        image.release()
        assert daemon.nodes == {"nothing", "disk"}
        assert daemon.shows == "nothing"
    commands = [command for command, _ in daemon.got]
    assert commands[0] == "qmp_capabilities"
    turn = ["blockdev-add"] * 2 + ["blockdev-reopen"] * 2 + ["blockdev-del"] * 2
    assert commands[1:] == turn * 2
    options = {"read-only": False, "discard": "unmap", "cache": {"direct": True}}
    file = {"node-name": "file", "driver": "file", "filename": str(tmp_path / "image.qcow2")}
    assert daemon.got[1][1] == {**file, "aio": "io_uring", **options}
    assert daemon.got[2][1] == {
        "node-name": "image",
        "driver": "qcow2",
        "file": "file",
        **options,
    }
    shown = {"driver": "raw", "node-name": "disk", "file": "image", **options}
    assert daemon.got[3][1] == {"options": [shown]}


@pytest.mark.parametrize(
    "step", [("blockdev-add", "file"), ("blockdev-add", "image"), ("blockdev-reopen", "image")]
)
def test_what_cannot_be_opened_is_not_half_open(
    daemon: Daemon, image: OpenedImage, step: tuple[str, str]
) -> None:
    daemon.fails[step] = "no"
    with pytest.raises(HostError, match="no"):
        image.acquire()
    assert daemon.nodes == {"nothing", "disk"}
    daemon.fails.clear()
    image.acquire()
    assert daemon.shows == "image"


def test_the_reason_is_the_daemons(daemon: Daemon, image: OpenedImage) -> None:
    daemon.fails["blockdev-add", "file"] = 'Failed to get "write" lock'
    with pytest.raises(HostError, match=r"disk image '.*image\.qcow2': Failed to get \"write\" lo"):
        image.acquire()


@pytest.mark.parametrize(
    "answer",
    [
        "Unable to use linux io_uring: failed to init linux io_uring ring: Operation not permitted",
        "aio=io_uring was specified, but is not supported in this build.",
        "Parameter 'aio' does not accept value 'io_uring'",
    ],
)
def test_a_host_without_io_uring_has_threads(
    daemon: Daemon, image: OpenedImage, answer: str
) -> None:
    daemon.aio_fails = answer
    image.acquire()
    assert daemon.shows == "image"
    tries = [given.get("aio") for command, given in daemon.got if command == "blockdev-add"]
    assert tries == ["io_uring", None, None]


def test_a_lost_write_fails_the_release(
    daemon: Daemon, image: OpenedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.acquire()

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        image.sync()
    for _ in range(2):
        with pytest.raises(HostError, match="cannot be flushed: Input/output error"):
            image.release()
    image.acquire()
    assert daemon.shows == "image"


class _Lock:
    """A lock that reports who comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.came = threading.Semaphore(0)

    def __enter__(self) -> None:
        self.came.release()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_of_two_flushes_at_once_each_knows_of_a_lost_write(
    image: OpenedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports it once for a descriptor, and the other flush is a success."""
    image.acquire()
    lock, go_on, errors = _Lock(), threading.Event(), [OSError(5, "Input/output error")]
    monkeypatch.setattr(image, "_flushing", lock)

    def fdatasync(_: int) -> None:
        if errors:
            error = errors.pop()
            assert go_on.wait(20)
            raise error

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    refusals: list[str] = []

    def release() -> None:
        try:
            image.release()
        except HostError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=act) for act in (image.sync, release)]
    for thread in threads:
        thread.start()
        assert lock.came.acquire(timeout=20)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert "cannot be flushed: Input/output error" in refusals[0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "it has ended"),
        (b"{\n", "truncated"),
        (b'{"return": {}', "it has ended"),
        (b'{"error": 7}\n', "Expected `object"),
        (b"x" * (9 << 17), "too long"),
    ],
    ids=range(5),
)
def test_a_daemon_that_answers_nonsense(
    daemon: Daemon, image: OpenedImage, answer: bytes, says: str
) -> None:
    daemon.raw = answer
    with pytest.raises(HostError, match=says):
        image.acquire()


def test_a_silent_daemon_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_daemon, "_ANSWER_S", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(HostError, match="answer qmp_capabilities: timed out"):
        StorageDaemon(ours).execute("blockdev-add")


def test_a_late_answer_is_not_the_next_ones(daemon: Daemon) -> None:
    storage = StorageDaemon(daemon.ours)
    daemon.fails = {("blockdev-del", "x"): "late"}
    with _late(daemon, ("blockdev-del", "x")):
        for _ in range(2):
            with pytest.raises(HostError, match="does not answer blockdev-del: timed out"):
                storage.execute("blockdev-del", node_name="x")
        assert storage.silent
    assert storage.nodes() == {"nothing", "disk"}
    assert not storage.silent


def test_half_a_command_is_the_end_of_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_daemon, "_ANSWER_S", 0.05)
    ours, theirs = socket.socketpair()
    with theirs:
        storage = StorageDaemon(ours)
        theirs.sendall(b'{"return": {}, "id": 1}\n')  # to qmp_capabilities
        with pytest.raises(HostError, match="it takes no commands"):
            storage.execute("blockdev-add", node_name="x" * (4 << 20))
        assert ours.fileno() == -1


# --- what is open is unknown ----------------------------------------------------------------------
_STEPS = [
    *(("blockdev-add", "file"), ("blockdev-add", "image"), ("blockdev-reopen", "image")),
    *(("blockdev-reopen", "nothing"), ("blockdev-del", "image"), ("blockdev-del", "file")),
]


def _be_late(daemon: Daemon, image: OpenedImage, step: tuple[str, str]) -> None:
    """Have a step of an acquire or a release be late."""
    act = image.acquire
    if step in _STEPS[3:]:
        image.acquire()
        act = image.release
    with _late(daemon, step):
        with pytest.raises(HostError, match=f"does not answer {step[0]}: timed out"):
            act()
        for _ in range(2):  # and the guest does not run
            with pytest.raises(HostError, match=r"nobody knows whether it is open .* try again"):
                image.acquire()
            with pytest.raises(HostError, match="nobody knows whether it is open"):
                image.release()


@pytest.mark.parametrize("step", _STEPS, ids=" ".join)
def test_a_late_step_leaves_no_guest_on_nothing(
    daemon: Daemon, image: OpenedImage, step: tuple[str, str]
) -> None:
    _be_late(daemon, image, step)
    image.acquire()
    assert daemon.shows == "image"
    assert daemon.nodes == {"nothing", "disk", "file", "image"}
    image.release()
    assert daemon.nodes == {"nothing", "disk"}


@pytest.mark.parametrize("step", _STEPS, ids=" ".join)
def test_a_late_step_leaves_no_image_open(
    daemon: Daemon, image: OpenedImage, step: tuple[str, str]
) -> None:
    _be_late(daemon, image, step)
    image.release()
    assert daemon.shows == "nothing"
    assert daemon.nodes == {"nothing", "disk"}


@pytest.mark.parametrize("step", _STEPS[3:], ids=" ".join)
def test_an_image_that_cannot_be_closed_is_acquired_again(
    daemon: Daemon, image: OpenedImage, step: tuple[str, str]
) -> None:
    for _ in range(2):
        image.acquire()
        daemon.fails[step] = "busy"
        with pytest.raises(HostError, match=r"disk image '.*' may still be open: busy"):
            image.release()
        daemon.fails.clear()
        image.acquire()
        assert daemon.shows == "image"
        assert daemon.nodes == {"nothing", "disk", "file", "image"}


def test_a_daemon_that_has_ended_lets_no_guest_run(daemon: Daemon, image: OpenedImage) -> None:
    image.acquire()
    daemon.raw = b""
    with pytest.raises(HostError, match=r"may still be open: .* it has ended"):
        image.release()
    for _ in range(2):
        with pytest.raises(HostError, match="nobody knows whether it is open"):
            image.acquire()


def test_there_is_no_such_image(daemon: Daemon) -> None:
    with pytest.raises(HostError, match="disk image '/none': No such file"):
        OpenedImage(ImageFile("/none", "qcow2", size=1), StorageDaemon(daemon.ours))
