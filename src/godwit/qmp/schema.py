"""The answer to query-qmp-schema: commands and events in the SchemaInfo of qapi/introspect.json.

The types of arguments and results are its only source, and msgspec checks arguments by the same
types. As in QEMU, names of types are without meaning; arrays have their element's in
brackets, and an optional member has a default of null.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec

from godwit.qmp.commands.registry import Command
from godwit.spec import events
from godwit.spec.events import Event

#: QEMU's built-in types: Python's -> (name, json-type).
_BUILTIN = {
    str: ("str", "string"),
    bool: ("bool", "boolean"),
    int: ("int", "int"),
    float: ("number", "number"),
    type(None): ("null", "null"),
}
#: Where the code knows no more: an object with any members, or any value.
_ANY = ("any", "value")

Entry = dict[str, object]


class QmpCapability(enum.StrEnum):
    """The protocol's one capability, which is not offered: the greeting lists what is."""

    OOB = "oob"


class NegotiationArguments(msgspec.Struct, frozen=True):
    """Arguments of qmp_capabilities, the protocol's own command."""

    enable: list[QmpCapability] | None = None


def describe(commands: Mapping[str, Command]) -> list[Entry]:
    """Return the entries of all commands and events, and of the types that these use."""
    schema = _Schema()
    schema.command("qmp_capabilities", NegotiationArguments, None)
    for name, command in commands.items():
        schema.command(name, command.arguments, command.returns)
    for event in Event:
        schema.event(event)
    return schema.entries


class _Schema:
    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._names: dict[object, str] = {}
        self._count = 0

    def command(self, name: str, arguments: type[msgspec.Struct], returns: object) -> None:
        entry: Entry = {"name": name, "meta-type": "command"}
        self.entries.append(entry)
        entry["arg-type"] = self._struct(arguments)
        entry["ret-type"] = self._empty() if returns is None else self._type(returns)

    def event(self, event: Event) -> None:
        entry: Entry = {"name": str(event), "meta-type": "event"}
        self.entries.append(entry)
        members = [(name, events.type_of(event, name), True) for name in event.members]
        entry["arg-type"] = self._object(event, members) if members else self._empty()

    def _type(self, kind: Any) -> str:
        """Return the name of a type, with a new entry if there was none."""
        origin = get_origin(kind)
        if origin is Annotated:
            return self._type(get_args(kind)[0])
        if origin in (Union, types.UnionType):
            return self._alternate([self._type(one) for one in get_args(kind)])
        if origin is list:
            return self._array(self._type(get_args(kind)[0]))
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self._struct(kind)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return self._enum(kind)
        return self._builtin(*_BUILTIN.get(kind, _ANY))

    def _struct(self, kind: type[msgspec.Struct]) -> str:
        fields = msgspec.structs.fields(kind)
        if not fields:
            return self._empty()
        members = []
        for field in fields:
            # None stands for a member that is left out, where that is its default.
            left_out = field.default is None
            inner = _without_none(field.type) if left_out else field.type
            members.append((field.encode_name, inner, field.required))
        return self._object(kind, members)

    def _object(self, key: object, members: list[tuple[str, Any, bool]]) -> str:
        name, new = self._named(key)
        if new:
            entry: Entry = {"name": name, "meta-type": "object"}
            self.entries.append(entry)
            entry["members"] = [
                {"name": member, "type": self._type(kind)} | ({} if required else {"default": None})
                for member, kind, required in members
            ]
        return name

    def _enum(self, kind: type[enum.Enum]) -> str:
        name, new = self._named(kind)
        if new:
            values = [one.value for one in kind]
            # QEMU has both, the older 'values' for clients from before 6.2.
            entry: Entry = {"name": name, "meta-type": "enum", "values": values}
            self.entries.append(entry | {"members": [{"name": value} for value in values]})
        return name

    def _alternate(self, kinds: list[str]) -> str:
        name, new = self._named(tuple(kinds))
        if new:
            members = [{"type": kind} for kind in kinds]
            self.entries.append({"name": name, "meta-type": "alternate", "members": members})
        return name

    def _array(self, element: str) -> str:
        name = f"[{element}]"
        if name not in self._names:
            self._names[name] = name
            self.entries.append({"name": name, "meta-type": "array", "element-type": element})
        return name

    def _builtin(self, name: str, json_type: str) -> str:
        if name not in self._names:
            self._names[name] = name
            self.entries.append({"name": name, "meta-type": "builtin", "json-type": json_type})
        return name

    def _empty(self) -> str:
        return self._object((), [])

    def _named(self, key: object) -> tuple[str, bool]:
        """Return the name of a type of ours, and whether it is new."""
        new = key not in self._names
        if new:
            self._names[key] = str(self._count)
            self._count += 1
        return self._names[key], new


def _without_none(kind: Any) -> Any:
    left = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) not in (Union, types.UnionType) or not left:
        return kind
    return left[0] if len(left) == 1 else Union[tuple(left)]  # noqa: UP007
