"""labgrid's QMP monitor, unchanged, on a QMP socket: prints what it found as JSON.

    with_labgrid.py SOCKET

labgrid's QEMUDriver hands it the two ends of a socket, as is done here. Its module is loaded by
its path, since its package imports the libraries of all hardware that labgrid drives.
"""

import importlib.util
import json
import socket
import sys


def main(path: str) -> None:
    labgrid = importlib.util.find_spec("labgrid")
    place = labgrid.submodule_search_locations[0]  # type: ignore[union-attr, index]
    spec = importlib.util.spec_from_file_location("qmp", f"{place}/util/qmp.py")
    qmp = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(qmp)  # type: ignore[union-attr]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        monitor = qmp.QMPMonitor(sock.makefile("rb"), sock.makefile("wb"))
        found = {"status": monitor.execute("query-status")["status"]}
        monitor.execute("stop")  # whose events it passes over
        found["stopped"] = monitor.execute("query-status")["status"]
        monitor.execute("cont")
        try:
            monitor.execute("human-monitor-command", {"command-line": "info usernet"})
        except (qmp.QMPError, TypeError) as error:  # its error takes text, and gets an object
            found["refused"] = str(error)
        found["migrate"] = monitor.execute("migrate", {"uri": "unix:/there", "detach": True})
        monitor.execute("quit")
    print("FOUND", json.dumps(found))


main(sys.argv[1])
