"""The parsers of the command line's values: each error names the value and the remedy."""

import pytest

from godwit.announce.policy import parse_policy
from godwit.errors import ConfigError
from godwit.spec.config import (
    CpuConfig,
    NicConfig,
    VmConfig,
    default_mac,
    parse_cpu,
    parse_nic,
)
from godwit.spec.machine_types import DEFAULT, machine_type
from godwit.spec.values import format_mac, parse_mac, parse_size

MAC = bytes.fromhex("525400123456")


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("1k", 1024), ("256M", 256 << 20), (" 2g ", 2 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.5G", "256MB", "1T", "0x10", "1 M", "9" * 13])
def test_sizes_that_are_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="256M") as caught:
        parse_size(text)
    assert f"'{text}'" in str(caught.value)


def test_cpus() -> None:
    assert VmConfig().cpu == parse_cpu("host") == CpuConfig()
    assert parse_cpu("x86-64-v2,cx16=off,invtsc=off") == CpuConfig("x86-64-v2", ("cx16", "invtsc"))
    assert parse_cpu("/etc/cpu.json").model == "/etc/cpu.json"


@pytest.mark.parametrize("text", ["host,avx", "host,avx=on", "host,=off", "host,,"])
def test_cpus_that_are_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="write FEATURE=off") as caught:
        parse_cpu(text)
    assert f"'{text}'" in str(caught.value)


def test_a_cpu_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="begin with host, x86-64-v2, x86-64-v3 or a file"):
        parse_cpu(",avx=off")


def test_mac_addresses() -> None:
    assert parse_mac("52:54:00:12:34:56") == parse_mac("52-54-00-12-34-56") == MAC
    assert parse_mac("52:54:00:AB:cd:EF") == bytes.fromhex("525400abcdef")
    assert format_mac(MAC) == "52:54:00:12:34:56"


@pytest.mark.parametrize(
    "text", ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "525400123456", "5g:54:00:12:34:56"]
)
def test_mac_addresses_that_are_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="52:54:00:12:34:56") as caught:
        parse_mac(text)
    assert f"'{text}'" in str(caught.value)


@pytest.mark.parametrize("text", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"])
def test_mac_addresses_that_no_nic_may_have(text: str) -> None:
    with pytest.raises(ConfigError, match=f"'{text}'.*own"):
        parse_mac(text)


def test_default_mac_addresses_are_stable_unicast_and_different() -> None:
    macs = [default_mac(tap, index) for tap in ("tap0", "tap1", "x") for index in range(8)]
    assert len(set(macs)) == len(macs)
    assert all(mac[:3] == b"\x52\x54\x00" and len(mac) == 6 for mac in macs)
    assert default_mac("tap0", 0) == macs[0]


def test_a_nic() -> None:
    assert parse_nic("tap=tap0", 3) == NicConfig("nic3", "tap0", default_mac("tap0", 3))
    text = "tap=t,mac=52:54:00:12:34:56,vhost=off,guest-announce=off,mtu=1500,queue-size=1024,id=up"
    assert parse_nic(text, 0) == NicConfig(
        "up", "t", MAC, vhost=False, guest_announce=False, mtu=1500, queue_size=1024
    )
    assert parse_nic("tap=t,guest-announce=on,vhost=on", 0).guest_announce is True


def test_what_the_host_may_announce() -> None:
    assert parse_nic("tap=t", 0).announce_allow is None
    text = "192.0.2.0/24;2001:db8::/64;52:54:00:12:34:56"
    allow = parse_nic(f"tap=t,announce-allow={text},mtu=1500", 0).announce_allow
    assert allow == text
    policy = parse_policy(text)
    assert policy.permits(MAC, bytes([192, 0, 2, 7]))
    assert not policy.permits(MAC, bytes([198, 51, 100, 7]))
    assert not policy.permits(b"\2\0\0\0\0\1")
    # Nothing is not everything: an empty list is refused where it is read.
    empty = parse_nic("tap=t,announce-allow=", 0).announce_allow
    assert empty == ""
    with pytest.raises(ConfigError, match=r"192\.0\.2\.0/24"):
        parse_policy(empty)
    with pytest.raises(ConfigError, match="announce-allow"):
        parse_nic("tap=t,announce-allow=192.0.2.0/24,announce-allow=192.0.2.0/24", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "KEY=VALUE"),
        ("tap", "'tap'.*KEY=VALUE"),
        ("tap=a,tap=b", "'tap=b'"),
        ("tap=a,speed=9", r"'speed=9'.*queue-size"),
        ("mac=52:54:00:12:34:56", "tap="),
        ("tap=", "1 to 15"),
        ("tap=0123456789abcdef", "1 to 15"),
        ("tap=éééééééé", "1 to 15"),
        ("tap=a/b", "1 to 15"),
        ("tap=a,mac=x", "'x'"),
        ("tap=a,vhost=yes", "vhost=yes; choose on or off"),
        ("tap=a,guest-announce=", "guest-announce=; choose on or off"),
        ("tap=a,mtu=67", "mtu=67; choose a number from 68 to 65535"),
        ("tap=a,mtu=many", "mtu=many; choose a number"),
        ("tap=a,mtu=-1", "mtu=-1"),
        ("tap=a,queue-size=8", "queue-size=8; choose a number from 16 to 1024"),
        ("tap=a,queue-size=100", "queue-size=100; choose a power of two"),
        ("tap=a,id=", "id=; choose 1 to 64"),
        ("tap=a,id=a b", "id=a b; choose 1 to 64"),
        ("tap=a,id=" + "x" * 65, "1 to 64"),
    ],
)
def test_nics_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_nic(text, 0)


def _nic(number: int) -> NicConfig:
    return NicConfig(f"nic{number}", f"tap{number}", MAC[:5] + bytes((number,)))


def test_a_vm() -> None:
    config = VmConfig(cpus=8, devices=tuple(_nic(i) for i in range(8)))
    assert config.machine.name == DEFAULT
    assert config.memory == 256 << 20


@pytest.mark.parametrize("cpus", [0, -1, 9])
def test_numbers_of_cpus_that_are_refused(cpus: int) -> None:
    with pytest.raises(ConfigError, match=f"{cpus} vCPUs; 1 to 8"):
        VmConfig(cpus=cpus)


def test_too_many_nics() -> None:
    with pytest.raises(ConfigError, match="9 NICs; up to 8"):
        VmConfig(devices=tuple(_nic(i) for i in range(9)))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (NicConfig("nic1", "tap2", MAC), "id 'nic1'"),
        (NicConfig("nic2", "tap1", MAC), "tap 'tap1'"),
        (NicConfig("nic2", "tap2", _nic(1).mac), "mac '52:54:00:12:34:01'"),
    ],
)
def test_nics_that_share_what_is_each_ones_own(second: NicConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}; give each its own"):
        VmConfig(devices=(_nic(1), second))


def test_machine_types_pin_their_properties() -> None:
    assert machine_type(DEFAULT).guest_announce
    assert not machine_type("godwit-0.1").guest_announce
    for name in ("godwit-0.1", "godwit-0.2"):
        assert machine_type(name).name == name


def test_an_unknown_machine_type_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'pc'.*godwit-0\.1, godwit-0\.2"):
        machine_type("pc")
