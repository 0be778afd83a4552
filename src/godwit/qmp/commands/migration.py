"""Commands for migrations, and for their parameters and capabilities."""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.errors import ConfigError
from godwit.qmp.controller import MigrationController
from godwit.qmp.protocol import short
from godwit.spec import parameters
from godwit.spec.events import MigrationStatus
from godwit.spec.parameters import CAPABILITIES
from godwit.spec.runstate import RunState

from .announce import AnnounceInfo
from .registry import MOST, Absent, Arguments, Command, Name, Uri, states

_S = RunState


class MigrateArguments(Arguments, frozen=True):
    """Arguments of migrate, of which ``insecure`` is Godwit's own.

    Of QEMU's, ``detach`` is without effect there as well; the others have to be off.
    """

    uri: Uri
    insecure: bool = False
    detach: bool = False
    blk: bool = False
    inc: bool = False
    resume: bool = False


class IncomingArguments(Arguments, frozen=True):
    """Arguments of migrate-incoming, of which ``insecure`` is Godwit's own."""

    uri: Uri
    insecure: bool = False


class CapabilityStatus(Arguments, frozen=True):
    """One capability, on or off."""

    capability: Name
    state: bool


class CapabilityArguments(Arguments, frozen=True):
    """Arguments of migrate-set-capabilities: a capability that is left out stays as it is."""

    capabilities: Annotated[list[CapabilityStatus], MOST]


class RamInfo(msgspec.Struct, rename="kebab", frozen=True):
    """The MigrationStats of qapi/migration.json, all of which are mandatory in 7.2."""

    transferred: int
    remaining: int
    total: int
    duplicate: int
    skipped: int
    normal: int
    normal_bytes: int
    dirty_pages_rate: int
    mbps: float
    dirty_sync_count: int
    postcopy_requests: int
    page_size: int
    multifd_bytes: int
    pages_per_second: int
    precopy_bytes: int
    downtime_bytes: int
    postcopy_bytes: int
    dirty_sync_missed_zero_copy: int


class RoundInfo(msgspec.Struct, rename="kebab", frozen=True):
    """One round over RAM: Round in ``migration/report.py``."""

    pages: int
    zero_pages: int
    ms: float
    dirty_pages: int | None = None
    dirty_pages_rate: int | None = None
    cpu_throttle_percentage: int | None = None


class OwnInfo(msgspec.Struct, rename="kebab", frozen=True):
    """The figures of a migration beyond QEMU's, or finer: times in ms."""

    total_ms: float | None = None
    setup_ms: float | None = None
    downtime_ms: float | None = None
    expected_downtime_ms: float | None = None
    rounds: list[RoundInfo] | None = None
    setup_phases: dict[str, float] | None = None
    stop_phases: dict[str, float] | None = None
    destination_phases: dict[str, float] | None = None
    destination_runstates: list[str] | None = None
    runstates: list[RunState] | None = None
    handover: dict[str, object] | None = None
    announce: list[AnnounceInfo] | None = None


class MigrationInfo(msgspec.Struct, rename="kebab", frozen=True):
    """The MigrationInfo of qapi/migration.json, with Godwit's own figures under ``godwit``."""

    status: MigrationStatus | None = None
    ram: RamInfo | None = None
    total_time: int | None = None
    setup_time: int | None = None
    downtime: int | None = None
    expected_downtime: int | None = None
    cpu_throttle_percentage: int | None = None
    error_desc: str | None = None
    godwit: OwnInfo | None = None


#: Arguments of migrate-set-parameters: a parameter that is left out stays as it is.
ParameterArguments = msgspec.defstruct(
    "ParameterArguments",
    [
        (name.replace("-", "_"), kind | None, None)
        for name, kind in parameters.types().items()
        if name not in CAPABILITIES
    ],
    bases=(Arguments,),
    frozen=True,
)


#: What a query-migrate-parameters answers: parameters only.
ParameterInfo = msgspec.defstruct(
    "ParameterInfo",
    [
        (name.replace("-", "_"), kind)
        for name, kind in parameters.types().items()
        if name not in CAPABILITIES
    ],
    rename="kebab",
    frozen=True,
)

_NO_COMPRESSION = "pages are sent as they are"
_NO_MULTIFD = "a migration has one connection"
_NO_TLS = "TLS is chosen by 'godwit run --tls FOLDER' and an address 'tls:HOST:PORT'"
_NO_DISKS = "disks are not copied: both hosts need the same images"
#: The parameters of QEMU 7.2 (qapi/migration.json, MigrateSetParameters) that Godwit has not.
_ABSENT_PARAMETERS = {
    **dict.fromkeys(
        (
            "compress-level",
            "compress-threads",
            "compress-wait-thread",
            "decompress-threads",
            "xbzrle-cache-size",
        ),
        Absent((), _NO_COMPRESSION),
    ),
    **dict.fromkeys(
        ("multifd-channels", "multifd-zlib-level", "multifd-zstd-level"), Absent((), _NO_MULTIFD)
    ),
    "multifd-compression": Absent(("none",), _NO_MULTIFD),
    **dict.fromkeys(("tls-creds", "tls-hostname", "tls-authz"), Absent(("", None), _NO_TLS)),
    "block-incremental": Absent((False,), _NO_DISKS),
    "block-bitmap-mapping": Absent(([],), _NO_DISKS),
    "cpu-throttle-tailslow": Absent((False,), "the last increment is as large as the others"),
    "throttle-trigger-threshold": Absent((), "'downtime-limit' decides when vCPUs are throttled"),
    "max-postcopy-bandwidth": Absent((0,), "there is no postcopy"),
    "x-checkpoint-delay": Absent((), "there is no COLO"),
}


def _migrate(controller: MigrationController, arguments: MigrateArguments) -> None:
    for name in ("blk", "inc"):
        if getattr(arguments, name):
            raise ConfigError(f"Parameter '{name}' is true, but {_NO_DISKS}: leave it out")
    if arguments.resume:
        raise ConfigError(
            "Parameter 'resume' is true, but there is no postcopy to resume: leave it out, and the "
            "guest migrates from the beginning"
        )
    controller.migrate(arguments.uri, arguments.insecure)


def _migrate_incoming(controller: MigrationController, arguments: IncomingArguments) -> None:
    controller.migrate_incoming(arguments.uri, arguments.insecure)


def _query_migrate(controller: MigrationController, _: Arguments) -> object:
    return controller.migration_info()


def _migrate_cancel(controller: MigrationController, _: Arguments) -> None:
    controller.migrate_cancel()


def _set_parameters(controller: MigrationController, given: msgspec.Struct) -> None:
    values = zip(given.__struct_encode_fields__, msgspec.structs.astuple(given), strict=True)
    new = {name: value for name, value in values if value is not None}
    controller.parameters = controller.parameters.changed(new)


def _query_parameters(controller: MigrationController, _: Arguments) -> object:
    shown = controller.parameters.shown()
    return {name: value for name, value in shown.items() if name not in CAPABILITIES}


def _set_capabilities(controller: MigrationController, given: CapabilityArguments) -> None:
    # QEMU refuses this while a migration is under way; here it counts from the next round on.
    for status in given.capabilities:
        if status.state and status.capability not in CAPABILITIES:
            known = ", ".join(f"'{name}'" for name in CAPABILITIES)
            raise ConfigError(
                f"Capability '{short(status.capability)}' is not available; there is {known}"
            )
    # What is not there is off.
    new = {
        one.capability: one.state for one in given.capabilities if one.capability in CAPABILITIES
    }
    controller.parameters = controller.parameters.changed(new)


def _query_capabilities(controller: MigrationController, _: Arguments) -> list[CapabilityStatus]:
    shown = controller.parameters.shown()
    return [CapabilityStatus(name, bool(shown[name])) for name in CAPABILITIES]


COMMANDS = {
    "migrate": Command(_migrate, MigrateArguments, states(_S.RUNNING, _S.PAUSED)),
    "migrate-incoming": Command(_migrate_incoming, IncomingArguments, states(_S.INMIGRATE)),
    "query-migrate": Command(_query_migrate, returns=MigrationInfo),
    "migrate_cancel": Command(_migrate_cancel),
    "migrate-set-parameters": Command(
        _set_parameters, ParameterArguments, absent=_ABSENT_PARAMETERS
    ),
    "query-migrate-parameters": Command(_query_parameters, returns=ParameterInfo),
    "migrate-set-capabilities": Command(_set_capabilities, CapabilityArguments),
    "query-migrate-capabilities": Command(_query_capabilities, returns=list[CapabilityStatus]),
}
