"""DPDK's testpmd as the driver of one of the guest's NICs: a virtio driver that is not Linux's.

It answers each echo request and each ARP request, whoever is asked: its network must be its own.
``python -m lab.networks.testpmd`` builds the guest's image; ``make test-networks`` calls it.
"""

from __future__ import annotations

from pathlib import Path

from .. import initramfs, kernels
from ..agent import Agent
from ..kernels import Kernel
from . import programs
from .packages import unpacked

MEMORY = "256M"
KERNEL = "cloud-6.12"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_DRIVERS = "dpdk/pmds-23.0"
_PROGRAM = "/usr/bin/dpdk-testpmd"
#: The drivers that it loads: PCI, a pool of buffers, virtio-net.
_LOADED = ("bus_pci", "mempool_ring", "net_virtio")
#: Debian's kernels have no CONFIG_VFIO_NOIOMMU.
_MODULES = ("uio", "uio_pci_generic")
_HUGE_PAGES = 24  # of 2 MB
_LOG = "/tmp/testpmd.log"
_START = f"""
set -e
device=$(basename $(dirname $(readlink -f /sys/class/net/eth1/device)))
for module in {" ".join(_MODULES)}; do insmod /uio/$module.ko; done
echo $device > /sys/bus/pci/devices/$device/driver/unbind
echo uio_pci_generic > /sys/bus/pci/devices/$device/driver_override
echo $device > /sys/bus/pci/drivers_probe
mkdir -p /dev/hugepages
mount -t hugetlbfs none /dev/hugepages
echo {_HUGE_PAGES} > /proc/sys/vm/nr_hugepages
# Nobody else may write to where its drivers are.
chmod 755 /
{_PROGRAM} -l 0-1 -n 1 -m {2 * _HUGE_PAGES - 4} -a $device --no-telemetry \\
  {" ".join(f"-d /{_LIBRARIES}/{_DRIVERS}/librte_{name}.so.23" for name in _LOADED)} -- \\
  --total-num-mbufs=2048 --nb-cores=1 --forward-mode=icmpecho --auto-start \\
  --stats-period 60 </dev/null >{_LOG} 2>&1 &
"""


def build(kernel: Kernel) -> Path:
    """Return the guest's initramfs with testpmd, built if the cache has none.

    Raises:
        LabError: apt cannot provide DPDK.
    """
    root = unpacked("dpdk-dev", needs=True)
    drivers = root / _LIBRARIES / _DRIVERS
    wanted = [root / _PROGRAM.lstrip("/")]
    wanted += [drivers / f"librte_{name}.so.23" for name in _LOADED]
    path = f"{root / _LIBRARIES}:{drivers}"
    files = {}
    for source in programs.with_libraries(wanted, path):
        place = Path("/") / source.relative_to(root) if source.is_relative_to(root) else source
        files[place] = source
    for name, orders in initramfs.load_orders(kernel, _MODULES).items():
        files[Path(f"/uio/{name}.ko")] = _unpacked_module(orders[-1])
    return programs.image(kernel, "testpmd", files)


def start_in_guest(agent: Agent) -> None:
    """Have testpmd drive eth1 instead of Linux."""
    agent.sh(_START)


def log(agent: Agent) -> str:
    """Return what testpmd printed."""
    return agent.sh(f"tail -n 30 {_LOG}")


def _unpacked_module(path: Path) -> Path:
    name = f"modules/{path.parents[3].name}-{initramfs.unpacked_name(path)}"
    return initramfs.cached_file(name, lambda target: _write(target, initramfs.unpacked(path)))


def _write(target: Path, data: bytes) -> None:
    target.write_bytes(data)


if __name__ == "__main__":
    build(kernels.get(KERNEL))
