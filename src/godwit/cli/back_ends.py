"""The programs that serve devices of a VM, started with it: virtiofsd, qemu-storage-daemon.

Programs start before the sandbox is entered, inside which nothing is executed. Each listens at a
socket without a name, which is connected already, so nobody else reaches the program.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from godwit.errors import ConfigError, GodwitError
from godwit.host.child import Child, show_read_only
from godwit.host.loop import Loop
from godwit.host.sandbox import landlock, privileges
from godwit.host.sandbox.landlock import DEVICE, IMAGE, READ, WORK, Rule
from godwit.spec.back_ends import KEY, MAX_QUEUES, ImageFile, Share, VhostUserConfig
from godwit.spec.config import DeviceConfig

from .sandbox import LIBRARIES, NAMES

#: Where virtiofsd is: of Debian 13 and others (written in Rust), and of Debian 12 (in C).
_VIRTIOFSD, _VIRTIOFSD_IN_C = "/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"
_STORAGE = "/usr/bin/qemu-storage-daemon"
_QUIT = b'{"execute": "qmp_capabilities"}{"execute": "quit"}'
#: How long a program that fails may take to write why, and one that ends to end, seconds.
_LAST_WORDS_S, _END_S = 1.0, 10.0


class Program(NamedTuple):
    """A program behind one device."""

    name: str
    child: Child
    #: QMP of the program, where it does not end with its connection.
    control: socket.socket | None = None
    #: Words of its messages that mean nothing to the operator.
    noise: Sequence[str] = ()


class BackEnds:
    """The programs behind devices of one VM.

    Attributes:
        devices: the configurations, with their connections.

    Unless ``confine`` is off, a program gets no other file than its image, if the image names none.

    Raises:
        ConfigError: a program is not installed, or what is to be served is not there.
    """

    def __init__(self, devices: Sequence[DeviceConfig], confine: bool = True) -> None:
        self._programs: dict[str, Program] = {}
        self._confine = confine
        self.devices = tuple(map(self._started, devices))

    def _started(self, config: DeviceConfig) -> DeviceConfig:
        if not isinstance(config, VhostUserConfig) or config.serves is None:
            return config
        listening, connection = _connected()
        with listening:
            if isinstance(config.serves, Share):
                program = _share(config, listening.fileno())
            else:
                program = _image(config, listening.fileno(), self._confine)
        self._programs[config.id] = program
        control = -1
        if program.control is not None and getattr(config.serves, "size", None) is not None:
            control = os.dup(program.control.fileno())
        return config._replace(connection=connection.detach(), control=control)

    def explained(self, error: GodwitError) -> GodwitError:
        """Return an error in the words of an ended program, or the error itself."""
        for device, program in self._programs.items():
            words = program.child.last_words(_LAST_WORDS_S)
            if words is not None:
                for noise in program.noise:
                    words = words.replace(noise, "")
                return ConfigError(f"device '{device}': {words or program.name + ' ended'}")
        return error

    def watch(self, loop: Loop, report: Callable[[str, str], None]) -> None:
        """Have what the programs write reported, as (device, text)."""
        for device, program in self._programs.items():
            loop.watch(
                program.child.messages, partial(_pass_on, program, loop, partial(report, device))
            )

    def close(self) -> None:
        """End the programs in good order, with their devices closed, and wait."""
        for program in self._programs.values():
            if program.control is not None:
                with suppress(OSError):  # it may have ended
                    program.control.sendall(_QUIT)
        for program in self._programs.values():
            program.child.wait(_END_S)
            program.child.close()
            if program.control is not None:
                program.control.close()
        self._programs.clear()


def _pass_on(program: Program, loop: Loop, report: Callable[[str], None]) -> None:
    text = program.child.read()
    if text is None:
        loop.unwatch(program.child.messages)
        report(f"{program.name} has ended")
        return
    for line in text.decode(errors="replace").splitlines():
        if line.strip():
            report(f"{program.name}: {line.strip()}")


def _connected() -> tuple[socket.socket, socket.socket]:
    """Return a listening socket, and a connection there, which is to be accepted."""
    with tempfile.TemporaryDirectory(prefix="godwit-") as folder:
        path = os.path.join(folder, "socket")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(path)
            listening.listen(1)
            connection.connect(path)
        except BaseException:
            listening.close()
            connection.close()
            raise
    return listening, connection


# --- virtiofsd ------------------------------------------------------------------------------------
def _share(config: VhostUserConfig, fd: int) -> Program:
    share = config.serves
    assert isinstance(share, Share)
    if not os.path.isdir(share.path):
        raise ConfigError(f"--share path={share.path}: there is no such folder; make it first")
    if os.geteuid() != 0 and (share.readonly or not os.access(_VIRTIOFSD, os.X_OK)):
        raise ConfigError(
            f"--share path={share.path}: virtiofsd needs root to confine itself"
            f"{', and to read only' if share.readonly else ''}; start the VM as root, which gives "
            "up all rights of its own"
        )
    return Program("virtiofsd", Child(list(_virtiofsd(share, fd)), [fd], _prepare(share)))


def _virtiofsd(share: Share, fd: int) -> Iterator[str]:
    """Yield the command line, in the words of the one or the other virtiofsd."""
    if os.access(_VIRTIOFSD, os.X_OK):
        yield from (_VIRTIOFSD, "--log-level=warn", f"--fd={fd}", f"--shared-dir={share.path}")
    elif os.access(_VIRTIOFSD_IN_C, os.X_OK):
        quoted = share.path.replace("\\", "\\\\").replace(",", "\\,")
        yield from (_VIRTIOFSD_IN_C, "-f", f"--fd={fd}", "-o", f"log_level=warn,source={quoted}")
    else:
        raise ConfigError(
            f"--share path={share.path}: virtiofsd is not installed; apt-get install virtiofsd "
            "(Debian 12: qemu-system-common)"
        )


def _prepare(share: Share) -> Callable[[], None]:
    # The older of both programs has no such option.
    return (lambda: show_read_only(share.path)) if share.readonly else lambda: None


# --- qemu-storage-daemon --------------------------------------------------------------------------
def _image(config: VhostUserConfig, fd: int, confine: bool) -> Program:
    image = config.serves
    assert isinstance(image, ImageFile)
    if not os.access(_STORAGE, os.X_OK):
        raise ConfigError(
            f"--disk path={image.path}: {'NBD' if image.server else image.format} needs "
            "qemu-storage-daemon, which is not installed; apt-get install qemu-system-common, or: "
            "qemu-img convert -O raw"
        )
    control, theirs = socket.socketpair()
    with theirs:
        export = (
            f"type=vhost-user-blk,id=disk,node-name=disk,addr.type=fd,addr.str={fd},"
            f"writable={_switch(not image.readonly)},num-queues={config.queues or MAX_QUEUES}"
        )
        secret = f"secret,id={KEY},file={_quoted(image.key)}" if image.key else ""
        words = [
            *(("--object", secret) if secret else ()),
            *(word for node in _nodes(image) for word in ("--blockdev", node)),
            *("--export", export, "--chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
            *("--monitor", "chardev=qmp"),
        ]
        prepare = partial(_confine, image) if confine and image.alone else lambda: None
        child = Child([_STORAGE, *words], [fd, theirs.fileno()], prepare)
    noise = [
        f"{_STORAGE}: ",
        "qemu-storage-daemon: ",
        *(f"--blockdev {n}: " for n in _nodes(image)),
        f"--object {secret}: ",
    ]
    return Program("qemu-storage-daemon", child, control, [*noise, f"--export {export}: "])


def _confine(image: ImageFile) -> None:
    """Leave this process, which is to be the program, the image and what programs load.

    To find an NBD server by name it reads what the C library does.

    Raises:
        OSError, HostError: the kernel refuses.
    """
    privileges.no_new_privileges()
    if landlock.version():
        given = (_STORAGE, *LIBRARIES, "/etc/ld.so.cache", "/proc", "/sys", "/dev/urandom")
        # It tries on /dev/null which locks there are, and would take weaker ones.
        read = [*given, *((image.key,) if image.key else ()), *(NAMES if image.server else ())]
        more = [Rule("/dev/null", DEVICE)]
        if not image.server:
            more.append(Rule(image.path, IMAGE | WORK))
        landlock.restrict([*(Rule(name, READ) for name in read), *more])


def _nodes(image: ImageFile) -> tuple[str, str]:
    """Return the block devices from file to disk.

    Where the disk's size is known, there is no file yet: see OpenedImage.
    """
    readonly = f"read-only={_switch(image.readonly)}"
    common = f"{readonly},discard={'unmap' if image.discard else 'ignore'}"
    common += f",cache.direct={_switch(image.direct)}"
    if image.size is not None:
        return (
            f"driver=null-co,node-name=nothing,size={image.size},read-zeroes=on,{readonly}",
            f"driver=raw,node-name=disk,file=nothing,{common}",
        )
    if image.server:
        server = ",".join(f"{name}={value.replace(',', ',,')}" for name, value in image.server)
        file = f"driver=nbd,node-name=file,{server},{common}"
    else:
        file = f"driver=file,node-name=file,filename={_quoted(image.path)},{common}"
    secret = f",key-secret={KEY}" if image.key else ""
    return file, f"driver={image.format},node-name=disk,file=file,{common}{secret}"


def _quoted(path: str) -> str:
    return os.path.abspath(path).replace(",", ",,")


def _switch(on: bool) -> str:
    return "on" if on else "off"
