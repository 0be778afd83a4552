"""memtest86+ migrates while it tests: a page that was written and not sent would be an error."""

from __future__ import annotations

from vm_bench import Bench, Watched

from lab.networks import memtest
from lab.scenario import wait_for

_MOVES = 4
_MEMORY = "48M"
#: What the guest writes, it writes faster than any connection takes.
_STOP_AT_ONCE = {"downtime-limit": 10_000}
#: Tests that write all the time. The last waits for bits to fade, 80 s long.
_WRITING = range(10)


def test_it_finds_no_error_on_the_way(bench: Bench) -> None:
    bench.drop_guest()
    waiting = ("--incoming", "defer")
    hosts = [bench.net.b, bench.net.a] * (_MOVES // 2)
    start = ("--kernel", str(memtest.kernel()), "--append", memtest.CMDLINE)
    vm = bench.run(bench.net.a, *start, cpus=1, memory=_MEMORY)
    shown = _later(vm, 0)
    assert shown.test in _WRITING
    for host in hosts:
        target = bench.run(host, *waiting, cpus=1, memory=_MEMORY)
        target.qmp.execute("query-status")
        before = _later(vm, shown.time_s)
        assert before.errors == 0
        vm.qmp.execute("migrate-set-parameters", _STOP_AT_ONCE)
        vm.start_migration(bench.listen(target))
        info = vm.wait_migration()
        assert info["status"] == "completed", info
        vm, source = target, vm
        # Each test is seen again after the migration, with what it read since.
        shown = _later(vm, before.time_s + 2)
        assert shown.errors == 0
        assert source.status() == "postmigrate"
        bench.retire(source)
    end = _later(vm, shown.time_s + 4)
    assert end.errors == 0


def _later(vm: Watched, time_s: int) -> memtest.Screen:
    """What it shows once its clock is beyond a time."""
    found: list[memtest.Screen] = []

    def beyond() -> bool:
        shown = memtest.screen(vm.console)
        if shown is not None and shown.time_s > time_s:
            found.append(shown)
        return bool(found)

    wait_for(beyond, 60)
    return found[-1]
