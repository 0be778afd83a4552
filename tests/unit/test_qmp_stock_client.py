"""Godwit's QMP server as the stock client ``qemu.qmp`` finds it: another's code is the judge."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from qemu.qmp import ExecuteError, QMPClient, Runstate

from qmp_bench import DEADLINE, Vm

T = TypeVar("T")


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    with Vm(tmp_path / "qmp") as vm:
        yield vm
    assert vm.errors == []


def _talk(vm: Vm, talk: Callable[[QMPClient], Awaitable[T]]) -> T:
    """Connect and negotiate, and do ``talk`` within the deadline."""

    async def conversation() -> T:
        client = QMPClient("judge")
        client.logger.disabled = True
        await client.connect(str(vm.path))
        try:
            return await talk(client)
        finally:
            await client.disconnect()

    return asyncio.run(asyncio.wait_for(conversation(), DEADLINE))


def test_it_negotiates_and_executes(vm: Vm) -> None:
    async def talk(client: QMPClient) -> None:
        assert client.greeting is not None
        assert client.greeting.QMP.version
        assert await client.execute("anything", {"a": 1}) == {"did": "anything"}
        assert await client.execute("big", {"size": 600_000}) == "x" * 600_000

    _talk(vm, talk)


def test_it_hears_refusals(vm: Vm) -> None:
    async def talk(client: QMPClient) -> None:
        with pytest.raises(ExecuteError, match="it is wrong") as caught:
            await client.execute("fail")
        assert caught.value.error_class == "GenericError"
        assert await client.execute("after") == {"did": "after"}

    _talk(vm, talk)


def test_it_gets_events_in_order_with_their_time(vm: Vm) -> None:
    async def talk(client: QMPClient) -> list[str]:
        await client.execute("stop")
        for number in range(3):
            vm.server.emit("COUNT", {"number": number})
        found = []
        while len(found) < 5:
            event = await client.events.get()
            assert set(event["timestamp"]) == {"seconds", "microseconds"}  # type: ignore[arg-type]
            found.append(f"{event['event']} {event.get('data')}")
        return found

    assert _talk(vm, talk) == [
        "RUN_STATE {'from': 'running', 'to': 'paused'}",
        "STOP None",
        *(f"COUNT {{'number': {number}}}" for number in range(3)),
    ]


def test_commands_at_once_have_a_reply_each(vm: Vm) -> None:
    async def talk(client: QMPClient) -> list[object]:
        return list(await asyncio.gather(*(client.execute(f"c{n}") for n in range(20))))

    assert _talk(vm, talk) == [{"did": f"c{n}"} for n in range(20)]


def test_it_sees_the_end_of_the_vm(vm: Vm) -> None:
    async def talk(client: QMPClient) -> None:
        assert await client.execute("quit") == {"did": "quit"}
        vm.thread.join(DEADLINE)
        vm.server.emit("SHUTDOWN", {"guest": False})
        vm.server.close()
        assert (await client.events.get())["event"] == "SHUTDOWN"
        while client.runstate is Runstate.RUNNING:
            await client.runstate_changed()

    with pytest.raises(EOFError):  # which disconnect() reports
        _talk(vm, talk)
