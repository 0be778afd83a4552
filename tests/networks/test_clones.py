"""Two copies of a guest beside their original: nobody on the network sees the original move."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm_bench import Bench, Watched, announce

from lab.agent import Agent
from lab.load import PORT
from lab.networks.arpwatch import ArpWatch
from lab.scenario import MAC, wait_for
from lab.traffic import FLOWS

_SECTOR = 512
#: The copies' own identities, as their operator gives them.
_COPIES = (("52:54:00:c0:00:01", "10.0.0.71"), ("52:54:00:c0:00:02", "10.0.0.72"))
#: The operator's way to a copy that is not on the network yet: a disk, of which it reads commands.
_LISTENS = (
    "modprobe virtio_blk; (while :; do blockdev --flushbufs /dev/vda; "
    "dd if=/dev/vda bs=512 count=1 2>/dev/null | tr -d '\\000' > /tmp/command; "
    "[ -s /tmp/command ] && exec sh /tmp/command; usleep 200000; done) > /dev/console 2>&1 &"
)
#: The driver resets the NIC, and reads its MAC address anew.
_BECOMES = (
    "cd /sys/class/net/eth0/device/driver; at=$(readlink -f /sys/class/net/eth0/device); "
    "echo ${{at##*/}} > unbind; echo ${{at##*/}} > bind; "
    "until ip link set eth0 up; do usleep 100000; done; "
    "ip address add {address}/24 dev eth0; ping -c 3 10.0.0.1"
)


def _command(path: Path, text: str = "") -> None:
    path.write_bytes(text.encode().ljust(_SECTOR, b"\0"))


def _places(bench: Bench) -> set[str]:
    """The switch's ports behind which it has seen the original's address, in any VLAN."""
    argv = ["bridge", "-n", bench.net.switch, "-j", "fdb", "show", "br", "br0"]
    entries = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return {entry["ifname"] for entry in entries if entry["mac"] == MAC}


def _wait_held_back(vm: Watched) -> None:
    """Until the copy runs, and has tried to go on as the original."""
    wait_for(lambda: vm.status() == "running", 60)
    wait_for(lambda: announce(vm)["held-back"] > 20, 120)


@pytest.fixture
def tagged(bench: Bench) -> Iterator[ArpWatch]:
    """An arpwatch in VLAN 100."""
    with ArpWatch(bench.net.client.netns, "net0.100", bench.folder) as watch:
        yield watch


@pytest.mark.timeout(400)
@pytest.mark.parametrize("nic", ["", "model=e1000"], ids=["virtio-net", "e1000"])
def test_two_copies_and_their_original(
    bench: Bench, arpwatch: ArpWatch, tagged: ArpWatch, nic: str
) -> None:
    commands = [bench.folder / f"command-{name}" for name in ("original", "0", "1")]
    for path in commands:
        _command(path)
    # The cloud kernels have no e1000.
    kernel, memory = ("full-6.12", "256M") if nic else ("cloud-6.12", "128M")
    disk = ("--disk", f"path={commands[0]},readonly")
    guest = bench.boot(*disk, nic=nic, kernel=kernel, memory=memory, deadline=200.0)
    agent = guest.agent
    agent.sh(_LISTENS)
    bench.answers()
    # A copy would go on with what its original does: frames by the original's addresses.
    agent.udp_send(FLOWS[0].client, PORT, FLOWS[0].id, 20, 100_000)
    path = bench.folder / "original"
    argv = [sys.executable, "-m", "godwit.cli.main", "save", "--qmp", str(guest.vm.qmp_path)]
    subprocess.run([*argv, "--keep-running", str(path)], check=True, timeout=120)

    copies: list[tuple[Watched, str, str]] = []
    for number, (mac, address) in enumerate(_COPIES):
        its_own = f"path={commands[1 + number]},readonly"
        vm = bench.run(
            *(bench.net.b, "--incoming", f"file:{path}", "--clone", "--disk", its_own),
            nic=nic,
            mac=mac,
            memory=memory,
        )
        copies.append((vm, mac, address))
    for vm, _, _ in copies:
        _wait_held_back(vm)
        assert announce(vm)["quarantined"]
        assert not vm.news("ANNOUNCE_STARTED", "NIC_OPENED")
    agent.ping()
    assert _places(bench) == {"pa"}

    for number, (vm, mac, address) in enumerate(copies):
        _command(commands[1 + number], _BECOMES.format(address=address))
        assert vm.event("NIC_OPENED", deadline=120)["data"] == {"nic": "nic0", "mac": mac}
        vm.event("ANNOUNCE_STARTED")
        with Agent(address, bench.net.client.netns) as own:
            own.ping(60)
        assert not announce(vm)["quarantined"]
    bench.answers()
    assert _places(bench) == {"pa"}
    assert arpwatch.changes() == []
    assert tagged.changes() == []
    bench.drop_guest()
