"""OVN on Open vSwitch: two chassis, and a peer on one of them, on one logical switch::

    guest --tap0-- [br-int] A ==Geneve== B [br-int] --tap0-- guest
           peer --vif0--/

A runs OVN's central daemons, too. Daemons of one chassis reach each other, and the central ones, by
sockets in a folder of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..network import Client, Host, batch
from .parts import STEP_S, Daemon, ask, namespaces, tap, wait

PEER = ("10.0.0.1", "fd00::1")
_PEER_MAC = "02:00:00:00:0a:01"
_GUEST = ("10.0.0.2", "fd00::2")
#: The logical ports, which are also the chassis' ``iface-id``.
_GUEST_PORT, _PEER_PORT = "guest", "peer"
#: Addresses of the tunnels' ends (TEST-NET-2, RFC 5737).
_A, _B = "198.51.100.1", "198.51.100.2"
_OVS_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
_OVN_SCHEMAS = "/usr/share/ovn"


@dataclass(frozen=True)
class Chassis:
    """A chassis: a namespace with an Open vSwitch and an ovn-controller of its own."""

    name: str
    netns: str
    address: str
    folder: Path

    @property
    def socket(self) -> str:
        """The database of its Open vSwitch."""
        return f"unix:{self.folder}/db.sock"

    def vsctl(self, *words: str) -> str:
        """Run ``ovs-vsctl``, and return the output."""
        return ask(self.netns, ["ovs-vsctl", f"--db={self.socket}", *words])

    def flows(self, match: str) -> str:
        """Return the OpenFlow flows of the integration bridge that match."""
        return ask(
            self.netns, ["ovs-ofctl", "dump-flows", f"unix:{self.folder}/br-int.mgmt", match]
        )


@dataclass(frozen=True)
class Ovn:
    """OVN while it is there."""

    a: Host
    b: Host
    peer: Client
    chassis: tuple[Chassis, Chassis]
    database: str
    """The socket of the northbound and southbound databases."""

    def northbound(self, *words: str) -> str:
        """Run ``ovn-nbctl`` until all chassis have done what follows, and return the output."""
        argv = ["ovn-nbctl", f"--db={self.database}", f"--timeout={STEP_S:.0f}", "--wait=hv"]
        return ask(None, [*argv, *words])

    def binding(self, column: str) -> str:
        """Return a column of the guest's binding, with names for chassis, ready to compare."""
        argv = ["ovn-sbctl", f"--db={self.database}", "--bare"]
        if column in ("chassis", "additional_chassis"):
            found = ask(None, [*argv, "get", "Port_Binding", _GUEST_PORT, column]).strip("[]\n ")
            if not found:
                return ""
            return ask(None, [*argv, "get", "Chassis", found, "name"]).strip().strip('"')
        words = ["--if-exists", "get", "Port_Binding", _GUEST_PORT, column]
        return ask(None, [*argv, *words]).strip().strip('"')

    def bind(self, *chassis: str, **options: str) -> None:
        """Have OVN expect the guest on these chassis, and wait until all of them know.

        Raises:
            LabError: a chassis does not bind the guest's port.
        """
        words = [f"requested-chassis={','.join(chassis)}"]
        words += [f"{name.replace('_', '-')}={value}" for name, value in options.items()]
        self.northbound("lsp-set-options", _GUEST_PORT, *words)
        wait("the guest's port is bound", lambda: self.binding("chassis") == chassis[0])
        more = chassis[1] if chassis[1:] else ""
        wait("the guest's other port", lambda: self.binding("additional_chassis") == more)
        self.northbound("sync")

    def activated(self) -> str:
        """Return the additional chassis that the guest's RARP has opened."""
        return self.binding("options:additional-chassis-activated")


@contextmanager
def ovn(mac: str) -> Iterator[Ovn]:
    """Make OVN's network for the block, with a port on A for the guest with that MAC.

    Raises:
        LabError: a program or a kernel module is missing, or OVN does not come up.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="godwit-ovn-", dir="/run")))
        a, b, peer = stack.enter_context(namespaces("ovn-a", "ovn-b", "ovn-peer"))
        underlay = f"link add up0 mtu 1600 type veth peer name up0 mtu 1600 netns {b}"
        vif = f"link add vif0 type veth peer name net0 address {_PEER_MAC} netns {peer}"
        batch("ip", a, [underlay, vif, *_host(_A), "link set vif0 up"])
        batch("ip", b, _host(_B))
        peers = (f"{PEER[0]}/24 dev net0", f"{PEER[1]}/64 dev net0 nodad")
        batch("ip", peer, ["link set net0 up", *(f"address add {one}" for one in peers)])
        database = _central(stack, a, folder)
        chassis = (Chassis("a", a, _A, folder / "a"), Chassis("b", b, _B, folder / "b"))
        daemons = [daemon for one in chassis for daemon in _start(stack, one, database)]
        hosts = (Host(a, _A, bridge="br-int"), Host(b, _B, bridge="br-int"))
        found = Ovn(hosts[0], hosts[1], Client(peer), chassis, database)

        def registered() -> bool:
            for daemon in daemons:
                daemon.check()
            argv = ["ovn-sbctl", f"--db={database}", "--bare", "--columns=name", "list", "Chassis"]
            return set(ask(None, argv).split()) == {one.name for one in chassis}

        wait("OVN knows both chassis", registered)
        found.northbound(*_logical(mac))
        found.bind("a")
        yield found


def _host(address: str) -> list[str]:
    return [f"address add {address}/24 dev up0", "link set up0 up", *tap("tap0")]


def _logical(mac: str) -> list[str]:
    """Return the words for ``ovn-nbctl`` that make the logical switch and its ports."""
    words = ["ls-add", "net"]
    for port, addresses in (
        (_GUEST_PORT, " ".join((mac, *_GUEST))),
        (_PEER_PORT, " ".join((_PEER_MAC, *PEER))),
    ):
        words += ["--", "lsp-add", "net", port]
        words += ["--", "lsp-set-addresses", port, addresses]
        words += ["--", "lsp-set-port-security", port, addresses]
    return words


def _central(stack: ExitStack, netns: str, folder: Path) -> str:
    """Start OVN's databases and northd, and return the databases' socket."""
    home = folder / "central"
    home.mkdir()
    files = []
    for name in ("nb", "sb"):
        files.append(str(home / f"{name}.db"))
        ask(None, ["ovsdb-tool", "create", files[-1], f"{_OVN_SCHEMAS}/ovn-{name}.ovsschema"])
    socket = home / "db.sock"
    _daemon(stack, netns, home, "ovsdb-server", *files, f"--remote=punix:{socket}")
    wait("OVN's databases", socket.exists)
    databases = (f"--ovnnb-db=unix:{socket}", f"--ovnsb-db=unix:{socket}")
    _daemon(stack, netns, home, "ovn-northd", *databases)
    return f"unix:{socket}"


def _start(stack: ExitStack, chassis: Chassis, database: str) -> list[Daemon]:
    """Start the daemons of a chassis, until the stack's end."""
    home, netns = chassis.folder, chassis.netns
    home.mkdir()
    ask(None, ["ovsdb-tool", "create", str(home / "conf.db"), _OVS_SCHEMA])
    remote = f"--remote=punix:{home}/db.sock"
    own = _daemon(stack, netns, home, "ovsdb-server", str(home / "conf.db"), remote)
    wait(f"the database of chassis {chassis.name}", (home / "db.sock").exists)
    settings = {
        "system-id": chassis.name,
        "hostname": chassis.name,
        "ovn-remote": f'"{database}"',
        "ovn-encap-type": "geneve",
        "ovn-encap-ip": chassis.address,
    }
    ports = {"tap0": _GUEST_PORT, **({"vif0": _PEER_PORT} if chassis.name == "a" else {})}
    words = ["--no-wait", "init", "--", "set", "Open_vSwitch", "."]
    words += [f"external_ids:{key}={value}" for key, value in settings.items()]
    words += ["--", "add-br", "br-int"]
    words += ["--", "set", "Bridge", "br-int", "fail-mode=secure"]
    for interface, port in ports.items():
        words += ["--", "add-port", "br-int", interface]
        words += ["--", "set", "Interface", interface, f"external_ids:iface-id={port}"]
    chassis.vsctl(*words)
    switch = _daemon(stack, netns, home, "ovs-vswitchd", chassis.socket)
    return [own, switch, _daemon(stack, netns, home, "ovn-controller", chassis.socket)]


def _daemon(stack: ExitStack, netns: str, home: Path, program: str, *arguments: str) -> Daemon:
    """Start a daemon that keeps all files in ``home``."""
    kinds = ("RUNDIR", "LOGDIR", "DBDIR", "SYSCONFDIR")
    folders = [f"{owner}_{kind}={home}" for owner in ("OVS", "OVN") for kind in kinds]
    argv = ["env", *folders, program, *arguments]
    return stack.enter_context(Daemon(netns, argv, home / f"{program}.log", program))
