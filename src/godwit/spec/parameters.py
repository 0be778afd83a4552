"""The operator's parameters of migrations and announcements, checked once.

Each parameter is a field of one of four structs, and each range is a row of :data:`RANGES`. QMP's
commands are derived from both: a new parameter is a field, and a range if the type is too wide.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from godwit.errors import ConfigError

#: The most that a vCPU may be kept out of the guest, percent. QEMU: softmmu/cpu-throttle.c,
#: CPU_THROTTLE_PCT_MAX. What is left is one slice in a hundred, so that a guest never stands still.
MOST_THROTTLED = 99
#: Frames per second that one VM may cause unless its operator chooses: a guest with a hundred
#: addresses is announced within its first tenth of a second.
ANNOUNCE_RATE = 1000
#: The parameters that QMP has as capabilities, as QEMU does.
CAPABILITIES = ("auto-converge",)
_ANNOUNCE = "announce-"


class Range(NamedTuple):
    """The values a number may have."""

    least: int
    most: int
    unit: str = ""


#: Parameter's name in QMP -> its range. QEMU's are those of migration/options.c
#: (migrate_params_check; MAX_MIGRATE_DOWNTIME_SECONDS) and of qapi/migration.json.
RANGES = {
    "announce-initial": Range(0, 100_000, "ms"),
    "announce-max": Range(0, 100_000, "ms"),
    "announce-rounds": Range(0, 1000),
    "announce-step": Range(1, 10_000, "ms"),
    "announce-deadline": Range(10, 60_000, "ms"),
    "announce-rate": Range(0, 1_000_000, "frames per second"),
    "announce-patience": Range(0, 3_600_000, "ms"),
    "max-bandwidth": Range(0, 2**63 - 1, "bytes per second"),
    "downtime-limit": Range(0, 2_000_000, "ms"),
    "cpu-throttle-initial": Range(1, MOST_THROTTLED, "percent"),
    "cpu-throttle-increment": Range(1, MOST_THROTTLED, "percent"),
    "max-cpu-throttle": Range(1, MOST_THROTTLED, "percent"),
}


def _announce(field: str) -> str:
    """Return the name in QMP of an announcement's field."""
    return _ANNOUNCE + field.replace("_", "-")


def _check(name: str, value: int) -> None:
    least, most, unit = RANGES[name]
    unit = unit and f" {unit}"
    if least <= value <= most:
        return
    # announce-self has arguments of the same meaning, without the prefix.
    if name.startswith(_ANNOUNCE):
        found = f"announce parameter '{name.removeprefix(_ANNOUNCE)}' is {value}{unit}"
    else:
        found = f"Parameter '{name}' is {value}"
    raise ConfigError(f"{found}: choose a value from {least} to {most}{unit}")


class Verify(enum.StrEnum):
    """The ways to verify an announcement."""

    OFF = "off"
    FDB = "fdb"
    PROBE = "probe"


class Rarp(enum.StrEnum):
    """The rounds in which the host sends a RARP of the NIC's MAC address."""

    ALWAYS = "always"
    FALLBACK = "fallback"


class OnNoConvergence(enum.StrEnum):
    """The ends of a migration the downtime limit does not allow to end.

    Xen's names (tools/include/xenguest.h, precopy_policy): XGS_POLICY_ABORT and
    XGS_POLICY_STOP_AND_COPY.
    """

    ABORT = "abort"
    STOP_AND_COPY = "stop-and-copy"


class _Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """The base of all parameters: values in their ranges, replaced as a whole."""

    def __post_init__(self) -> None:
        for field, name in zip(self.__struct_fields__, self.__struct_encode_fields__, strict=True):
            if name in RANGES:
                _check(name, getattr(self, field))


class AnnounceParameters(_Parameters, frozen=True, rename=_announce):
    """The schedule of an announcement, with QEMU's defaults (migration/options.c).

    Attributes:
        initial: delay before the second round, milliseconds.
        max: longest delay between two rounds, milliseconds.
        rounds: how many rounds; 0 for no announcement.
        step: what each delay is longer than the one before it, milliseconds.

    Raises:
        ConfigError: a value is out of QEMU's range.
    """

    initial: int = 50
    max: int = 550
    rounds: int = 5
    step: int = 100


class AnnounceOptions(_Parameters, frozen=True, rename=_announce):
    """The options of an announcement that are Godwit's own.

    Attributes:
        deadline: how long the guest has to acknowledge, each of two times, milliseconds.
        verify: ``fdb``: this host's bridge forwards to the tap; ``probe``: known peers, asked in
            the guest's name, answer to the tap.
        refresh: the guest's own neighbours, the gateway first, are asked where they are, and their
            answers are passed on to the guest.
        rate: frames per second the VM's announcements may cause; 0 for no limit.
        rarp: ``always``: each round begins with a RARP of the NIC's MAC address, without tag;
            ``fallback``: only the host's rounds.
        ask_gateways: known peers, gateways first, are asked in the guest's name: whether the
            network passes frames, and from each address that is announced.
        patience: how long rounds go on, further and further apart, while no answer has shown that
            the network passes frames, milliseconds; 0 for no further rounds.

    Raises:
        ConfigError: a number is out of range.
    """

    deadline: int = 400
    verify: Verify = Verify.OFF
    refresh: bool = False
    rate: int = ANNOUNCE_RATE
    rarp: Rarp = Rarp.ALWAYS
    ask_gateways: bool = True
    patience: int = 60_000


class ConvergenceParameters(_Parameters, frozen=True):
    """Bounds for slowing a guest down, and the way to go on if slowing it is not enough.

    Names, ranges and defaults are QEMU's (qapi/migration.json; migration/options.c), but for the
    last, which is Godwit's own.

    Attributes:
        auto_converge: throttle the vCPUs of a guest that writes faster than the connection takes.
        cpu_throttle_initial: share of the time for which vCPUs are kept out at first, percent.
        cpu_throttle_increment: what is added after each round that did not help, percent points.
        max_cpu_throttle: the bound, percent.
        on_no_convergence: give the migration up, or stop the guest for however long it takes.

    Raises:
        ConfigError: a value is out of its range; the message names it.
    """

    auto_converge: bool = False
    cpu_throttle_initial: int = 20
    cpu_throttle_increment: int = 10
    max_cpu_throttle: int = MOST_THROTTLED
    on_no_convergence: OnNoConvergence = OnNoConvergence.ABORT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_cpu_throttle < self.cpu_throttle_initial:
            raise ConfigError(
                f"Parameter 'max-cpu-throttle' is {self.max_cpu_throttle}, less than "
                f"'cpu-throttle-initial', which is {self.cpu_throttle_initial}: raise the one or "
                "lower the other"
            )


class MigrationParameters(_Parameters, frozen=True):
    """All parameters of one VM's migrations.

    Replaced as a whole and never changed, as another thread may read the parameters at any time.

    Attributes:
        announce: the schedule of the announcement after a migration.
        announce_options: the announcement's deadline, verification, refreshing and rate.
        max_bandwidth: the most a migration may send, bytes per second; 0 for no limit.
        downtime_limit: for how long a migration may stop the guest, milliseconds.
        handover: frames that reach the old host are sent after the guest, at either end.
        convergence: the answer to a guest that writes faster than the connection takes.

    Raises:
        ConfigError: a value is out of range; the message names the value.
    """

    announce: AnnounceParameters = AnnounceParameters()
    announce_options: AnnounceOptions = AnnounceOptions()
    max_bandwidth: int = 0
    downtime_limit: int = 300
    handover: bool = True
    convergence: ConvergenceParameters = ConvergenceParameters()

    def changed(self, values: Mapping[str, object]) -> MigrationParameters:
        """Return these parameters with ``values``, which are of the right types, in their places.

        Names are those of :data:`PLACES`.

        Raises:
            ConfigError: a value is out of its range; the message names it.
        """
        new: dict[str, dict[str, Any]] = {}
        for name, (group, field) in PLACES.items():
            if name in values:
                new.setdefault(group, {})[field] = values[name]
        own = new.pop("", {})
        for group, members in new.items():
            own[group] = msgspec.structs.replace(getattr(self, group), **members)
        return msgspec.structs.replace(self, **own)

    def shown(self) -> dict[str, object]:
        """Return the parameters and capabilities by their names in QMP, as JSON has them."""
        return {
            name: msgspec.to_builtins(getattr(getattr(self, group) if group else self, field))
            for name, (group, field) in PLACES.items()
        }


def _places() -> dict[str, tuple[str, str]]:
    places = {}
    everything = MigrationParameters()
    for field, name in zip(
        everything.__struct_fields__, everything.__struct_encode_fields__, strict=True
    ):
        group = getattr(everything, field)
        if isinstance(group, msgspec.Struct):
            inner = zip(group.__struct_fields__, group.__struct_encode_fields__, strict=True)
            places.update({wire: (field, member) for member, wire in inner})
        else:
            places[name] = ("", field)
    return places


#: Name in QMP -> where the value is: a field of MigrationParameters, or '', and a field in it.
PLACES = _places()


def types() -> dict[str, Any]:
    """Return the type of each parameter by its name in QMP."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(MigrationParameters):
        inner = isinstance(field.default, msgspec.Struct)
        for one in msgspec.structs.fields(field.type) if inner else (field,):
            found[one.encode_name] = one.type
    return found
