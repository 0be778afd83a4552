"""The cost of announcements in a network: a host of 500 guests, evacuated in parallel.

    python benchmarks/announce_cost.py

Each guest has one IPv4, one IPv6 and one link-local address in each VLAN, and announces itself:
a gratuitous ARP and two neighbour advertisements a VLAN and round, five rounds by the default
schedule. The host adds a RARP a round; in the first, a question for the gateway of each VLAN over
either family; and in each, a question to a gateway from each address, to two in the first.
Nothing is measured: frames are made and counted, and paced as the announcer paces them.
Prints the table of docs/announcement.md.
"""

from __future__ import annotations

from godwit.announce.frames import gratuitous_arp, unsolicited_na
from godwit.announce.pacing import Pacer, round_delays
from godwit.announce.questions import MAX_INTRODUCED, MAX_NETWORKS, PEERS_ASKED
from godwit.spec.parameters import AnnounceParameters

GUESTS = 500
VLANS = (1, 10, 100)
#: Preamble, start of frame, FCS and the gap between frames, bytes (IEEE 802.3-2022, 3.1.1, 4.4.2).
WIRE = 7 + 1 + 4 + 12
#: Frames a second that one VM may cause: without limit, the default, and for an evacuation.
RATES = (0, 1000, 20)


def round_of(vlans: int) -> list[int]:
    """Return the bytes on the wire of each frame that one guest sends in one round."""
    mac, ip4, ip6 = bytes(5) + b"\2", bytes(4), bytes(16)
    one = [gratuitous_arp(mac, ip4, [(0x8100, 1)]), *2 * [unsolicited_na(mac, ip6, [(0x8100, 1)])]]
    return [len(frame) + WIRE for frame in one] * vlans


def sends(frames: int, rate: int, vlans: int) -> list[tuple[float, int]]:
    """Return (seconds after the resume, frames) of one guest, each round as a whole."""
    pacer, now, sent, extra = Pacer(), 0.0, [], 0
    for number, delay in enumerate(round_delays(AnnounceParameters())):
        now += delay
        while wait := pacer.take(frames + extra, rate, now):
            now += wait
        extra = 1
        if number == 0:
            extra += PEERS_ASKED * min(vlans, MAX_NETWORKS)
        extra += min(frames, MAX_INTRODUCED) * (1 if number else PEERS_ASKED)
        sent.append((now, frames + extra))
    return sent


def busiest(sent: list[tuple[float, int]]) -> int:
    """Return the number of frames that one guest sends in its busiest second."""
    return max(sum(count for at, count in sent if start <= at < start + 1.0) for start, _ in sent)


def main() -> None:
    """Print the table of docs/announcement.md."""
    print("| VLANs | rate of a VM | frames of a guest | until its last | of 500 guests |", end="")
    print(" busiest second | on the wire |")
    print("|---|---|---|---|---|---|---|")
    for vlans in VLANS:
        sizes = round_of(vlans)
        for rate in RATES:
            sent = sends(len(sizes), rate, vlans)
            total = sum(count for _, count in sent)
            peak = busiest(sent) * GUESTS
            bits = peak * 8 * sum(sizes) / len(sizes)
            print(
                f"| {vlans} | {rate or 'no limit'} | {total:,} | {sent[-1][0]:.1f} s "
                f"| {total * GUESTS:,} | {peak:,} frames/s | {bits / 1e6:,.0f} Mbit/s |"
            )


if __name__ == "__main__":
    main()
