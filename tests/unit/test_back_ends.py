"""Programs that serve devices: how they are started, what they write, how they end."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from godwit.cli import back_ends
from godwit.cli.back_ends import BackEnds
from godwit.cli.formats import with_formats
from godwit.errors import ConfigError, HostError
from godwit.host.child import Child
from godwit.host.loop import Loop
from godwit.spec.back_ends import MAX_QUEUES, ImageFile, Share, VhostUserConfig
from godwit.spec.config import DiskConfig, RngConfig, parse_devices

PATIENCE = 20.0


# --- a program ------------------------------------------------------------------------------------
def test_last_words() -> None:
    child = Child(["/bin/sh", "-c", "echo first; echo >&2 'it  failed '; exit 3"])
    assert child.last_words(PATIENCE) == "first. it  failed"
    child.close()
    child.close()


def test_a_program_that_runs_has_no_last_words() -> None:
    ours, theirs = os.pipe()
    script = f"print('here', flush=True); import os; os.read({ours}, 1)"
    child = Child([sys.executable, "-c", script], [ours])
    os.close(ours)
    assert child.last_words(0.05) is None
    assert not child.wait(0.0)
    os.close(theirs)
    assert child.wait(PATIENCE)
    assert child.read() is None
    child.close()


def test_a_program_that_cannot_start() -> None:
    child = Child(["/no/such/program"])
    assert "No such file or directory" in (child.last_words(PATIENCE) or "")
    child.close()

    def refuse() -> None:
        raise OSError("not for you")

    child = Child(["/bin/true"], prepare=refuse)
    assert child.last_words(PATIENCE) == "/bin/true: not for you"
    child.close()


def test_a_program_ends_with_its_parent() -> None:
    script = (
        "import os; from godwit.host.child import Child\n"
        "child = Child(['/bin/sh', '-c', 'echo $$; exec sleep 1000'])\n"
        "while not (text := child.read()): pass\n"
        "print(text.decode().strip(), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    program = int(done.stdout)
    _until(lambda: not _runs(program))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        os.sched_yield()


# --- for devices ----------------------------------------------------------------------------------
def _program(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def virtiofsd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of virtiofsd, whose text is to be written."""
    path = tmp_path / "virtiofsd"
    monkeypatch.setattr(back_ends, "_VIRTIOFSD", "/none")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(back_ends, "_VIRTIOFSD_IN_C", str(path))
    return path


def test_a_program_gets_its_socket_and_folder(virtiofsd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a, b"
    folder.mkdir()
    _program(
        virtiofsd,
        "import os, sys\nprint(*sys.argv[1:])\n"
        "print(os.readlink('/proc/self/fd/' + sys.argv[2][5:]))",
    )
    given = parse_devices([("--rng", "id=rng0"), ("--share", f"path={tmp_path}/a,, b,tag=x")])
    programs = BackEnds(given)
    assert programs.devices[0] == RngConfig("rng0")
    config = programs.devices[1]
    assert isinstance(config, VhostUserConfig)
    connection = socket.socket(fileno=config.connection)
    assert stat.S_ISSOCK(os.fstat(connection.fileno()).st_mode)
    error = programs.explained(HostError("the back end is gone"))
    quoted = str(folder).replace(",", "\\,")
    assert f"-o log_level=warn,source={quoted}. socket:[" in str(error)
    assert str(error).startswith("device 'share0': -f --fd=")
    connection.close()
    programs.close()


def test_what_is_not_there_is_named(virtiofsd: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"path=/none: there is no such folder"):
        BackEnds(parse_devices([("--share", "path=/none,tag=x")]))
    with pytest.raises(ConfigError, match=r"apt-get install virtiofsd \(Debian 12: qemu-system-co"):
        BackEnds(parse_devices([("--share", f"path={tmp_path},tag=x")]))


def test_a_share_needs_root(
    virtiofsd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="virtiofsd needs root to confine itself; start the VM"):
        BackEnds(parse_devices([("--share", f"path={tmp_path},tag=x")]))


def test_an_error_without_an_ended_program_stays(virtiofsd: Path, tmp_path: Path) -> None:
    _program(virtiofsd, "import os; os.execv('/bin/sleep', ['sleep', '1000'])")
    programs = BackEnds(parse_devices([("--share", f"path={tmp_path},tag=x")]))
    error = HostError("no tap")
    try:
        assert programs.explained(error) is error
    finally:
        _end_sleep(programs)


def _end_sleep(programs: BackEnds) -> None:
    """End what no connection ends."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if Path(f"/proc/{pid}/comm").read_text() == "sleep\n":
                os.kill(int(pid), signal.SIGKILL)
    programs.close()


def test_what_a_program_writes_is_reported(virtiofsd: Path, tmp_path: Path) -> None:
    _program(virtiofsd, "print('one'); print(); print('two')")
    programs = BackEnds(parse_devices([("--share", f"path={tmp_path},tag=x")]))
    loop = Loop()
    found: list[tuple[str, str]] = []
    programs.watch(loop, lambda device, text: found.append((device, text)))
    deadline = time.monotonic() + PATIENCE
    while len(found) < 3:
        assert time.monotonic() < deadline
        loop.run_once(0.1)
    assert found == [
        ("share0", "virtiofsd: one"),
        ("share0", "virtiofsd: two"),
        ("share0", "virtiofsd has ended"),
    ]
    programs.close()
    loop.close()


def test_the_storage_daemon_is_ended_by_qmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    program = tmp_path / "storage"
    _program(
        program,
        "import os, sys\n"
        "fd = int(next(word for word in sys.argv if 'fd=' in word).rpartition('=')[2])\n"
        f"open({str(seen)!r}, 'w').write(os.read(fd, 20).decode() + ' '.join(sys.argv))",
    )
    monkeypatch.setattr(back_ends, "_STORAGE", str(program))
    image = ImageFile("/images/a,b.vmdk", "vmdk", readonly=True, direct=True, discard=True)
    config = VhostUserConfig("disk0", "vhost-user-blk", queues=3, serves=image)
    programs = BackEnds([config])
    programs.close()
    text = seen.read_text()
    assert text.startswith('{"execute": "qmp_cap')
    common = "read-only=on,discard=unmap,cache.direct=on"
    assert f"driver=file,node-name=file,filename=/images/a,,b.vmdk,{common}" in text
    assert f"driver=vmdk,node-name=disk,file=file,{common}" in text
    assert ",writable=off,num-queues=3" in text
    # The device takes one for each vCPU.
    BackEnds([config._replace(queues=None)]).close()
    assert f",writable=off,num-queues={MAX_QUEUES}" in seen.read_text()
    assert programs.devices[0]._replace(connection=-1) == config  # type: ignore[attr-defined]


def test_the_storage_daemon_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(back_ends, "_STORAGE", "/none")
    config = VhostUserConfig("d", "vhost-user-blk", serves=ImageFile("x", "vmdk"))
    with pytest.raises(ConfigError, match="vmdk needs qemu-storage-daemon"):
        BackEnds([config])


# --- formats --------------------------------------------------------------------------------------
def _qcow2(backing: int = 0, features: int = 0, version: int = 3, size: int = 1 << 30) -> bytes:
    head = b"QFI\xfb" + version.to_bytes(4, "big") + backing.to_bytes(8, "big")
    return (
        (head + bytes(8) + size.to_bytes(8, "big")).ljust(72, b"\0")
        + features.to_bytes(8, "big")
        + bytes(1000)
    )


@pytest.mark.parametrize(
    ("content", "raw"),
    [
        (bytes(4096), True),
        (b"", True),
        (b"QFI\xfb", True),
        (_qcow2(), False),
        (_qcow2(features=1), False),
        (_qcow2(version=2, features=4), False),
    ],
)
def test_a_format_is_found(tmp_path: Path, content: bytes, raw: bool) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    disk = DiskConfig("disk0", str(path), discard=True, cache="none", readonly=True)
    (found,) = with_formats([disk])
    if raw:
        assert found == disk
    else:
        image = ImageFile(str(path), "qcow2", True, True, True, 1 << 30, True)
        assert found == VhostUserConfig("disk0", "vhost-user-blk", serves=image)


@pytest.mark.parametrize("content", [bytes(4096), b"", _qcow2(size=0), _qcow2(size=1 << 61)])
def test_a_qcow2_image_has_its_size_in_the_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="there is no qcow2 image to be read"):
        with_formats([DiskConfig("disk0", str(path), format="qcow2")])


@pytest.mark.parametrize("content", [_qcow2(backing=512), _qcow2(features=4)])
def test_an_image_that_names_files_is_not_believed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    disk = DiskConfig("disk0", str(path))
    with pytest.raises(ConfigError, match="give format=qcow2 if it is yours"):
        with_formats([disk])
    assert with_formats([disk._replace(format="raw")])[0] == disk._replace(format="raw")
    (found,) = with_formats([disk._replace(format="qcow2")])
    assert isinstance(found, VhostUserConfig)


def test_a_format_that_is_given_counts() -> None:
    given = parse_devices([("--disk", "path=/none,format=vhdx,queues=2")])
    (found,) = with_formats(given)
    image = ImageFile("/none", "vhdx")
    assert found == VhostUserConfig("disk0", "vhost-user-blk", queues=2, serves=image)
    with pytest.raises(ConfigError, match="format=floppy"):
        parse_devices([("--disk", "path=/none,format=floppy")])


@pytest.mark.parametrize(
    ("path", "server"),
    [
        ("nbd://host", {"type": "inet", "host": "host", "port": "10809", "export": ""}),
        ("nbd://h:9/a/b", {"type": "inet", "host": "h", "port": "9", "export": "a/b"}),
        (
            "nbd://[fe80::1]/a%2cb",
            {"type": "inet", "host": "fe80::1", "port": "10809", "export": "a,b"},
        ),
        ("nbd+unix:///?socket=/run/n", {"type": "unix", "path": "/run/n", "export": ""}),
        ("nbd+unix:///x?socket=/run/n", {"type": "unix", "path": "/run/n", "export": "x"}),
        ("nbd+unix:///?socket=/a+b%20c", {"type": "unix", "path": "/a+b c", "export": ""}),
    ],
)
def test_an_nbd_server_is_named(path: str, server: dict[str, str]) -> None:
    (found,) = with_formats([DiskConfig("disk0", path)])
    assert isinstance(found, VhostUserConfig)
    image = found.serves
    assert isinstance(image, ImageFile)
    assert (image.format, image.size, image.alone) == ("raw", None, True)
    assert {name.removeprefix("server."): value for name, value in image.server} == server


@pytest.mark.parametrize(
    "path",
    [
        *("nbd:", "nbd://", "nbd://h:x/", "nbd://h:99999/", "nbd://[x/", "nbd+unix:///x"),
        *("nbd+unix://h/x?socket=/n", "nbd+tcp://h/", "nbd://h/x?socket=/n"),
        # What would be left out, and what would be another place.
        *("nbd://user@h/x", "nbd://user:pw@h/x", "nbd://h/x#y", "nbd://h:0/x", "nbd://h/x?"),
        *("nbd://h/a\tb", "nbd://h/a%00b", "nbd+unix:///x?socket=/n%00", "nbd://h/a%0ab"),
        *("nbd+unix:///x?socket=/n&tls-x=1", "nbd+unix:///x?socket=n", "nbd+unix:///x?other=/n"),
    ],
)
def test_an_address_of_no_nbd_server_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="write nbd://HOST:PORT/EXPORT"):
        with_formats([DiskConfig("disk0", path)])


def test_an_nbd_server_opens_images_itself() -> None:
    """What is in an image there could name files of this host."""
    for format in ("qcow2", "vmdk"):
        with pytest.raises(ConfigError, match=f"qemu-nbd -f {format}"):
            with_formats([DiskConfig("disk0", "nbd://h/x", format=format)])


def _luks(version: int = 1, first: int = 4, size: int = 8192) -> bytes:
    return (
        b"LUKS\xba\xbe" + version.to_bytes(2, "big") + bytes(96) + first.to_bytes(4, "big")
    ).ljust(size, b"\0")


def test_an_encrypted_image_has_a_passphrase(tmp_path: Path) -> None:
    path, key = tmp_path / "image", tmp_path / "key"
    path.write_bytes(_luks())
    key.write_text("x")
    disk = DiskConfig("disk0", str(path), format="luks", key=str(key))
    image = ImageFile(str(path), "luks", size=6144, alone=True, key=str(key))
    assert with_formats([disk]) == (VhostUserConfig("disk0", "vhost-user-blk", serves=image),)
    for change, says in (
        ({"key": ""}, "give key=FILE"),
        ({"key": "/none"}, "no such file"),
        ({"key": str(tmp_path)}, "no such file"),
        ({"format": None}, "key= is for encrypted images"),
        ({"format": "vmdk"}, "key= is for encrypted images"),
        ({"path": str(key)}, "no LUKS image"),
        ({"path": "/none"}, "no LUKS image"),
    ):
        with pytest.raises(ConfigError, match=says):
            with_formats([disk._replace(**change)])
    for content in (_luks(2), _luks(first=16), _luks(first=17), _luks(size=8200), b"LUKS\xba\xbe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="no LUKS image"):
            with_formats([disk])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    disk = DiskConfig("disk0", str(tmp_path / "pipe"))
    assert with_formats([disk]) == (disk,)


@pytest.mark.parametrize("key", ["serial=x", "on-error=stop", "queue-size=128", "queue-size=512"])
def test_keys_of_raw_images(key: str) -> None:
    given = parse_devices([("--disk", f"path=/x,format=vmdk,{key}")])
    with pytest.raises(ConfigError, match=f"{key.partition('=')[0]}= is for raw images"):
        with_formats(given)


def test_a_share_is_described() -> None:
    (config,) = parse_devices([("--share", "path=/srv,tag=data")])
    assert isinstance(config, VhostUserConfig)
    assert config.serves == Share("/srv")
