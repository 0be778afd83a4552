"""``record.py OUT [NAME...]``: record streams of real migrations (README.md has the command).

Without names, all streams are recorded but the ones kept here.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from vm_bench import Bench

from godwit.migration.wire.messages import Kind
from lab.network import Network
from lab.vm import vm_folder
from recorded import STREAMS, Stream
from tests.fakes.connection_cutter import ConnectionCutter


def record(bench: Bench, stream: Stream, folder: Path) -> None:
    """Boot a guest that uses all its networks, migrate the guest, and keep HELLO and STATE."""
    machine = ("--machine", stream.machine)
    nic = f"model={stream.model}"
    sized: dict[str, Any] = {"nic": nic, "memory": stream.memory, "cpus": stream.cpus}
    target = bench.run(bench.net.b, "--incoming", "defer", *machine, **sized)
    guest = bench.boot(*machine, kernel=stream.kernel, keep=[target], deadline=120.0, **sized)
    bench.answers()
    target.qmp.execute("query-status")
    bench.listen(target)
    near, far = (bench.folder / f"{target.name}.{end}" for end in ("line", "move"))
    kept: dict[Kind, bytes] = {}

    def note(kind: Kind, payload: bytes | bytearray) -> None:
        if kind in (Kind.HELLO, Kind.STATE):
            kept[kind] = bytes(payload)

    with ConnectionCutter(near, far, None, True, on_message=note):
        bench.move(guest, target, f"unix:{near}")
    bench.answers()  # the state is of a guest that goes on
    stream.write(folder, kept[Kind.HELLO], kept[Kind.STATE])


def main() -> None:
    """Record the streams of the command line, and print a line for each."""
    out, names = Path(sys.argv[1]), sys.argv[2:]
    chosen = [s for s in STREAMS if (s.name in names if names else not s.path().exists())]
    out.mkdir(parents=True, exist_ok=True)
    print((Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]).replace("\t", ""))
    began = time.monotonic()
    with vm_folder("/run", writable=True) as folder, Network() as net:
        bench = Bench(net, folder)
        try:
            for stream in chosen:
                record(bench, stream, out)
                size = stream.path(out).stat().st_size
                took = time.monotonic() - began
                print(f"{took:6.1f} s: {stream.name}, {size} bytes", flush=True)
        finally:
            bench.close()


if __name__ == "__main__":
    main()
