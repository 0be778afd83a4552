"""``python -m tests.fuzz.make_corpus``: write the honest inputs of the corpus anew.

Files whose name begins with ``found-`` are inputs that found something, and are left alone.
"""

from __future__ import annotations

from godwit.announce import frames
from godwit.hw.nic.e1000 import regs
from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind
from godwit.spec import saved

from . import (
    conversation,
    fuzz_blk,
    fuzz_control,
    fuzz_dissect,
    fuzz_e1000,
    fuzz_migrations,
    fuzz_platform,
    fuzz_snapshot,
    fuzz_stream,
    fuzz_tls_and_first_messages,
    fuzz_vhost_user,
    fuzz_virtio,
    records,
)
from .records import Record
from .target import CORPUS

Inputs = dict[str, bytes]


def main() -> None:
    """Write all of the corpus but what was found."""
    for name, inputs in {
        "stream": _stream(),
        "snapshot": _snapshot(),
        "qmp": _qmp(),
        "dissect": _dissect(),
        "virtio": _virtio(),
        "control": _control(),
        "blk": _blk(),
        "e1000": _e1000(),
        "platform": _platform(),
        "migrations": _migrations(),
        "vcpus": _vcpus(),
        "tls_and_first_messages": _first_messages(),
        "vhost_user": _vhost_user(),
    }.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*"):
            if not path.name.startswith("found-"):
                path.unlink()
        for file, data in inputs.items():
            (folder / file).write_bytes(data)


def _program(ops: dict[str, int], *steps: tuple[str, dict[str, int]]) -> bytes:
    return records.encode([Record(ops[name], **{"size": 0, **rest}) for name, rest in steps])


# --- streams --------------------------------------------------------------------------------------
def _stream() -> Inputs:
    found: Inputs = {}
    for kind, value in fuzz_stream._VALUES.items():
        number = list(fuzz_stream._STRUCTS).index(kind)
        head = messages.header(kind, 10)
        found[f"struct-{kind.name.lower()}"] = (
            bytes([fuzz_stream.STRUCT]) + head + bytes([number]) + saved.encode(value)
        )
    for which, stream in enumerate(fuzz_stream.STREAMS):
        found[f"state-{stream.name}"] = bytes([fuzz_stream.STATE, which, 0])
    patch = conversation.patch
    for where in (12, 40, 80, 120, 200, 300):
        found[f"state-changed-{where}"] = (
            bytes([fuzz_stream.STATE, where % 3, 2])
            + patch(where, 2 | 1 << 3, 3)
            + patch(where * 3, 2 | 2 << 3, 0xFFFF)
        )
    for which in range(4):
        found[f"hello-{which}"] = bytes([fuzz_stream.HELLO, which, 1]) + patch(9999, 2, which)
    found["receive"] = bytes([fuzz_stream.RECEIVE]) + conversation.whole(6)
    found["receive-failed"] = bytes([fuzz_stream.RECEIVE]) + conversation.whole(7)[-2:]
    found["packets"] = bytes([fuzz_stream.PACKETS]) + conversation.whole(3)
    for nic in (1, 2, 63):
        for number in (0, 1):
            changed = bytes([conversation.VALUES, number, 1]) + patch(0, 2, nic)
            found[f"packets-{number}-of-{nic}"] = bytes([fuzz_stream.PACKETS]) + changed
    found["peer"] = bytes([fuzz_stream.PEER]) + b"".join(
        bytes([conversation.WHOLE, number]) for number in (0, 9, 4, 3)
    )
    found["table"] = bytes([fuzz_stream.TABLE]) + messages.encode_runs([(0, 1), (8192, 3)])
    return found


def _snapshot() -> Inputs:
    found: Inputs = {}
    m = fuzz_snapshot
    patch = conversation.patch(30, 2 | 1 << 3, 1)
    for which, name in enumerate(("virtio-net", "e1000")):
        for packed, form in enumerate(("", "-zstd")):
            head = bytes([which, packed])
            found[f"{name}{form}"] = head + bytes([m.INDEX, 0, 0])
            found[f"{name}{form}-table"] = head + bytes([m.TABLE, 1, 3, 0, 1])
            found[f"{name}{form}-stored"] = head + bytes([m.STORED, 0, 9, 0, 0, 1])
            found[f"{name}{form}-bytes"] = head + bytes([m.BYTES, 0, 0, 0, 32, 0, 1])
        found[f"{name}-hello"] = bytes([which, 0, m.INDEX, 1]) + patch
        found[f"{name}-state"] = bytes([which, 0, m.INDEX, 0, 1]) + patch
    for number in range(4):
        found[f"header-{number}"] = bytes([0, 0, m.HEADER]) + bytes(32) + bytes([number])
    return found


def _migrations() -> Inputs:
    step, m = fuzz_migrations.step, fuzz_migrations
    names = {m.FLIP: "flip", m.CUT_SHORT: "cut-short", m.TWICE: "twice", m.DROP: "drop"}
    names |= {m.CLOSE: "close", m.SPLIT: "split", m.AWAY: "away"}
    found: Inputs = {"whole": b""}
    for what, name in names.items():
        for from_source, number in ((True, 0), (True, 8), (False, 0), (False, 1), (False, 2)):
            where = "source" if from_source else "destination"
            found[f"{name}-{where}-{number}"] = step(from_source, number, what, 100)
    for kind, value in (
        (Kind.FAILED, messages.Reason("no")),
        (Kind.REFUSED, messages.Reason("no")),
        (Kind.COMMIT, messages.Commit(bytes(16), True)),
        (Kind.STARTED, messages.Started({}, ["running"])),
        (Kind.ACK, None),
        (Kind.READY, None),
    ):
        payload = saved.encode(value) if value is not None else b""
        for from_source, number in ((True, 8), (False, 1)):
            where = "source" if from_source else "destination"
            name = f"inject-{kind.name.lower()}-{where}"
            found[name] = step(from_source, number, m.INJECT, kind - 1, payload)
    return found


def _first_messages() -> Inputs:
    d = fuzz_tls_and_first_messages
    query, half = d.query(), messages.header(Kind.HELLO, 65_536) + b"half a message"
    found: Inputs = {}
    for door, name in enumerate(("plain", "secret", "tls", "both")):
        found[f"{name}-query"] = d.steps(door, d.send(0, query))
        found[f"{name}-half"] = d.steps(door, *(d.send(slot, half) for slot in range(3)))
        found[f"{name}-http"] = d.steps(door, d.send(0, b"GET / HTTP/1.1\r\n\r\n"))
    found["secret-proof"] = d.steps(d.SECRET, d.prove(0), d.send(0, query))
    found["secret-wrong-proof"] = d.steps(d.SECRET, d.prove(0, 33), d.send(0, query))
    for wrong in (1, 31, 255):
        found[f"secret-wrong-bit-{wrong}"] = d.steps(d.SECRET, d.prove(0, wrong), d.send(0, query))
    found["plain-crowd"] = d.steps(d.PLAIN, *(bytes([d.OPEN, slot]) for slot in range(20)))
    found["plain-late"] = d.steps(d.PLAIN, d.send(0, half), bytes([d.TIME, 0, 255]))
    found["tls-client-hello"] = d.steps(d.TLS, d.send(0, d.CLIENT_HELLO))
    found["plain-message"] = d.steps(d.PLAIN, d.message(0, Kind.RAM, bytes(20)))
    return found


# --- QMP and frames -------------------------------------------------------------------------------
def _qmp() -> Inputs:
    hello = b'{"execute":"qmp_capabilities"}'
    lines = {
        "greeting": b"",
        "status": b'{"execute":"query-status","id":1}\n',
        "migrate": b'{"execute":"migrate","arguments":{"uri":"unix:/run/x"},"id":"a"}',
        "announce": b'{"execute":"announce-self","arguments":{"initial":50,"max":550,"rounds":10,'
        b'"step":50,"interfaces":["nic0"]}}',
        "parameters": b'{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":1000,'
        b'"downtime-limit":300,"announce-allow":["ip:192.0.2.0/24"],"announce-rarp":"always"}}',
        "unknown": b'{"execute":"no-such-command","arguments":{"a":[1,2,{"b":null}]}}',
        "number-as-id": b'{"execute":"query-status","id":123456789012345678901234567890}',
        "surrogate": b'{"execute":"query-status","id":"\\ud800"}',
        "malformed": b'{"execute":}',
        "nested": b"[" * 99 + b"]" * 99,
    }
    lines["single-quotes"] = b"{'execute': 'query-status', 'id': 'it\\'s \"so\"'}"
    found = {name: b"\x07" + hello + line for name, line in lines.items()}
    event, reply, sent = (bytes([what]) + b"\xff\x0f" for what in (0x10, 0x12, 0xF3))
    found["outbox"] = b"\x80" + (event * 3 + reply) * 4 + sent * 3
    found["endless-string"] = b"\x40" + b"x" * 4000
    found["outbox-flood"] = b"\x80" + bytes([0xF0, 0xFF, 0xFF]) * 8 + sent * 9 + reply + event
    return found


def _dissect() -> Inputs:
    d, guest, peer = fuzz_dissect, fuzz_dissect.GUEST, fuzz_dissect.PEER
    ip4, other4 = bytes([192, 0, 2, 7]), bytes([192, 0, 2, 1])
    ip6 = bytes.fromhex("20010db8" + "00" * 11 + "07")
    vlan = ((0x8100, 100),)
    igmp3 = bytes.fromhex("2200f9020000000104000000e00000fb")
    header = bytes.fromhex("46c0002800010000010200000a000002e000001694040000")
    made = {
        "rarp": frames.rarp(guest),
        "gratuitous-arp": frames.gratuitous_arp(guest, ip4, vlan),
        "arp-request": frames.arp_request(guest, ip4, other4),
        "arp-probe": frames.arp_probe(guest, ip4),
        "advertisement": frames.unsolicited_na(guest, ip6, router=True),
        "solicitation": frames.solicitation(guest, ip6, ip6[:-1] + b"\1", vlan),
        "duplicate-detection": frames.solicitation(guest, None, ip6),
        "marker": frames.layer2_update(guest, vlan, bytes(20)),
        "igmp": bytes.fromhex("01005e000016") + guest + b"\x08\0" + header + igmp3,
    }
    found = {name: d.entry(frame) for name, frame in made.items()}
    claim = frames.gratuitous_arp(peer, ip4)
    found["claim"] = d.entry(made["gratuitous-arp"], 0x30) + d.entry(claim, 0x40)
    found["tagged-by-the-kernel"] = d.entry(made["arp-request"], 0, 100)
    found["host's"] = d.entry(made["rarp"], 0x80) + d.entry(made["rarp"])
    found["memberships"] = d.entry(_report(100, 0)) + d.entry(_report(100, 100))
    found["old"] = d.entry(made["gratuitous-arp"]) + d.entry(made["arp-request"], 0x0C)
    found = {name: b"\0" + data for name, data in found.items()}
    for kind in ("gratuitous-arp", "advertisement", "arp-request", "solicitation", "rarp"):
        many = [frame for frame in (made[kind],) for _ in range(2)]
        varied = [many[0], many[1][:30] + b"\x77" + many[1][31:]]
        found[f"series-{kind}"] = bytes([d.SERIES]) + b"".join(d.entry(one) for one in varied)
    found["series-claims"] = bytes([d.SERIES]) + d.entry(claim, 0x70)
    return found


def _report(count: int, first: int) -> bytes:
    """Return an IGMPv3 report of so many groups (RFC 3376, 4.2)."""
    records = b"".join(
        bytes([4, 0, 0, 0, 239, 1, 0, number]) for number in range(first, first + count)
    )
    body = b"\x22\0\0\0\0\0" + count.to_bytes(2, "big") + records
    length = (24 + len(body)).to_bytes(2, "big")
    header = b"\x46\xc0" + length + bytes.fromhex("000100000102") + bytes(2)
    header += bytes.fromhex("0a000002e000001694040000")
    return bytes.fromhex("01005e000016") + fuzz_dissect.GUEST + b"\x08\0" + header + body


# --- devices --------------------------------------------------------------------------------------
def _virtio() -> Inputs:
    ops = fuzz_virtio.OPS

    def program(*steps: tuple[str, dict[str, int]]) -> bytes:
        return _program(ops, *steps)

    receive = program(("buffer", {"b": 2000}), ("frame", {"a": 60}), ("frame", {"a": 3000}))
    send = program(("buffer", {"size": 1, "b": 100, "value": 0x1234}))
    control = program(("buffer", {"size": 2, "b": 3, "value": 0x010000}))
    life = program(("pause", {}), ("announce", {}), ("migrate", {"a": 1}), ("pause", {"a": 1}))
    backlog = program(*(("backlog", {"a": kind, "b": 60, "value": 0xFF}) for kind in (0, 1, 2)))
    log = program(*(("log", {"a": kind}) for kind in (0, 1, 2)))
    chain = program(
        ("descriptor", {"size": 1, "a": 0x100, "b": 12}),
        ("descriptor", {"size": 1, "a": 0x001, "b": 60, "value": 64}),
        ("publish", {"size": 1}),
        ("kick", {"a": 1, "size": 1}),
    )
    indirect = program(
        ("descriptor", {"size": 1, "a": 0x400, "b": 32}),
        ("publish", {"size": 1}),
        ("kick", {"a": 1, "size": 1}),
    )
    loop = program(
        ("descriptor", {"size": 1, "a": 0x900, "b": 12}),
        ("publish", {"size": 1}),
        ("kick", {"a": 1, "size": 1}),
    )
    heads = [program(("publish", {"size": 1, "a": head, "b": 1})) for head in (0, 63, 64, 65)]
    queues = program(
        *(("queue_register", {"size": size, "a": at}) for size in range(5) for at in (0, 4, 8)),
    )
    lost = program(("frame", {"a": 60, "b": 63}), ("buffer", {"size": 1, "b": 100}))
    registers = program(
        ("common", {"a": 0x14, "value": 0}),
        ("common", {"a": 0x14, "value": 3}),
        ("config_write", {"a": 0x10, "size": 2, "value": 0xE020_0000}),
        ("config_read", {"a": 0x34}),
        ("probe", {"a": 0, "size": 2}),
    )
    parts = {"receive": receive, "send": send, "control": control, "life": life, "chain": chain}
    parts |= {
        "indirect": indirect,
        "loop": loop,
        "queues": queues,
        "registers": registers,
        "backlog": backlog,
        "log": log,
    }
    parts["all"] = b"".join(parts.values())
    parts["tap-lost"] = lost + send
    parts |= {f"head-{number}": head for number, head in enumerate(heads)}
    found: Inputs = {}
    for name, part in parts.items():
        for how, kind in ((0, "userspace"), (fuzz_virtio.VHOST, "vhost")):
            found[f"{kind}-{name}"] = bytes([how]) + part
    for how, kind in ((fuzz_virtio.PLAIN, "plain"), (fuzz_virtio.SMALL, "small"), (16, "unmerged")):
        found[f"{kind}-all"] = bytes([how]) + parts["all"]
    return found


def _blk() -> Inputs:
    request, segment = fuzz_blk.request, fuzz_blk.segment
    block, everything = bytes(range(256)) * 2, bytes((fuzz_blk.DISCARDS | fuzz_blk.ODD,))
    last = 127
    each = {
        "read": request(0, 3, space=512) + request(0, 0, space=4096, cut=0xFF),
        "write": request(1, 3, block)
        + request(1, last, block * 2, cut=3)
        + request(0, 3, b"", 512),
        "flush-and-identity": request(2) + request(3, space=19) + request(3, space=40, cut=0xFC),
        "discard": request(4, 0, segment(1, 2) + segment(last, 2))
        + request(4, 0, segment(0, 1, 1)),
        "zeroes": request(5, 0, segment(0, 8, 1)) + request(5, 0, segment(1 << 40, 1)),
        "beyond": request(0, 1 << 60, space=512, form=3) + request(1, last + 1, block * 4),
        "no-status": request(0, 0, space=512, form=10) + request(6) + request(7, space=5),
        "quick": b"".join(request(kind, 5, block, 512, 18) for kind in range(8)),
    }
    found = {name: everything + data for name, data in each.items()}
    found["readonly"] = bytes((fuzz_blk.READONLY,)) + b"".join(each.values())
    return found


def _control() -> Inputs:
    request, table = fuzz_control.request, fuzz_control.table
    everything = b"\xff" * 4
    mac, group = bytes.fromhex("525400000099"), bytes.fromhex("01005e000001")
    return {
        "modes": everything + b"".join(request(0, n, b"\1") for n in range(6)),
        "tables": everything + request(1, 0, table(mac) + table(group, group)),
        "long-tables": everything + request(1, 0, table(*[mac] * 65) + table(*[group] * 70), 1),
        "mac": everything + request(1, 1, mac) + request(1, 1, group),
        "vlans": everything + request(2, 0, b"\x64\0") + request(2, 1, b"\x64\0"),
        "announcement": everything + request(3, 0, b"", 0x80) + request(3, 0),
        "nothing-negotiated": bytes(4) + request(0, 0, b"\1") + request(3, 0),
        "together": everything + request(0, 0, b"\1", 0x20) * 3 + request(0, 1, b"\0"),
        "indirect": everything + request(0, 0, b"\1", 0x12),
        "no-answer": everything + request(0, 0, b"\1", 8) + request(0, 0, b"\1"),
    }


def _vhost_user() -> Inputs:
    conversation, honest = fuzz_vhost_user.conversation, fuzz_vhost_user.HONEST
    number, answer = fuzz_vhost_user.number, fuzz_vhost_user.answer
    changed = (2).to_bytes(4, "little") + (9).to_bytes(4, "little") + bytes(4)
    return {
        "honest": conversation(honest),
        "config-changes": conversation(honest, changed),
        "half-a-message": conversation(honest, changed[:7]),
        "no-descriptor": conversation(honest, fds=0),
        "three-descriptors": conversation(honest, fds=3),
        "no-protocol-features": conversation([answer(1, number(1 << 32)), *honest[3:]]),
        "position-beyond": conversation([*honest[:6], answer(11, bytes(4) + b"\0\0\1\0")]),
        "cut": conversation(honest)[:60],
    }


def _e1000() -> Inputs:
    ops = fuzz_e1000.OPS

    def program(*steps: tuple[str, dict[str, int]]) -> bytes:
        return _program(ops, *steps)

    number = {register: index for index, register in enumerate(fuzz_e1000.REGISTERS)}
    send = program(("send", {"a": 60}), ("send", {"a": 1500, "value": 0x40}))
    # IPCSS 14, IPCSO 24, TUCSS 34, TUCSO 50, TSE|TCP|IP, 54 bytes of headers.
    context = int.from_bytes(bytes([14, 24, 34, 50, 0x07, 54, 4, 3]), "little")
    offload = program(("send", {"size": 2, "b": 1400 << 16 | 9000, "value": context}))
    receive = program(("frame", {"a": 60}), ("frame", {"a": 4000}), ("offer", {"a": 3}))
    life = program(("pause", {}), ("migrate", {}), ("views", {}), ("pause", {"a": 1}))
    registers = program(
        *(("write", {"a": number[at], "value": 0xFFFF_FFFF}) for at in fuzz_e1000.REGISTERS),
        *(("read", {"a": number[at], "size": 2}) for at in fuzz_e1000.REGISTERS),
        ("write", {"a": number[regs.CTRL], "value": fuzz_e1000.CTRL_RST}),
    )
    eeprom = program(*(("write", {"a": number[regs.EERD], "value": n << 8 | 1}) for n in range(4)))
    phy = program(
        *(("write", {"a": number[regs.MDIC], "value": n << 16 | 1 << 21 | 2 << 26}) for n in (0, 1))
    )
    ports = program(("port", {"a": 0, "size": 2, "value": 0x2818}), ("port", {"a": 4, "size": 2}))
    transmit = program(("transmit", {"size": 1, "b": 60, "value": 9 << 24}))
    backlog = program(*(("backlog", {"a": kind, "b": 60, "value": 0xFF}) for kind in (0, 1, 2, 3)))
    parts = {"send": send, "offload": offload, "receive": receive, "life": life, "ports": ports}
    parts |= {"registers": registers, "eeprom": eeprom, "phy": phy, "transmit": transmit}
    parts |= {"backlog": backlog, "config": program(("config", {"a": 4, "size": 1, "value": 7}))}
    parts["all"] = b"".join(parts.values())
    found = {name: b"\0" + part for name, part in parts.items()}
    found["raw-all"] = bytes([fuzz_e1000.RAW]) + parts["all"]
    found["promiscuous-all"] = bytes([fuzz_e1000.PROMISCUOUS | 4]) + parts["all"]
    return found


def _platform() -> Inputs:
    ops, kernel, header = fuzz_platform.OPS, fuzz_platform.kernel, fuzz_platform.header

    def program(*steps: tuple[str, dict[str, int]]) -> bytes:
        return b"\0" + _program(ops, *steps)

    serial = [("out", {"a": at, "value": value}) for at, value in ((1, 3), (4, 0x10), (0, 65))]
    return {
        "serial": program(*serial, ("in", {"a": 5}), ("in", {"a": 0}), ("migrate", {})),
        "input": program(("outside", {"value": 65, "b": 70_000 - 1}), *serial, ("in", {"a": 2})),
        "power": program(
            ("outside", {"a": 2}),
            ("out", {"a": 10, "size": 1, "value": 0x100}),
            ("out", {"a": 12, "size": 1, "value": 0x2000 | 5 << 10}),
            ("migrate", {}),
        ),
        "reset": program(("out", {"a": 24, "value": 6}), ("out", {"a": 25, "value": 0xFE})),
        "pci": program(*(("config", {"a": at, "b": 8, "size": 2}) for at in range(0, 256, 16))),
        "msix": program(
            ("decode", {}),
            *(("msix", {"a": 4 * at, "size": 2, "value": 0xFEE0_0000}) for at in range(8)),
            ("msix_control", {"a": 1, "value": 0x8000}),
            ("pause", {"a": 1}),
        ),
        "kernel": kernel(header(), 2 << 20, 1 << 20),
        "kernel-too-large": kernel(header(init_size=0x7FFF_FFFF), 2 << 20, 1 << 20),
        "kernel-cut-off": kernel(header(setup=64), 3000, 0),
        "kernel-too-old": kernel(header(version=0x20B), 2 << 20, 0),
        "kernel-none": kernel(b"#!/bin/sh\n", 100, 0),
        "initrd-too-large": kernel(header(), 2 << 20, 31 << 20),
    }


def _probes_among_kicks() -> list[Record]:
    """The first vCPU probes virtio-net again and again, the others notify, read and write rings."""

    def write(at: int, size: int, value: int) -> Record:
        return Record(2, size, at, 0, value)

    probe = [write(0x14, 0, value) for value in (0, 1, 3)]
    for select, features in ((0, 0x30FF_FFFF & ~(1 << 6)), (1, 1)):
        probe += [write(0x08, 2, select), write(0x0C, 2, features)]
    probe.append(write(0x14, 0, 11))
    for queue in range(3):
        base = 0x10_0000 * (queue + 1)
        probe += [write(0x16, 1, queue), write(0x18, 1, 64), write(0x20, 2, base)]
        probe += [write(0x28, 2, base + 0x400), write(0x30, 2, base + 0x500), write(0x1C, 1, 1)]
    probe.append(write(0x14, 0, 15))
    found = []
    for number, step in enumerate(probe * 4):
        kick = Record(6, 0, number % 3)
        ring = Record(5, number % 3, 0x400, 0, (number & 0x3F) << 16)
        found += [step, kick, ring, Record(6, 0, (number + 1) % 3)]
    return found[:400]


def _vcpus() -> Inputs:
    found: Inputs = {}
    mixed = [
        Record(number % 8, number % 3, number * 7 % 64, number, number << number % 32)
        for number in range(160)
    ]
    for how in (0x00, 0x01, 0x34, 0x39):
        found[f"mixed-{how:02x}"] = bytes([how]) + records.encode(mixed)
    status = [Record(2, 0, 0x14, 0, (0, 1, 3, 11, 15)[number % 5]) for number in range(100)]
    found["status"] = b"\x30" + records.encode(status)
    found["probes-and-kicks"] = b"\x30" + records.encode(_probes_among_kicks())
    found["probes-and-kicks-paused"] = b"\x3c" + records.encode(_probes_among_kicks())
    moves = []
    for number in range(60):
        # A BAR's decoding goes off and on, while other vCPUs use the other device.
        moves += [Record(4, number % 2, 0x04, 0, number // 2 % 2 * 6)]
        moves += [Record(kind, 2, number, 1, number) for kind in (1, 3, 0)]
    found["bars-that-move"] = b"\x30" + records.encode(moves)
    return found


if __name__ == "__main__":
    main()
