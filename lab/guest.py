"""The lab's guest: a stock Debian kernel with a small initramfs whose init is the agent.

The initramfs is built once per kernel and content, and not compressed: a guest on an emulated CPU
copies faster than it inflates.
"""

from pathlib import Path

from . import initramfs
from .kernels import Kernel

#: Lists the agent loads by itself: network drivers by the cards present, `power` once ready.
LISTS = {
    "virtio_net": ("virtio_pci", "virtio_net"),  # virtio_pci: a module in 6.1, built in later
    "e1000": ("e1000",),
    "8021q": ("8021q",),
    "power": ("button", "evdev"),
}
#: There for tests, by `modprobe` through the agent's `sh`.
EXTRA = (
    *("bonding", "bridge", "dummy", "macvlan", "macvtap", "tun", "veth", "vrf", "virtio_mmio"),
    *("ext4", "ptp_kvm", "pvpanic_mmio", "virtio_blk", "virtio_rng", "virtiofs"),
    "vmw_vsock_virtio_transport",
)

WATCHFUL_CMDLINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check "
    "random.trust_cpu=on cryptomgr.notests"
)
"""A kernel command line with the kernel's watchdogs: of lockups, and of its clocks."""

CMDLINE = f"{WATCHFUL_CMDLINE} tsc=reliable nowatchdog"
"""A kernel command line that boots fast in the lab.

``godwit.net=off`` leaves the network alone, ``godwit.shell`` starts a shell on ttyS0.
"""

READY = "GODWIT-GUEST-READY"
"""The beginning of the guest's line on its console once its agent listens; `` cpus=N`` follows."""


def build(kernel: Kernel) -> Path:
    """Return the guest's initramfs for a kernel, built if the cache has none.

    Raises:
        LabError: busybox or gcc is missing.
    """
    sources = sorted((initramfs.DATA / "guest_files").iterdir())
    lists = repr((LISTS, EXTRA)).encode()
    parts = [source.read_bytes() for source in sources]
    key = initramfs.digest(lists, kernel.release.encode(), *parts)

    def write(target: Path) -> None:
        names = {name for group in LISTS.values() for name in group} | set(EXTRA)
        orders = initramfs.load_orders(kernel, sorted(names))
        home = f"lib/modules/{kernel.release}"
        archive = initramfs.Archive()
        archive.directory("bin", "dev", "proc", "sys", "tmp", "lists")
        archive.directory("lib", "lib/modules", home)
        archive.console()
        archive.file("bin/busybox", initramfs.busybox(), 0o755)
        archive.file("init", initramfs.compiled("guest-agent", sources), 0o755)
        for path in dict.fromkeys(path for order in orders.values() for path in order):
            archive.file(f"{home}/{initramfs.unpacked_name(path)}", initramfs.unpacked(path))
        for name, group in LISTS.items():
            paths = dict.fromkeys(path for member in group for path in orders[member])
            lines = (f"/{home}/{initramfs.unpacked_name(path)}\n" for path in paths)
            archive.file(f"lists/{name}", "".join(lines).encode())
        # busybox's modprobe reads modules.dep, in the order that depmod writes.
        files = [[initramfs.unpacked_name(path) for path in order] for order in orders.values()]
        dep = "".join(
            f"{own}: {' '.join(reversed(needs))}\n" for *needs, own in filter(None, files)
        )
        archive.file(f"{home}/modules.dep", dep.encode())
        target.write_bytes(archive.finish())

    return initramfs.cached_file(f"images/guest-{key}.cpio", write)
