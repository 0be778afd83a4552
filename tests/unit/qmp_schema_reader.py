"""A reader of query-qmp-schema's answer, of Godwit's or QEMU's, for the tests: paths to types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Entry = dict[str, Any]


class Reader:
    """The entries by name, checked for what qapi/introspect.json demands of each."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.by_name = {entry["name"]: entry for entry in entries}
        assert len(self.by_name) == len(entries), "a name is defined twice"

    def named(self, meta: str) -> set[str]:
        return {entry["name"] for entry in self.entries if entry["meta-type"] == meta}

    def uses(self, entry: Entry) -> list[str]:
        """The names of the types that an entry refers to."""
        kinds = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
        parts = entry.get("members", []) + entry.get("variants", [])
        return kinds + [one["type"] for one in parts if "type" in one]

    def members(self, name: str) -> dict[str, Entry]:
        """The members of an object type."""
        entry = self.by_name[name]
        assert entry["meta-type"] == "object"
        return {member["name"]: member for member in entry["members"]}

    def arguments(self, name: str) -> dict[str, Entry]:
        """The arguments of a command, or the data of an event."""
        return self.members(self.by_name[name]["arg-type"])

    def shape(self, name: str) -> str:
        """The sort of a type's values: JSON's, with those of an array's elements."""
        entry = self.by_name[name]
        match entry["meta-type"]:
            case "builtin":
                return str(entry["json-type"])
            case "array":
                return f"[{self.shape(entry['element-type'])}]"
            case "enum":
                return "string"
        return str(entry["meta-type"])

    def results(self, name: str) -> Iterator[tuple[str, str, Entry]]:
        """Path, type of the object, and member, for each member of a command's result."""
        yield from self._walk("", self.by_name[name]["ret-type"], ())

    def _walk(self, path: str, name: str, above: tuple[str, ...]) -> Iterator[Any]:
        entry = self.by_name[name]
        if entry["meta-type"] == "array":
            yield from self._walk(path + "[]", entry["element-type"], above)
        if entry["meta-type"] == "object" and name not in above:
            for member in entry["members"]:
                inner = f"{path}.{member['name']}"
                yield inner, name, member
                yield from self._walk(inner, member["type"], (*above, name))
