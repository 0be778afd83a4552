"""``python -m godwit.lab.sender RATE PORT FLOW=ADDRESS...``: numbered packets until SIGINT.

It prints ``FLOW=COUNT`` for each flow at its end. A packet that the kernel refuses (no route, no
neighbour) counts as sent: it is lost, and the network is to blame.
"""

from __future__ import annotations

import signal
import socket
import struct
import sys
import time

_PADDING = bytes(52)


def main() -> None:
    """Send until interrupted."""
    rate, port = int(sys.argv[1]), int(sys.argv[2])
    flows = []
    for word in sys.argv[3:]:
        number, _, address = word.partition("=")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM)
        flows.append((int(number), sock, (address, port)))
    ending = False

    def end(number: int, frame: object) -> None:
        nonlocal ending
        ending = True

    signal.signal(signal.SIGINT, end)
    count = 0
    start = time.monotonic()
    while not ending:
        for flow, sock, peer in flows:
            try:
                sock.sendto(struct.pack(">IQ", flow, count) + _PADDING, peer)
            except OSError:
                pass
        count += 1
        left = start + count / rate - time.monotonic()
        if left > 0:
            time.sleep(left)
    for flow, _, _ in flows:
        print(f"{flow}={count}")


if __name__ == "__main__":
    main()
