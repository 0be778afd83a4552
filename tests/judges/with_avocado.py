"""avocado-vt's monitor, unchanged, on a QMP socket: prints what it found as JSON.

avocado_vt.py SOCKET
"""

import json
import sys

from virttest import qemu_monitor


class _Vm:
    """The VM as the monitor asks for it."""

    name = "judged"

    def check_capability(self, flag: object) -> bool:
        return False

    def get_pid(self) -> int:
        return 1


def _refused(call, *arguments):  # type: ignore[no-untyped-def]
    try:
        call(*arguments)
    except qemu_monitor.MonitorError as error:
        return str(error)
    return ""


def main(path: str) -> None:
    monitor = qemu_monitor.QMPMonitor(_Vm(), "qmp1", {"monitor_filename": path})
    found = {"greeting": monitor._greeting["QMP"]["version"]["package"]}
    monitor.verify_responsive()
    found["running"] = monitor.verify_status("running")
    monitor.cmd("stop")
    found["paused"] = monitor.verify_status("paused")
    found["stop-event"] = bool(monitor.get_event("STOP"))
    monitor.cmd("cont")
    found["block"] = monitor.info_block()
    found["cpus"] = len(monitor.query("cpus-fast"))
    monitor.set_migrate_parameter("max-bandwidth", 1000)
    found["max-bandwidth"] = monitor.get_migrate_parameter("max-bandwidth")
    monitor.set_migrate_capability(True, "auto-converge")
    found["auto-converge"] = monitor.get_migrate_capability("auto-converge")
    monitor.set_migrate_capability(False, "xbzrle")
    found["xbzrle-refused"] = _refused(monitor.set_migrate_capability, True, "xbzrle")
    monitor.migrate("unix:/there", False, False)
    found["progress"] = monitor.get_migrate_progress()
    found["human-refused"] = _refused(monitor.human_monitor_cmd, "info status")
    monitor.system_powerdown()
    found["quoted"] = monitor.cmd_raw("{'execute': 'query-name', 'id': 'it\\'s'}")
    monitor.quit()
    monitor.close()
    print("FOUND", json.dumps(found))


main(sys.argv[1])
