"""The sandbox of a VM that runs: what it holds, what it is refused, and VMs of an ordinary user."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vm_bench import ONE_BACKEND, Bench, Guest

from godwit.client.vm import Vm
from lab import guest as guest_image
from lab import kernels
from lab.agent import Agent
from lab.netns import entering
from lab.network import Host
from lab.scenario import MAC
from lab.vm import vm_folder

#: What a running VM may have open.
_ITS_OWN = re.compile(
    r"/dev/(null|kvm|net/tun|vhost-net|vhost-vsock)|/proc/\d+/pagemap|(anon_inode|socket|pipe):.*"
    r"|/memfd:.*|.*/(vmlinuz[^/]*|guest-\w+\.cpio)"
)
USER = 4711


def _status(pid: int, task: str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines()
    return {name: rest.strip() for name, _, rest in (line.partition(":") for line in lines)}


def _is_confined(pid: int, uid: int) -> None:
    """Each thread has that user, no capability, no new privileges and a filter."""
    tasks = os.listdir(f"/proc/{pid}/task")
    assert len(tasks) > 2
    for task in tasks:
        status = _status(pid, task)
        if status["Name"].startswith(("vhost-", "kvm-")):
            continue  # the kernel's own workers, which execute none of the process's code
        assert status["Uid"].split() == [str(uid)] * 4
        assert {status[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@ONE_BACKEND
def test_a_vm_that_root_started_has_no_power_left(bench: Bench, guest: Guest) -> None:
    pid = guest.vm.pid
    nobody = pwd.getpwnam("nobody")
    _is_confined(pid, nobody.pw_uid)
    assert _status(pid, str(pid))["Groups"] == ""
    opened = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if int(fd.name) > 2]
    assert [path for path in opened if not _ITS_OWN.fullmatch(path)] == []
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max realtime priority +1 +1 ", limits)
    guest.agent.ping()


@ONE_BACKEND
@pytest.mark.parametrize(
    "uri", ["file:/var/tmp/godwit-outside", "unix:/root/godwit-outside"], ids=["file", "unix"]
)
def test_what_nobody_named_is_refused_with_the_remedy(bench: Bench, guest: Guest, uri: str) -> None:
    vm = guest.vm
    if uri.startswith("file:"):
        vm.start_migration(uri)
        info = vm.wait_migration()
        assert info["status"] == "failed"
        assert "--allow-path" in info["error-desc"]
        assert not list(Path("/var/tmp").glob("*godwit-outside*"))
    else:
        target = bench.target(guest)
        with pytest.raises(Exception, match="--allow-path"):
            target.qmp.execute("migrate-incoming", {"uri": uri})
        bench.retire(target)
    guest.agent.ping()


def test_without_a_sandbox_it_is_said_loudly(bench: Bench) -> None:
    vm = bench.run(bench.net.b, "--incoming", "defer", "--no-sandbox")
    vm.wait_console("godwit: the sandbox is off (--no-sandbox)", 60)
    assert vm.status() == "inmigrate"
    assert _status(vm.pid, str(vm.pid))["Seccomp"] == "0"
    vm.quit()


# --- an ordinary user -----------------------------------------------------------------------------
@pytest.fixture
def devices() -> Iterator[None]:
    """Access to the devices, as the group 'kvm' or an ACL would give it."""
    paths = [Path("/dev/kvm"), Path("/dev/vhost-net"), Path("/dev/net/tun")]
    before = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o666)
    yield
    for path, mode in zip(paths, before, strict=True):
        path.chmod(mode)


def _as_user(netns: str) -> Callable[[], None]:
    enter = entering(netns)

    def become() -> None:
        enter()
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)

    return become


def _tap(host: Host, name: str) -> None:
    ip = ["ip", "-n", host.netns]
    for words in (
        f"tuntap add {name} mode tap vnet_hdr user {USER}",
        f"link set {name} master {host.bridge} up",
    ):
        subprocess.run([*ip, *words.split()], check=True)


def _reachable(path: Path) -> bool:
    return all(folder.stat().st_mode & 1 for folder in path.resolve().parents)


@pytest.mark.skipif(not _reachable(Path(__file__)), reason="this checkout is in a private folder")
@pytest.mark.usefixtures("devices")
def test_an_ordinary_user_runs_and_migrates_a_guest(bench: Bench) -> None:
    bench.drop_guest()
    net = bench.net
    image = kernels.cached("cloud-6.12")
    assert image is not None
    with vm_folder("/run") as folder:
        os.chown(folder, USER, USER)
        kernel = str(shutil.copy(image.vmlinuz, folder))
        initrd = str(shutil.copy(guest_image.build(image), folder))
        shape = ["--memory", "128M", "--cpus", "2", "--nic", f"tap=mine,mac={MAC}"]
        boot = ["--kernel", kernel, "--initrd", initrd, "--append", guest_image.CMDLINE]
        for host in (net.a, net.b):
            _tap(host, "mine")
        uri = f"unix:{folder}/move"
        target = Vm("b", folder, [*shape, "--incoming", uri], preexec=_as_user(net.b.netns))
        source = Vm("a", folder, [*shape, *boot], preexec=_as_user(net.a.netns))
        with target, source, Agent("10.0.0.2", net.client.netns) as agent:
            source.wait_console(guest_image.READY, 120)
            _is_confined(source.pid, USER)
            agent.ping(60)
            target.qmp.execute("query-status")
            info = source.migrate(uri)
            assert info["status"] == "completed"
            _is_confined(target.pid, USER)
            agent.ping(60)
            assert target.quit() == source.quit() == 0
        for host in (net.a, net.b):
            subprocess.run(["ip", "-n", host.netns, "link", "del", "mine"], check=True)
