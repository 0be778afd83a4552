"""Values of the command line: sizes, addresses, and the keys and values of an option."""

from __future__ import annotations

import re
from collections.abc import Sequence

from godwit.errors import ConfigError

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Return the bytes in a size like ``256M``: units are K, M and G (powers of 1,024).

    Raises:
        ConfigError: the size is not understood.
    """
    match = re.fullmatch(r"(\d{1,12})([KMG]?)", text.strip().upper())
    if not match:
        raise ConfigError(f"size '{text}' is not understood; write it like 256M or 2G")
    return int(match[1]) * _SIZES[match[2]]


def parse_mac(text: str) -> bytes:
    """Return the bytes of a unicast address like ``52:54:00:12:34:56``.

    Raises:
        ConfigError: the address is not understood, or is not one NIC's own.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}", text):
        raise ConfigError(
            f"MAC address '{text}' is not understood; write it like 52:54:00:12:34:56"
        )
    mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    if mac[0] & 1 or mac == bytes(6):
        raise ConfigError(
            f"MAC address '{text}' is a multicast or null address; a NIC needs its own"
        )
    return mac


def format_mac(mac: bytes) -> str:
    """Return a MAC address as people write it."""
    return mac.hex(":")


class Values:
    """The ``KEY=VALUE,...`` of an option, each key known and there once.

    A key of ``flags`` may stand alone, for on. Two commas are one comma of a value.

    Raises:
        ConfigError: names the option, the key or value, and what may stand there.
    """

    def __init__(
        self, option: str, text: str, known: Sequence[str], flags: Sequence[str] = ()
    ) -> None:
        self._option = option
        self._values: dict[str, str] = {}
        for part in text.replace(",,", "\0").split(","):
            part = part.replace("\0", ",")
            key, equals, value = part.partition("=")
            if not equals and key in flags:
                equals, value = "=", "on"
            if not equals or key not in known or key in self._values:
                raise ConfigError(
                    f"{option}: '{part}' in '{text}'; write KEY=VALUE with {', '.join(known)}"
                )
            self._values[key] = value

    def get(self, key: str) -> str | None:
        """Return a value as typed, or None without one."""
        return self._values.get(key)

    def id(self, default: str) -> str:
        """Return the id of the device."""
        name = self._values.get("id", default)
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII):
            raise ConfigError(
                f"{self._option}: id={name}; choose 1 to 64 letters, digits, '.', '_' and '-', "
                "the first of them a letter or digit"
            )
        return name

    def switch(self, key: str, default: bool | None) -> bool | None:
        """Return the value of a switch."""
        value = self._values.get(key)
        if value is None:
            return default
        if value not in ("on", "off"):
            raise ConfigError(f"{self._option}: {key}={value}; choose on or off")
        return value == "on"

    def choice(self, key: str, known: Sequence[str]) -> str:
        """Return one of the known values, or the first of them without a value."""
        value = self._values.get(key)
        if value is None:
            return known[0]
        if value not in known:
            raise ConfigError(
                f"{self._option}: {key}={value[:40]}; choose {' or '.join(dict.fromkeys(known))}"
            )
        return value

    def number(self, key: str, low: int, high: int) -> int | None:
        """Return a number from ``low`` to ``high``, or None without one."""
        value = self._values.get(key)
        if value is None:
            return None
        decimal = value.isascii() and value.isdecimal() and len(value) <= len(str(high))
        if not decimal or not low <= int(value) <= high:
            raise ConfigError(
                f"{self._option}: {key}={value[:40]}; choose a number from {low} to {high}"
            )
        return int(value)
