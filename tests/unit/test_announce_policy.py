"""The policy for what may be announced, judged by Python's ipaddress."""

from __future__ import annotations

import ipaddress
import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from godwit.announce.policy import Policy, parse_policy
from godwit.errors import ConfigError

MAC, OTHER = bytes.fromhex("525400123456"), bytes.fromhex("525400abcdef")
IP4, IP6 = bytes([192, 0, 2, 7]), bytes.fromhex("20010db8" + "00" * 11 + "07")


def test_the_default_restricts_nothing() -> None:
    assert all(Policy().permits(MAC, ip) for ip in (None, IP4, IP6))


@pytest.mark.parametrize(
    ("text", "permitted"),
    [
        ("192.0.2.0/24", {(MAC, None), (OTHER, None), (MAC, IP4), (OTHER, IP4)}),
        ("192.0.2.7", {(MAC, None), (OTHER, None), (MAC, IP4), (OTHER, IP4)}),
        ("198.51.100.0/24;2001:db8::/64", {(MAC, None), (OTHER, None), (MAC, IP6), (OTHER, IP6)}),
        ("52:54:00:12:34:56", {(MAC, None), (MAC, IP4), (MAC, IP6)}),
        (" 52-54-00-12-34-56 ; 192.0.2.0/24 ", {(MAC, None), (MAC, IP4)}),
        ("::/0", {(MAC, None), (OTHER, None), (MAC, IP6), (OTHER, IP6)}),
    ],
)
def test_a_list_restricts_what_it_names(text: str, permitted: set[tuple[bytes, object]]) -> None:
    policy = parse_policy(text)
    found = {
        (mac, ip) for mac in (MAC, OTHER) for ip in (None, IP4, IP6) if policy.permits(mac, ip)
    }
    assert found == permitted


@given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 128))
def test_networks(inside: object, ip: object, bits: int) -> None:
    bits = min(bits, ipaddress.ip_address(inside).max_prefixlen)
    network = ipaddress.ip_network(f"{inside}/{bits}", strict=False)
    policy = parse_policy(str(network))
    assert policy.permits(MAC, ip.packed) == (ip in network)  # type: ignore[attr-defined]
    assert policy.permits(MAC, inside.packed)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("192.0.2.0/24;", "''"),
        ("192.0.2.7/24", "'192.0.2.7/24'.*host bits"),
        ("192.0.2.0/33", "'192.0.2.0/33'"),
        ("300.0.0.1", "'300.0.0.1'"),
        ("192.0.2.0/24,198.51.100.0/24", "';' between"),
        ("52:54:00:12:34", "'52:54:00:12:34'"),
        ("fe80::1%eth0", "'fe80::1%eth0'"),
        ("01:00:5e:00:00:01", "01:00:5e:00:00:01.*multicast"),
        (";".join(["192.0.2.0/24"] * 65), "65 items"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_policy(text)


def is_item(item: str) -> bool:
    """Return whether an item is a network, or one NIC's MAC address."""
    if re.fullmatch(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}", item):
        return not int(item[:2], 16) & 1 and re.fullmatch(r"[0:-]+", item) is None
    try:
        ipaddress.ip_network(item)
    except ValueError:
        return False
    return "%" not in item


macs = st.binary(min_size=6, max_size=6).map(lambda mac: mac.hex(":"))
items = st.one_of(
    st.ip_addresses().map(str),
    st.ip_addresses(v=4).map(lambda ip: f"{ip}/24"),  # most have host bits
    st.ip_addresses(v=6).map(lambda ip: f"{ip}%eth0"),
    st.integers(0, 33).map(lambda bits: f"128.0.0.0/{bits}"),
    macs,
    st.just("00:00:00:00:00:00"),
    st.text(max_size=8),
)


@given(st.one_of(st.text(max_size=40), st.lists(items, min_size=1, max_size=4).map(";".join)))
@example("192.0.2.0/24; 2001:db8::/64;52-54-00-12-34-56")
@example("192.0.2.0/24;192.0.2.7/24")
def test_a_text_is_a_policy_if_all_its_items_are_and_else_a_config_error(text: str) -> None:
    try:
        parse_policy(text)
    except ConfigError:
        accepted = False
    else:
        accepted = True
    assert accepted == all(is_item(item.strip()) for item in text.split(";"))


def test_ipaddress_is_loaded_for_a_list_only() -> None:
    script = (
        "import sys; from godwit.announce import addresses, observer, policy; "
        "from godwit.host.net import tap_watch; "
        "policy.Policy().permits(bytes(6), bytes(4)); assert 'ipaddress' not in sys.modules; "
        "policy.parse_policy('192.0.2.0/24'); assert 'ipaddress' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
