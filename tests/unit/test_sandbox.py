"""The sandbox: the filter of system calls, the files, the user. Each is judged by the kernel.

A child takes it on, does one thing, and its end is the verdict.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest

from godwit.cli.run import _open_console
from godwit.cli.sandbox import Sandbox
from godwit.errors import ConfigError
from godwit.host import bpf
from godwit.host.bpf import Instruction
from godwit.host.sandbox import landlock, privileges, seccomp
from godwit.host.sandbox.syscalls import ALLOWED, CHECKED, UNKNOWN
from godwit.hw.boot import BootFiles

X86_64 = 0xC000_003E
PID = 4242


def run(program: Sequence[Instruction], data: bytes) -> int:
    """The kernel's machine, as far as such a filter uses it."""
    a = at = 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == bpf.RET:
            return k
        if code == bpf.LD_W_ABS:
            a = int.from_bytes(data[k : k + 4], "little")
        elif code == bpf.AND:
            a &= k
        elif code == bpf.JA:
            at += k
        elif code == bpf.JEQ:
            at += yes if a == k else no
        elif code == bpf.JGE:
            at += yes if a >= k else no
        elif code == bpf.JSET:
            at += yes if a & k else no
        else:
            raise AssertionError(f"instruction {code:#x}")


def verdict(number: int, *arguments: int, architecture: int = X86_64) -> int:
    data = number.to_bytes(4, "little") + architecture.to_bytes(4, "little") + bytes(8)
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 0
        data += (value & (1 << 64) - 1).to_bytes(8, "little")
    return run(seccomp.program(PID), data)


def test_no_number_is_there_twice() -> None:
    numbers = [*ALLOWED.values(), *CHECKED.values(), *UNKNOWN.values()]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_allowed_is_allowed(name: str) -> None:
    assert verdict(ALLOWED[name], 1, 2, 3) == seccomp.ALLOW


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("execve", 59), ("execveat", 322), ("fork", 57), ("vfork", 58), ("ptrace", 101)),
        *(("process_vm_readv", 310), ("process_vm_writev", 311), ("kill", 62)),
        *(("mount", 165), ("unshare", 272), ("setns", 308), ("chroot", 161), ("pivot_root", 155)),
        *(("setuid", 105), ("setresuid", 117), ("capset", 126), ("bpf", 321), ("keyctl", 250)),
        *(("io_uring_setup", 425), ("userfaultfd", 323), ("perf_event_open", 298)),
        *(("init_module", 175), ("finit_module", 313), ("kexec_load", 246), ("reboot", 169)),
        *(("open_by_handle_at", 304), ("memfd_create", 319), ("symlink", 88), ("mknod", 133)),
        *(("chown", 92), ("fchown", 93), ("shmget", 29), ("pidfd_getfd", 438), ("iopl", 172)),
    ],
)
def test_what_is_not_needed_kills(name: str, number: int) -> None:
    assert name not in ALLOWED
    assert verdict(number) == seccomp.KILL


@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("ioctl", (5, 0xAE80), True),  # KVM_RUN
        ("ioctl", (5, 0x4008_AF30), True),  # VHOST_NET_SET_BACKEND
        ("ioctl", (5, 0x4004_54D0), True),  # TUNSETOFFLOAD
        ("ioctl", (0, 0x5402), True),  # TCSETS
        ("ioctl", (0, 0x5412), False),  # TIOCSTI: types at the operator's terminal
        ("ioctl", (0, 0x541C), False),  # TIOCLINUX
        ("ioctl", (5, 0x8914), False),  # SIOCSIFFLAGS
        ("ioctl", (5, 0x1_0000_AE80), True),  # the kernel looks at 32 bits as well
        ("ioctl", (0, 0x802C542A), True),  # TCGETS2
        ("mmap", (0, 4096, 3, 0x22), True),  # memory
        ("mmap", (0, 4096, 5, 0x2), True),  # a library's code
        ("mmap", (0, 4096, 7, 0x22), False),
        ("mmap", (0, 4096, 7, 0x2), False),
        ("mmap", (0, 4096, 5, 0x22), False),
        ("fcntl", (3, 1), True),
        ("fcntl", (3, 8, 1), False),  # F_SETOWN
        ("fcntl", (3, 10, 9), False),  # F_SETSIG
        ("fcntl", (3, 15, 0), False),  # F_SETOWN_EX
        ("sched_setscheduler", (0, 2), True),
        ("sched_setscheduler", (PID + 1, 0), False),
        ("sched_setparam", (PID + 1,), False),
        ("mprotect", (0x1000, 4096, 3), True),
        ("mprotect", (0x1000, 4096, 5), False),
        ("clone", (0x3D0F00,), True),  # a thread
        ("clone", (0x1200011,), False),  # a process
        ("clone", (0x3D0F00 | 0x1000_0000,), False),  # CLONE_NEWUSER
        ("tgkill", (PID, PID + 1, 34), True),
        ("tgkill", (PID + 1, PID + 1, 9), False),
        ("prctl", (15,), True),  # PR_SET_NAME
        ("prctl", (4, 1), False),  # PR_SET_DUMPABLE
        ("prlimit64", (0, 3, 0), True),
        ("prlimit64", (0, 3, 1 << 40), False),
        ("socket", (1, 1, 0), True),
        ("socket", (17, 3, 0), True),
        ("socket", (38, 5, 0), False),  # AF_ALG
        ("socket", (40, 1, 0), False),  # AF_VSOCK
    ],
)
def test_arguments_decide(name: str, arguments: tuple[int, ...], allowed: bool) -> None:
    assert verdict(CHECKED[name], *arguments) == (seccomp.ALLOW if allowed else seccomp.KILL)


def test_newer_ways_are_unknown_and_other_numberings_kill() -> None:
    for number in (*UNKNOWN.values(), 452, 500, 100_000):
        assert verdict(number) == seccomp.ERRNO | errno.ENOSYS
    assert verdict(ALLOWED["read"], architecture=0x4000_0003) == seccomp.KILL  # i386
    assert verdict(0x4000_0000) == seccomp.KILL  # x32


# --- by the kernel --------------------------------------------------------------------------------
_PREPARE = """
import ctypes, os, sys, threading, socket
from godwit.host.sandbox import landlock, privileges, seccomp
libc = ctypes.CDLL(None, use_errno=True)
privileges.no_new_privileges()
"""
_FILTER = _PREPARE + "seccomp.install(seccomp.program(os.getpid()))\n"


def _child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "call",
    [
        "os.execv('/bin/true', ['true'])",
        "os.fork()",
        "os.kill(os.getppid(), 0)",
        "libc.ptrace(0, 0, 0, 0)",
        "libc.unshare(0x10000000)",
        "os.setuid(0)",
        "libc.syscall(319, b'x', 0)",
        "socket.socket(38, socket.SOCK_SEQPACKET)",
        "libc.mprotect(0, 4096, 7)",
        "import mmap; mmap.mmap(-1, 4096, prot=7)",
        "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    ],
)
def test_a_forbidden_call_kills(call: str) -> None:
    done = _child(_FILTER + call + "\nprint('alive')")
    assert done.returncode == -signal.SIGSYS, done
    assert done.stdout == ""


def test_a_forbidden_call_in_a_thread_that_was_there_before_kills() -> None:
    code = _PREPARE + (
        "go = threading.Event()\n"
        "thread = threading.Thread(target=lambda: (go.wait(), os.fork()))\n"
        "thread.start()\n"
        "seccomp.install(seccomp.program(os.getpid()))\n"
        "go.set(); thread.join(); print('alive')\n"
    )
    assert _child(code).returncode == -signal.SIGSYS


def test_what_a_vm_does_goes_on(tmp_path: Path) -> None:
    code = _FILTER + (
        "thread = threading.Thread(target=print, args=('a thread',)); thread.start()\n"
        "thread.join()\n"
        "a, b = socket.socketpair(); a.send(b'x'); b.recv(1)\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[1])); import fresh\n"  # its byte code is made
        "open(sys.argv[1], 'w').write('x'); os.rename(sys.argv[1], sys.argv[1] + '2')\n"
        "os.eventfd(0); os.sched_getscheduler(0); os.urandom(3)\n"
        "print('alive')\n"
    )
    (tmp_path / "fresh.py").write_text("x = 1\n")
    done = _child(code, str(tmp_path / "file"))
    assert done.returncode == 0, done
    assert done.stdout == "a thread\nalive\n"


needs_landlock = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
_FILES = _PREPARE + (
    "rules = [landlock.Rule(p, landlock.READ) for p in "
    "('/lib', '/lib64', '/usr', sys.prefix, '/proc')]\n"
    "rules.append(landlock.Rule(sys.argv[1], landlock.WORK))\n"
    "landlock.restrict(rules)\n"
)


@needs_landlock
def test_files_that_nobody_named_are_out_of_reach(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "link").symlink_to(outside)
    code = _FILES + (
        "def refused(path, mode='r'):\n"
        "    try: open(path, mode)\n"
        "    except PermissionError: return True\n"
        "    return False\n"
        "inside = sys.argv[1]\n"
        "open(inside + '/a', 'w').write('x'); os.rename(inside + '/a', inside + '/b')\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(inside + '/s'); os.unlink(inside + '/s')\n"
        "print(open(inside + '/b').read(), refused(inside + '/../outside'),\n"
        "      refused(inside + '/link'), refused('/etc/passwd'),\n"
        "      refused(inside + '/../new', 'w'), refused('/usr/new', 'w'))\n"
        "done = []\n"
        "thread = threading.Thread(target=lambda: done.append(refused('/etc/passwd')))\n"
        "thread.start(); thread.join(); print(done)\n"
    )
    done = _child(code, str(inside))
    assert done.stdout == "x True True True True True\n[True]\n", done


@needs_landlock
def test_paths_that_are_absent_or_nonsense_are_left_out(tmp_path: Path) -> None:
    code = _PREPARE + (
        "landlock.restrict([landlock.Rule(p, landlock.WORK) for p in ('/absent/x', 'a\\0b', '')])\n"
        "try: open('/etc/passwd')\n"
        "except PermissionError: print('refused')\n"
    )
    assert _child(code).stdout == "refused\n"


# --- who ------------------------------------------------------------------------------------------
def test_users_by_name_and_number() -> None:
    uid, gid = privileges.find_user("nobody")
    assert uid > 0
    assert privileges.find_user(str(uid)) == (uid, gid)
    assert privileges.find_user("61234") == (61234, 61234)


@pytest.mark.parametrize(
    "name", ["root", "0", "no such user", "", "-1", "9" * 30, "\udcff", "a\0b"]
)
def test_users_that_are_none_or_root(name: str) -> None:
    with pytest.raises(ConfigError, match="--user"):
        privileges.find_user(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another")
def test_root_is_given_up_in_all_threads_and_for_good() -> None:
    code = _PREPARE + (
        "go, seen = threading.Event(), []\n"
        "def look():\n"
        "    go.wait()\n"
        "    status = open('/proc/thread-self/status').read().split('\\n')\n"
        "    seen.extend(line for line in status if line[:4] in ('Uid:', 'CapE', 'CapP', 'NoNe'))\n"
        "thread = threading.Thread(target=look); thread.start()\n"
        "privileges.become(61234, 61234)\n"
        "go.set(); thread.join()\n"
        "print(*(line.split(':')[0] + '=' + line.split()[1] for line in seen))\n"
        "import resource\n"
        "if resource.getrlimit(resource.RLIMIT_RTPRIO)[1] == 1:\n"  # a container may refuse it
        "    os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))\n"
        "for back in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):\n"
        "    try: back()\n"
        "    except PermissionError: print('refused')\n"
    )
    done = _child(code)
    zero = "0" * 16
    first, *others = done.stdout.splitlines()
    assert first == f"Uid=61234 CapPrm={zero} CapEff={zero} NoNewPrivs=1", done
    assert others == ["refused", "refused", "refused"], done


def test_inherited_descriptors_are_closed_unless_named_or_others(tmp_path: Path) -> None:
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(3)]
    before = {fd: identity for fd, identity in privileges.inherited().items() if fd in fds}
    assert set(before) == set(fds)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, fds[1])  # another file by now
    privileges.close_inherited(before, keep=[fds[2]])
    for fd, is_open in zip(fds, (False, True, True), strict=True):
        if is_open:
            os.close(fd)
        else:
            with pytest.raises(OSError):
                os.fstat(fd)
    os.close(null)


def test_the_consoles_descriptor_is_not_inherited(tmp_path: Path) -> None:
    """The guest's output went to whatever got its number next."""
    sandbox = Sandbox(_arguments(), ())
    fd = _open_console(f"file:{tmp_path / 'console'}")
    assert fd not in sandbox._inherited
    os.close(fd)


@needs_landlock
def test_a_kernel_by_a_descriptor_has_no_rule_and_is_reached() -> None:
    code = _PREPARE + (
        "read, write = os.pipe(); os.write(write, b'kernel')\n"
        "landlock.restrict([landlock.Rule(f'/dev/fd/{read}', landlock.READ)])\n"
        "print(os.read(read, 6))\n"
    )
    assert _child(code).stdout == "b'kernel'\n"


_LATER = """
import sys
import godwit.cli.run
from godwit.cli import fast_import, sandbox
from godwit.vm.limited_reports import LimitedReports
from godwit.vm.vm import Vmm
from godwit.qmp.server import Server
{more}
sandbox._load_what_comes_later()
before = set(sys.modules)
sys.path[:0] = ["tests/unit", "."]
import pathlib, socket, tempfile
from migration_bench import Migration
from godwit.migration.wire.address import Credentials
from godwit.qmp import commands, protocol
brought = set(sys.modules)
late = set()
class Finder:
    def find_spec(self, name, path=None, target=None):
        late.add(name)
migration = Migration(pathlib.Path(tempfile.mkdtemp()))
sys.meta_path.insert(0, Finder())
with socket.create_server(("127.0.0.1", 0)) as free:
    uri = f"tcp:127.0.0.1:{{free.getsockname()[1]}}"
for side in (migration.here, migration.there):
    side.migrations._credentials = Credentials(None, {secret})
migration.there.migrations.await_guest(uri, False)
migration.here.migrations.migrate(uri, False)
migration.finish()
assert migration.running == (False, True)
protocol.encode({{"x": chr(0xE9) + chr(0xDC80)}})
print(sorted(name for name in late if name.startswith(("encodings", "godwit", "hashlib", "_h"))))
"""


@pytest.mark.parametrize("secret", [False, True])
def test_nothing_of_a_migrations_is_imported_late(secret: bool) -> None:
    """The user that the VM becomes may not read the files."""
    more = "from godwit.migration.wire import secret" if secret else ""
    done = _child(_LATER.format(more=more, secret=bytes(16) if secret else None))
    assert done.stdout == "[]\n", done


def test_a_destinations_kernel_is_open_before_the_user_changes(tmp_path: Path) -> None:
    files = BootFiles()
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"first")
    files.keep(str(kernel))
    kernel.unlink()
    fd = files.open(str(kernel), os.O_RDONLY)
    assert os.pread(fd, 10, 0) == b"first"
    os.close(fd)
    files.close()


def _arguments(**given: object) -> Namespace:
    usual = {"sandbox": "on", "user": None, "allow_path": [], "incoming": None}
    return Namespace(**{**usual, **given})


def test_a_folder_to_be_allowed_has_to_be_there() -> None:
    with pytest.raises(ConfigError, match=r"--allow-path '/absent'.*make it first"):
        Sandbox(_arguments(allow_path=["/absent"]), ())


def test_without_a_sandbox_it_is_said_so() -> None:
    said: list[str] = []
    sandbox = Sandbox(_arguments(sandbox="off"), ())
    sandbox.enter()
    sandbox.close_door(said.append)
    assert "the sandbox is off" in said[0]
