"""The QEMU Machine Protocol with one client: bytes in, bytes out, no sockets.

After QEMU's docs/interop/qmp-spec, and for the texts of errors what QEMU 7.2 answers
(qapi/qmp-dispatch.c, monitor/qmp.c), so that clients made for QEMU understand Godwit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

import msgspec

from godwit import __version__
from godwit.errors import ConfigError, GodwitError

from .stream import JsonStream, MalformedJson, decode

#: Executes a command: its name and arguments to the value of 'return'; raises GodwitError.
Execute = Callable[[str, Mapping[str, object]], object]

#: The members that a request may have; 'exec-oob' is not offered.
_MEMBERS = frozenset({"execute", "arguments", "id"})

#: The most of an error's text that a client is sent, characters: it may quote another's words.
MAX_ERROR = 2000

_ENCODER = msgspec.json.Encoder()
_NO_ASCII = re.compile(r"[^\x00-\x7f]+")
# QEMU ends its messages so (monitor/monitor.c, monitor_puts); lines are easy to read by hand.
_END = b"\r\n"


class CommandNotFound(ConfigError):
    """There is no such command, or not now.

    Its class is the only one in use besides GenericError.
    """


class InternalError(GodwitError):
    """A command failed in a way that nobody foresaw: a bug, but the VM goes on."""


class VersionTriple(msgspec.Struct, frozen=True):
    """The three numbers of a version."""

    major: int
    minor: int
    micro: int


class VersionInfo(msgspec.Struct, frozen=True):
    """The VersionInfo of QEMU's qapi/control.json.

    Clients insist on the member 'qemu'; 'package' is where a downstream names itself.
    """

    qemu: VersionTriple
    package: str


def version() -> VersionInfo:
    """Return the version of Godwit itself, as QEMU's clients read one."""
    triple = VersionTriple(*(int(part) for part in __version__.split(".")[:3]))
    return VersionInfo(triple, f"godwit-{__version__}")


def encode(message: Mapping[str, object]) -> bytes:
    """Return the bytes of a message: one line of JSON, in ASCII as QEMU's are.

    Text without a UTF-8 form (a path in surrogates) is sent with its escapes spelled out.
    """
    try:
        text = _ENCODER.encode(message)
    except UnicodeEncodeError:
        text = _ENCODER.encode(_without_surrogates(message))
    if not text.isascii():
        text = _NO_ASCII.sub(_escaped, text.decode()).encode()
    return text + _END


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def _without_surrogates(value: object) -> object:
    if isinstance(value, msgspec.Struct):
        value = msgspec.to_builtins(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_without_surrogates(key): _without_surrogates(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_surrogates(one) for one in value]
    return value


def event(name: str, data: Mapping[str, object] | None = None, now_ns: int | None = None) -> bytes:
    """Return an event as it is sent, at ``now_ns`` nanoseconds of the wall clock, or now."""
    now = time.time_ns() if now_ns is None else now_ns
    message: dict[str, object] = {
        "timestamp": {"seconds": now // 10**9, "microseconds": now % 10**9 // 1000},
        "event": name,
    }
    if data:
        message["data"] = data
    return encode(message)


def short(text: str, most: int = 80) -> str:
    """Return a client's text, cut to a length that is fit for an error."""
    return text if len(text) <= most else text[: most - 1] + "…"


class Session:
    """One client's connection so far: its negotiation, and its half-received request.

    Attributes:
        negotiated: whether the client has finished the negotiation; it is sent no events before.
        broken: the client sent malformed JSON; close the connection once the error is sent.
    """

    def __init__(
        self, execute: Execute, on_error: Callable[[BaseException], None] | None = None
    ) -> None:
        self.negotiated = False
        self.broken = False
        self._execute = execute
        self._on_error = on_error
        self._stream = JsonStream()

    def greeting(self) -> bytes:
        """Return the greeting, which the server sends first."""
        return encode({"QMP": {"version": version(), "capabilities": []}})

    def feed(self, data: bytes) -> None:
        """Take bytes from the client, of which nothing is executed yet."""
        self._stream.feed(data)

    def step(self) -> bytes | None:
        """Execute the next complete request and return the reply, or None if there is none yet.

        Raises nothing: whatever comes in, an error reply is the worst that follows.
        """
        if self.broken:
            return None
        try:
            text = self._stream.next()
            return None if text is None else self._reply(text, decode(text))
        except MalformedJson as error:
            self.broken = True
            return self._error(error, None)

    def _reply(self, text: bytes, request: object) -> bytes:
        tag: msgspec.Raw | None = None
        try:
            if not isinstance(request, dict):
                raise ConfigError("QMP input must be a JSON object")
            if "id" in request:
                # Any JSON value may be an id, and the client gets back the very same text: a
                # number beyond 64 bits too, which could be read but not written again.
                tag = msgspec.json.decode(text, type=dict[str, msgspec.Raw])["id"]
            result = self._dispatch(request)
            reply: dict[str, object] = {"return": {} if result is None else result}
            if tag is not None:
                reply["id"] = tag
            return encode(reply)
        except GodwitError as error:
            return self._error(error, tag)
        except Exception as error:
            # One client's command must not end the VM: both the client and the owner are notified.
            if self._on_error:
                self._on_error(error)
            unforeseen = f"internal error: {type(error).__name__}: {short(str(error), 200)}"
            return self._error(InternalError(unforeseen), tag)

    def _dispatch(self, request: dict[str, object]) -> object:
        for member, value in request.items():
            if member not in _MEMBERS:
                raise ConfigError(f"QMP input member '{short(member)}' is unexpected")
            if member == "execute" and not isinstance(value, str):
                raise ConfigError("QMP input member 'execute' must be a string")
            if member == "arguments" and not isinstance(value, dict):
                raise ConfigError("QMP input member 'arguments' must be an object")
        name = request.get("execute")
        if not isinstance(name, str):
            raise ConfigError("QMP input lacks member 'execute'")
        arguments = request.get("arguments", {})
        assert isinstance(arguments, dict)
        if self.negotiated:
            if name == "qmp_capabilities":
                raise CommandNotFound(
                    "Capabilities negotiation is already complete, command ignored"
                )
            return self._execute(name, arguments)
        if name != "qmp_capabilities":
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        self._negotiate(arguments)
        return None

    def _negotiate(self, arguments: dict[str, object]) -> None:
        for name, value in arguments.items():
            if name != "enable":
                raise ConfigError(f"Parameter '{short(name)}' is unexpected")
            if not isinstance(value, list):
                raise ConfigError("Invalid parameter type for 'enable', expected: array")
            if value:
                raise ConfigError(f"Capability '{short(str(value[0]))}' is not available")
        self.negotiated = True

    def _error(self, error: Exception, tag: msgspec.Raw | None) -> bytes:
        kind = "CommandNotFound" if isinstance(error, CommandNotFound) else "GenericError"
        desc = short(str(error) or type(error).__name__, MAX_ERROR)
        reply: dict[str, object] = {"error": {"class": kind, "desc": desc}}
        if tag is not None:
            reply["id"] = tag
        return encode(reply)
