"""The pytest plugin of all tests with real guests, loaded by the conftest of each folder of them.

They need KVM: ``make test`` runs them in the lab. A plugin, and not a conftest, so that a run over
more than one folder has one network and one guest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from vm_bench import MORE_TAPS, TAPS, Bench, Guest

from godwit.client.kvm import why_unusable
from lab.emulator import MARKER
from lab.network import Network
from lab.vm import vm_folder

_TESTS = Path(__file__).parents[1]
_HOMES = (_TESTS / "vm", _TESTS / "networks", _TESTS / "unlike")
#: What neither Godwit nor a healthy guest prints.
_BROKEN = re.compile(r"Traceback|internal error|Call Trace|Kernel panic|Oops:|BUG:")
_bench: Bench | None = None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out what was judged or is not asked for, and give an emulated CPU its time."""
    done = _done(config)
    small = not config.getoption("--whole")
    out = [i for i in items if i.nodeid in done or (small and i.get_closest_marker("whole"))]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
    for item in items:
        if item.path.parent in _HOMES:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.timeout(240))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what ``scripts/vm-tests`` and ``make test-networks`` give."""
    # For labs that die (75): the next one goes on where this one ended.
    parser.addoption("--done", type=Path, help="a file of tests that were judged; more come")
    parser.addoption("--whole", action="store_true", help="also the tests marked 'whole'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the VMs printed goes with a failure; the guest of a failed test serves no other."""
    report = yield
    item.stash[_GOOD] = item.stash.get(_GOOD, True) and not report.failed
    printed = item.stash.setdefault(_PRINTED, {})
    vms = _bench.vms if _bench is not None else []
    if call.when == "setup":
        printed.update({vm.name: len(vm.console) for vm in vms})
    news = [vm.console[printed.get(vm.name, 0) :] for vm in vms]
    if report.failed and os.environ.get(MARKER) and any(_FAULT in text for text in news):
        # The emulated CPU's doing, in all likelihood: docs/decisions/0010-the-labs-faults.md.
        pytest.exit(f"{item.nodeid}: {_FAULT} on the lab's emulated CPU; see there", 75)
    if report.when == "teardown":
        _note(item, "passed" if item.stash[_GOOD] else "failed")
    if report.failed and call.excinfo is not None:
        # At once: a lab that dies later takes pytest's summary with it.
        why = str(call.excinfo.value).splitlines() or [call.excinfo.typename]
        item.config.get_terminal_writer().line(f"\n{item.nodeid} ({report.when}): {why[0][:300]}")
    if report.failed and _bench is not None:
        for vm in _bench.vms:
            report.sections.append((f"{vm.name} on {vm.host.netns} printed", vm.console[-3000:]))
        # Whatever failed, its setup or what was printed meanwhile: the next test has a new one.
        _bench.drop_guest()
    return report


_GOOD = pytest.StashKey[bool]()
#: VM -> characters on its console when the test began.
_PRINTED = pytest.StashKey[dict[str, int]]()
_FAULT = "the guest triple-faulted"


def _done(config: pytest.Config) -> set[str]:
    path = config.getoption("--done")
    lines = path.read_text().splitlines() if path and path.exists() else []
    return {line.split(" ", 1)[1] for line in lines}


def _note(item: pytest.Item, verdict: str) -> None:
    path = item.config.getoption("--done")
    if path:
        with path.open("a") as stream:
            stream.write(f"{verdict} {item.nodeid}\n")


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """The lab's network, and VMs in it."""
    global _bench
    why = why_unusable()
    if why is not None:
        pytest.exit(f"the VM tests need KVM ({why}): 'make test' runs them in the lab", 1)
    # /run, in memory: the lab's other files come over a slow line.
    with vm_folder("/run", writable=True) as folder, Network() as net:
        for host in (net.a, net.b):
            net.add_taps(host, (*TAPS[2:], *MORE_TAPS))
        _bench = Bench(net, folder)
        try:
            yield _bench
        finally:
            _bench.close()
            _bench = None


@pytest.fixture
def nothing_broke(bench: Bench) -> Iterator[None]:
    """Fail the test if a VM printed what none does."""
    yield
    for vm in bench.vms:
        broken = _BROKEN.search(vm.console)
        if broken is not None:
            around = vm.console[max(0, broken.start() - 1500) : broken.end() + 1500]
            pytest.fail(f"{vm.name} printed {broken}:\n{around}")


#: The data paths, by the keys of ``--nic``: what uses ``guest`` runs on each of them. A module to
#: which the path does not matter says ``pytestmark = ONE_BACKEND``.
_BACKENDS = {"vhost": "", "in-process": "vhost=off"}


@pytest.fixture(scope="session", params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """What ``--nic`` says of the data path."""
    return _BACKENDS[request.param]


@pytest.fixture
def guest(bench: Bench, backend: str) -> Guest:
    """A running guest of two vCPUs that tests share; it is wherever the last one left it."""
    return bench.traveller(backend)
