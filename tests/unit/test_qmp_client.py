"""The client: what it says of a VM that answers, refuses, is not there yet, or goes."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.client.qmp import Client, CommandRefused, VmGone
from godwit.qmp import server as module
from qmp_bench import DEADLINE, Vm


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def vm(path: Path) -> Iterator[Vm]:
    with Vm(path) as vm:
        yield vm
    assert vm.errors == []


def test_nobody_there(path: Path) -> None:
    with pytest.raises(VmGone, match=r"no VM answers on .*No such file"):
        Client.connect(path, DEADLINE)
    with pytest.raises(VmGone, match="no VM answers on"):
        Client.connect(path, 0.05, retry=True)


def test_it_waits_for_a_vm_that_is_about_to_come(path: Path) -> None:
    found: list[object] = []

    def connect() -> None:
        with Client.connect(path, DEADLINE, retry=True) as client:
            found.append(client.execute("hello", deadline=DEADLINE))

    thread = threading.Thread(target=connect)
    thread.start()
    with Vm(path):
        thread.join(DEADLINE)
    assert found == [{"did": "hello"}]


def test_somebody_there_who_says_nothing(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        with pytest.raises(VmGone, match=r"within 0\.05 s"):
            Client.connect(path, 0.05)


def test_a_vm_that_ends(path: Path) -> None:
    with Vm(path) as vm:
        client = Client.connect(path, DEADLINE)
        vm.call(vm.server.close)
        with pytest.raises(VmGone, match="hung up"):
            client.wait_event("NEVER", DEADLINE)
        with pytest.raises(VmGone):
            client.execute("anything", deadline=DEADLINE)
        client.close()
        client.close()


def test_an_event_that_does_not_come(vm: Vm) -> None:
    with Client.connect(vm.path, DEADLINE) as client:
        with pytest.raises(VmGone, match=r"event NEVER.*within 0\.05 s"):
            client.wait_event("NEVER", 0.05)
        vm.server.emit("LATER")
        assert client.wait_event("LATER", DEADLINE)["event"] == "LATER"


def test_imports_stay_light() -> None:
    script = (
        "import sys, godwit.qmp.server, godwit.qmp.commands, godwit.client.qmp\n"
        "import godwit.announce.announcer\n"
        "print([name for name in ('asyncio', 'rich', 'qemu', 'ssl') if name in sys.modules])"
    )
    source = str(Path(module.__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_the_stock_client_executes_and_hears_refusals(vm: Vm) -> None:
    with Client.connect(vm.path, DEADLINE) as client:
        assert client.execute("anything", {"a": 1}, DEADLINE) == {"did": "anything"}
        with pytest.raises(CommandRefused, match="it is wrong") as caught:
            client.execute("fail", deadline=DEADLINE)
        assert caught.value.error_class == "GenericError"
        assert len(client.execute("big", {"size": 600_000}, DEADLINE)) == 600_000


def test_wait_event_passes_over_what_it_does_not_look_for(vm: Vm) -> None:
    with Client.connect(vm.path, DEADLINE) as client:
        for status in ("setup", "active", "completed"):
            vm.server.emit("MIGRATION", {"status": status})
            vm.server.emit("OTHER")
        event = client.wait_event("MIGRATION", DEADLINE, lambda data: data["status"] == "active")
        assert event["data"] == {"status": "active"}
        client.execute("nothing", deadline=DEADLINE)
        names = [(event["event"], event.get("data")) for event in client.events()]
        assert names == [("OTHER", None), ("MIGRATION", {"status": "completed"}), ("OTHER", None)]
        assert client.events() == []
