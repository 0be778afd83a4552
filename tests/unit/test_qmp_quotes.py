"""Strings in single quotes, as QEMU's JSON parser takes them: against a plain reference."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from godwit.qmp import stream
from godwit.qmp.stream import JsonStream, MalformedJson, decode

_ESCAPES = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r"}
_ESCAPES["t"] = "\t"


class _Wrong(Exception):
    """The reference takes the text for no JSON of QEMU's."""


class _Reference:
    """QEMU's grammar (qobject/json-lexer.c, json-parser.c), a character at a time."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def whole(self) -> Any:
        value = self.value()
        if self._peek():
            raise _Wrong
        return value

    def value(self) -> Any:
        match self._peek():
            case "{":
                return dict(self._several("}", self._pair))
            case "[":
                return list(self._several("]", self.value))
            case '"' | "'":
                return self._string()
        return self._word()

    def _peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _take(self, wanted: str) -> None:
        if self._peek() != wanted:
            raise _Wrong
        self.at += 1

    def _pair(self) -> tuple[str, Any]:
        if self._peek() not in ('"', "'"):
            raise _Wrong
        name = self._string()
        self._take(":")
        return name, self.value()

    def _several(self, end: str, one: Any) -> list[Any]:
        self.at += 1
        found: list[Any] = []
        while self._peek() != end:
            if found:
                self._take(",")
            found.append(one())
        self.at += 1
        return found

    def _string(self) -> str:
        quote, found = self.text[self.at], ""
        self.at += 1
        while (char := self.text[self.at : self.at + 1]) != quote:
            if not char or char < " ":
                raise _Wrong
            self.at += 1
            found += self._escape() if char == "\\" else char
        self.at += 1
        try:  # two escapes may be one character
            return found.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise _Wrong from None

    def _escape(self) -> str:
        char = self.text[self.at : self.at + 1]
        self.at += 1
        if char != "u":
            if char not in _ESCAPES or not char:
                raise _Wrong
            return _ESCAPES[char]
        digits = self.text[self.at : self.at + 4]
        self.at += 4
        try:
            return str(json.loads(f'"\\u{digits}"'))
        except ValueError:
            raise _Wrong from None

    def _word(self) -> Any:
        end = self.at
        while end < len(self.text) and self.text[end] not in "{}[]\"', :\t\r\n":
            end += 1
        try:
            value = json.loads(self.text[self.at : end])
        except ValueError:
            raise _Wrong from None
        self.at = end
        return value


def _values(data: bytes, cuts: list[int] | None = None) -> list[Any]:
    """All values of a stream that comes in pieces, and 'malformed' where it ends so."""
    edges = [0, *sorted(cuts or []), len(data)]
    found, source = [], JsonStream()
    try:
        for start, end in itertools.pairwise(edges):
            source.feed(data[start:end])
            found += [decode(text) for text in iter(source.next, None)]
    except MalformedJson:
        found.append("malformed")
    return found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{'execute': 'qmp_capabilities'}", {"execute": "qmp_capabilities"}),
        (b"""{'a': "it's", "b": 'a "word"'}""", {"a": "it's", "b": 'a "word"'}),
        (rb"""{'a': 'it\'s', "b": "it\'s"}""", {"a": "it's", "b": "it's"}),
        (rb"""{'\\': '\"\n\u00e9'}""", {"\\": '"\né'}),
        (b"{'{': ['}', \"]\"]}", {"{": ["}", "]"]}),
        (b"''", ""),
        ("['é€']".encode(), ["é€"]),
    ],
)
def test_single_quotes_are_quotes(text: bytes, value: object) -> None:
    assert _values(text) == [value]
    assert _values(text * 2, list(range(1, 2 * len(text)))) == [value, value]


@pytest.mark.parametrize(
    "text",
    [
        *(b"{'a': \"b'}\n", b"{'a\": 1}\n", b"{'a'b': 1}\n", rb"{'a': '\x'}", b"{'a': '\t'}"),
        *(rb"{\'a\': 1}", b"{'a': 'b\xff'}", b"{'a': '\\\n'}", rb"{'a': '\u00g0'}"),
    ],
)
def test_what_qemu_does_not_take_is_not_taken(text: bytes) -> None:
    assert _values(text) == ["malformed"]


_strings = st.text(st.sampled_from("""a"'\\/{}[]:, é😀""") | st.characters(codec="utf-8"))
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | _strings,
    lambda inner: st.lists(inner) | st.dictionaries(_strings, inner),
    max_leaves=8,
)


@st.composite
def _spelled(draw: st.DrawFn) -> tuple[Any, str]:
    """A list, and a text of it in which each string is quoted and escaped as it happens."""

    def spell(value: object) -> str:
        if isinstance(value, str):
            quote = draw(st.sampled_from("\"'"))
            return quote + "".join(char(one, quote) for one in value) + quote
        if isinstance(value, dict):
            return "{" + ", ".join(f"{spell(k)}: {spell(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(spell, value)) + "]"
        return json.dumps(value)

    def char(one: str, quote: str) -> str:
        if one < " " or draw(st.integers(0, 9)) == 0:
            units = one.encode("utf-16-be").hex()
            return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
        if one in (quote, "\\") or (one in "\"'/" and draw(st.booleans())):
            return "\\" + one
        return one

    value = draw(st.lists(_json))
    return value, spell(value)


@given(_spelled(), st.data())
def test_every_spelling_has_the_same_value_however_it_is_cut(
    spelled: tuple[Any, str], data: st.DataObject
) -> None:
    value, text = spelled
    raw = text.encode()
    assert _Reference(text).whole() == value
    cuts = data.draw(st.lists(st.integers(0, len(raw))))
    assert _values(raw * 2, cuts) == [value, value]


@settings(max_examples=500)
@given(st.text("""{}[]'":,\\ \n01aunt""", max_size=30))
@example("""{'a'"b": 1}""")
@example("['']")
def test_any_text_is_taken_as_the_reference_takes_it(text: str) -> None:
    raw = f"[{text}]".encode()
    try:
        wanted: Any = _Reference(raw.decode()).whole()
    except (_Wrong, RecursionError):
        # The stream may have ended a value early, or wait: but it makes no other value of all.
        whole = JsonStream()
        whole.feed(raw)
        try:
            first = whole.next()
        except MalformedJson:
            return
        if first is not None and not whole._input[whole._at :]:
            with pytest.raises(MalformedJson):
                decode(first)
        return
    assert _values(raw) == [wanted]
    assert _values(raw, list(range(1, len(raw)))) == [wanted]


def test_the_bound_is_for_what_was_sent() -> None:
    quotes = b'"' * (stream.MAX_VALUE - 2)
    (value,) = _values(b"'" + quotes + b"'")
    assert value == quotes.decode()
    assert _values(b"'" + quotes + b'"') == []
    assert _values(b"'" + quotes + b"\"'") == ["malformed"]


def test_quotes_and_escapes_byte_by_byte_cost_no_more_than_at_once() -> None:
    # Quadratic work would take minutes here, and the suite's time limit would end it.
    text = b"'" + b"\"\\'" * 100_000 + b"'"
    assert _values(text, list(range(1, len(text)))) == ["\"'" * 100_000]
