"""A keepalived pair: a virtual router's addresses (VRRP, RFC 5798) that one of two hosts has."""

from __future__ import annotations

from pathlib import Path

from ..agent import Agent
from .parts import Daemon
from .programs import prepare

ADDRESSES = ("10.0.0.60", "fd00::60")
_ROUTERS = (60, 61)
_LENGTHS = (24, 64)
_PROGRAM = "/usr/sbin/keepalived"
_LOG = "/tmp/keepalived.log"
_GUEST_PRIORITY = 120
_PEER_PRIORITY = 100
#: What the peer adds to its priority to be the master, or not to be.
_MASTER, _BACKUP = 50, -50
#: No second burst of gratuitous ARPs 5 s after the first: a guest that was stopped meanwhile would
#: send it at its resume, whoever is the master by then.
_INSTANCE = """
vrrp_instance {name} {{
  state BACKUP
  interface {interface}
  virtual_router_id {router}
  priority {priority}
  advert_int 1
  garp_master_delay 0
  virtual_ipaddress {{
    {address}
  }}
{more}}}
"""


def _config(interface: str, priority: int, head: str = "", more: str = "") -> str:
    rows = list(zip(_ROUTERS, ADDRESSES, _LENGTHS, strict=True))
    instances = [
        _INSTANCE.format(
            name=f"family{length}",
            interface=interface,
            router=router,
            priority=priority,
            address=f"{address}/{length}",
            more=more,
        )
        for router, address, length in rows
    ]
    return head + "".join(instances)


def start_in_guest(agent: Agent) -> None:
    """Start the guest's keepalived, which is the master unless its peer wants to be."""
    prepare(agent)
    text = _config("eth0", _GUEST_PRIORITY)
    # Readable for its owner alone: keepalived warns otherwise.
    agent.sh(f"umask 077; cat > /etc/keepalived.conf <<END\n{text}END\n")
    options = "--dont-fork --log-console --log-detail --vrrp"
    files = "--use-file /etc/keepalived.conf --pid /run/keepalived.pid --vrrp_pid /run/vrrp.pid"
    agent.sh(f"{_PROGRAM} {options} {files} </dev/null >{_LOG} 2>&1 &")


def guest_log(agent: Agent) -> str:
    """Return the newest of what the guest's keepalived logged."""
    return agent.sh(f"tail -n 30 {_LOG}")


class Peer(Daemon):
    """The other keepalived of the pair, on a host of its own."""

    def __init__(self, netns: str, interface: str, folder: Path) -> None:
        self._weight = folder / "keepalived.weight"
        self._set(_BACKUP)
        head = f'''
vrrp_track_file weight {{
  file "{self._weight}"
  weight 1
}}
'''
        config = folder / "keepalived.conf"
        more = "  track_file {\n    weight weight 1\n  }\n"
        config.write_text(_config(interface, _PEER_PRIORITY, head, more))
        argv = [_PROGRAM, "--dont-fork", "--log-console", "--log-detail", "--vrrp"]
        argv += ["--use-file", str(config), "--pid", str(folder / "keepalived.pid")]
        argv += ["--vrrp_pid", str(folder / "vrrp.pid")]
        super().__init__(netns, argv, folder / "keepalived.log")

    def lead(self) -> None:
        """Become the master."""
        self._set(_MASTER)

    def follow(self) -> None:
        """Leave the addresses to the guest."""
        self._set(_BACKUP)

    def _set(self, weight: int) -> None:
        self._weight.write_text(f"{weight}\n")
