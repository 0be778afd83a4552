"""The sandbox of ``godwit run``: what of the host is left to the process once a guest runs.

In two steps. Before the first thread, the files: nothing but what the configuration names
(Landlock). Once everything is open, and before the guest's first exit is served: another user
instead of root, no descriptors but the VM's own, few system calls (seccomp). docs/security.md has
the reasons.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from godwit.errors import ConfigError, HostError
from godwit.host.sandbox import landlock, privileges
from godwit.host.sandbox.landlock import DEVICE, IMAGE, READ, SOCKETS, WORK, Rule
from godwit.spec.back_ends import ImageFile, VhostUserConfig
from godwit.spec.config import DeviceConfig, DiskConfig

#: Read by the C library: names, time zone, what a program loads.
_ETC = ("localtime", "ld.so.cache", "ssl/openssl.cnf")
#: Migrations that find a socket with a large buffer: of one guest there is hardly a second.
_MIGRATIONS = 4
#: What the C library reads to find a host by name, and where the resolver's file is made anew.
NAMES = (
    *("/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"),
    *("/etc/services", "/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf"),
)
#: What is in the folder of certificates: see migration/wire/tls.py.
TLS_FILES = ("ca.pem", "cert.pem", "key.pem")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")


class Sandbox:
    """A sandbox as described by the command line and its devices, off with ``--no-sandbox``.

    Raises:
        ConfigError: a user or path of the command line is none.
    """

    def __init__(self, arguments: argparse.Namespace, devices: Sequence[DeviceConfig]) -> None:
        self._arguments = arguments
        self._devices = devices
        self._on = arguments.sandbox != "off"
        self._warnings: list[str] = []
        self._user: tuple[int, int] | None = None
        # First of all: what this process opens itself is not inherited.
        self._inherited = privileges.inherited() if self._on else {}
        for path in arguments.allow_path:
            if not os.path.isdir(path):
                raise ConfigError(f"--allow-path {path!r}: there is no such folder; make it first")
        if not self._on:
            self._warnings.append(
                "the sandbox is off (--no-sandbox): a guest that breaks out of the VM has "
                + ("all of root's power over this host" if os.geteuid() == 0 else "your rights")
            )
        elif os.geteuid() == 0:
            self._user = privileges.find_user(arguments.user or "nobody")
        elif arguments.user is not None:
            raise ConfigError("--user needs root; without it the VM runs as you in each case")

    def enter(self) -> None:
        """Leave the process few files, before its first thread.

        Raises:
            HostError: the kernel refuses.
        """
        if not self._on:
            return
        self._make_place_for_sockets()
        privileges.no_new_privileges()
        if not landlock.version():
            self._warnings.append(
                "this kernel has no Landlock: the VM can open what its user can "
                "(boot with lsm=landlock,... to have it)"
            )
            return
        try:
            landlock.restrict(self._rules())
        except OSError as error:
            raise HostError(
                f"Landlock: {error.strerror}; --no-sandbox runs without any sandbox"
            ) from error

    def close_door(self, log: Callable[[str], None]) -> None:
        """Give up user, descriptors and system calls, with everything open.

        Raises:
            HostError: the kernel refuses.
        """
        for text in self._warnings:
            log(text)
        if not self._on:
            return
        sys.dont_write_bytecode = True  # of what is imported later: this process makes no files
        # Before the user changes.
        from godwit.host import unixsocket
        from godwit.host.sandbox import entered, keep_pagemap, seccomp

        if self._user is not None:
            keep_pagemap()
            unixsocket.reserve(_MIGRATIONS)
            if not all(map(_for_all_to_read, _modules())):
                _load_what_comes_later()
        privileges.close_inherited(self._inherited, self._named_descriptors())
        if self._user is not None:
            self._give_sockets(*self._user)
            privileges.become(*self._user)
        entered()
        logs = self._arguments.sandbox == "log"
        try:
            seccomp.install(
                seccomp.program(os.getpid(), seccomp.LOG if logs else seccomp.KILL), log=logs
            )
        except OSError as error:
            raise HostError(
                f"seccomp: {error.strerror}; --no-sandbox runs without any sandbox"
            ) from error

    # --- inside -----------------------------------------------------------------------------------
    def _rules(self) -> Iterator[Rule]:
        """Yield what the configuration names, and what Python and the C library read."""
        given = self._arguments
        etc = (f"/etc/{name}" for name in _ETC)
        for path in (*LIBRARIES, *_python(), *etc, *NAMES, "/proc"):
            yield Rule(path, READ)
        for device in ("/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/null"):
            yield Rule(device, DEVICE)
        cpu = (given.cpu or "").partition(",")[0]  # a file, or a name, which is none
        if any(option == "--vsock" for option, _ in given.devices):
            yield Rule("/dev/vhost-vsock", DEVICE)
        # The files themselves, which may be links to elsewhere.
        tls = [os.path.join(given.tls, name) for name in TLS_FILES] if given.tls else []
        for path in (given.kernel, given.initrd, given.migration_secret, cpu, *tls):
            if path:
                yield Rule(path, READ)
        for disk in (config for config in self._devices if isinstance(config, DiskConfig)):
            yield Rule(disk.path, READ if disk.readonly else IMAGE)
        for served in (one for one in self._devices if isinstance(one, VhostUserConfig)):
            if isinstance(served.serves, ImageFile) and not served.serves.server:
                yield Rule(served.serves.path, READ)
        kind, _, path = (given.incoming or "").partition(":")
        if kind == "file":
            yield Rule(path, READ)
        for socket in self._sockets():
            yield Rule(os.path.dirname(os.path.abspath(socket)), SOCKETS)
        for folder in given.allow_path:
            yield Rule(folder, WORK)

    def _sockets(self) -> list[str]:
        """Return the paths of the sockets that the command line names."""
        kind, _, path = (self._arguments.incoming or "").partition(":")
        named = (self._arguments.qmp, path if kind == "unix" else None)
        return [path for path in named if path]

    def _make_place_for_sockets(self) -> None:
        """Remove what an exited process left behind, while files can be removed."""
        left = [path for path in self._sockets() if os.path.lexists(path)]
        if left:
            from godwit.host import unixsocket

            for path in left:
                unixsocket.remove_stale(path, "QMP" if path == self._arguments.qmp else "migration")

    def _give_sockets(self, uid: int, gid: int) -> None:
        """Give the user the socket where a guest is awaited: sources run as that user, too."""
        kind, _, path = (self._arguments.incoming or "").partition(":")
        if kind == "unix":
            with suppress(OSError):
                os.chown(path, uid, gid, follow_symlinks=False)

    def _named_descriptors(self) -> list[int]:
        """Return the descriptors that the command line names, as /dev/fd/63."""
        named = (self._arguments.kernel, self._arguments.initrd)
        ends = (os.path.split(path) for path in named if path is not None)
        return [
            int(name)
            for folder, name in ends
            if folder in ("/dev/fd", "/proc/self/fd") and name.isdecimal()
        ]


def _python() -> set[str]:
    """Return the folders from which Python loads modules, but not the one where it was started."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sites = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    linked = {os.path.join(path, "msgspec") for path in sites}  # perhaps a link to elsewhere
    own = os.path.join(sys.base_prefix, "lib")  # libraries of a Python that is not the system's
    return {os.path.dirname(os.__file__), own, package, *sites, *linked, *_editable(sites)}


def _editable(sites: set[str]) -> Iterator[str]:
    """Yield where the site's folders point at: sys.path has it, from their .pth files."""
    here = os.getcwd()
    for path in sys.path:
        if path and path not in sites and os.path.isdir(path) and path != here:
            yield path


def _modules() -> Iterator[str]:
    """Yield a file of each folder from which modules are loaded."""
    yield os.__file__
    yield os.path.abspath(__file__)
    import msgspec

    yield os.path.realpath(msgspec.__file__)


def _for_all_to_read(path: str) -> bool:
    """Return whether any user can read a file and those beside it."""
    if not os.stat(path).st_mode & 0o004:
        return False
    while (parent := os.path.dirname(path)) != path:
        path = parent
        if not os.stat(path).st_mode & 0o001:
            return False
    return True


def _load_what_comes_later() -> None:
    """Import what is otherwise imported when needed: the user cannot read the files.

    Elsewhere that would only cost a guest the time for it, before its first exit is served.
    """
    import encodings.ascii
    import encodings.utf_16_be
    import traceback

    from godwit.announce import verify
    from godwit.host import pagemap
    from godwit.host.net import sockets
    from godwit.hw.cpu import msrs
    from godwit.migration import destination, guest, source
    from godwit.migration.snapshot import compression, restorer, saver
    from godwit.migration.wire import acceptor
    from godwit.qmp import commands, schema

    with suppress(ConfigError):  # there need be no zstd
        compression.compressor()
    del acceptor, commands, destination, encodings, guest, msrs, restorer, saver, schema, sockets
    del pagemap, source, traceback, verify
