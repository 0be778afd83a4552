"""What a client is sent: one line of ASCII each, as QEMU's, whatever text is in it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from godwit.errors import ConfigError
from godwit.qmp import protocol
from godwit.qmp.protocol import MAX_ERROR, Session

_any_text = st.text(st.characters(), max_size=20)  # surrogates as well
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | _any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_any_text, inner, max_size=4),
    max_leaves=8,
)


class _Result(msgspec.Struct):
    text: Any


def _line(data: bytes | None) -> Any:
    assert data is not None
    assert data.isascii()
    assert data.endswith(b"\r\n")
    assert data.count(b"\n") == 1
    return json.loads(data)


def _spelled(value: Any) -> Any:
    """The value, with its surrogates spelled out, which no UTF-8 could hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_spelled(key): _spelled(one) for key, one in value.items()}
    return [_spelled(one) for one in value] if isinstance(value, list) else value


@given(_values)
def test_every_value_is_sent_in_ascii(value: object) -> None:
    spelled = _spelled(value)
    if json.dumps(spelled).count('":') < json.dumps(value).count('":'):
        return  # two names that are one once they are spelled out
    assert _line(protocol.encode({"return": value})) == {"return": spelled}
    assert _line(protocol.encode({"return": _Result(value)})) == {"return": {"text": spelled}}
    assert _line(protocol.event("X", {"text": value}, 0))["data"] == {"text": spelled}


def test_text_beyond_ascii_is_escaped_as_qemu_does_it() -> None:
    assert protocol.encode({"return": "é€😀"}) == b'{"return":"\\u00e9\\u20ac\\ud83d\\ude00"}\r\n'


def _session(error: Exception | None = None, result: object = None) -> Session:
    def execute(name: str, arguments: object) -> object:
        if error:
            raise error
        return result

    session = Session(execute)
    session.negotiated = True
    return session


def _ask(session: Session, request: str) -> Any:
    session.feed(request.encode())
    return _line(session.step())


@given(st.text(st.characters(codec="utf-8")), st.booleans(), _any_text)
def test_the_same_id_comes_back_with_any_error(tag: str, ascii_only: bool, why: str) -> None:
    request = json.dumps({"execute": "x", "id": [tag]}, ensure_ascii=ascii_only)
    assert _ask(_session(result=why), request) == {"return": _spelled(why), "id": [tag]}
    reply = _ask(_session(ConfigError(why)), request)
    assert reply["id"] == [tag]
    assert reply["error"]["desc"] == (_spelled(why) or "ConfigError")


def test_an_error_is_cut_whatever_it_quotes() -> None:
    reply = _ask(_session(ConfigError("x" * 10**6)), '{"execute": "x"}')
    assert len(reply["error"]["desc"]) == MAX_ERROR
