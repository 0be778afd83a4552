"""The protocol without sockets: negotiation, streams however cut, and garbage of all kinds."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from godwit import __version__
from godwit.errors import ConfigError
from godwit.qmp import protocol, stream
from godwit.qmp.protocol import CommandNotFound, Session

NEGOTIATE = b'{"execute": "qmp_capabilities"}'


class Executor:
    """Notes the commands; 'fail...' fail in as many ways."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Mapping[str, object]]] = []

    def __call__(self, name: str, arguments: Mapping[str, object]) -> object:
        self.calls.append((name, dict(arguments)))
        if name == "fail":
            raise ConfigError("it is wrong")
        if name == "fail-unknown":
            raise CommandNotFound("The command fail-unknown has not been found")
        if name == "fail-bug":
            raise KeyError("bug")
        if name == "fail-path":
            raise ConfigError("no file /tmp/\udcff")
        if name == "fail-result":
            return {"object": object()}
        return {"n": len(self.calls)} if name == "count" else None


def _messages(data: bytes) -> list[Any]:
    lines = data.split(b"\r\n")
    assert lines.pop() == b""
    return [json.loads(line) for line in lines]


def _feed(session: Session, data: bytes) -> bytes:
    """The replies to all that is complete by now."""
    session.feed(data)
    return b"".join(iter(session.step, None))


def _session(*, negotiated: bool = True) -> tuple[Session, Executor]:
    executor = Executor()
    session = Session(executor)
    if negotiated:
        assert _messages(_feed(session, NEGOTIATE)) == [{"return": {}}]
    return session, executor


def _ask(data: bytes | str) -> list[Any]:
    return _messages(_feed(_session()[0], data.encode() if isinstance(data, str) else data))


def _error(desc: str, kind: str = "GenericError", **more: object) -> dict[str, object]:
    return {"error": {"class": kind, "desc": desc}, **more}


def test_the_greeting_has_qemus_form() -> None:
    (greeting,) = _messages(_session(negotiated=False)[0].greeting())
    version = greeting["QMP"]["version"]
    assert greeting["QMP"]["capabilities"] == []
    assert set(version["qemu"]) == {"major", "minor", "micro"}
    assert version["package"] == f"godwit-{__version__}"


def test_only_the_negotiation_is_allowed_before_it() -> None:
    session, executor = _session(negotiated=False)
    desc = "Expecting capabilities negotiation with 'qmp_capabilities'"
    assert _messages(_feed(session, b'{"execute": "count", "id": 7}')) == [
        _error(desc, "CommandNotFound", id=7)
    ]
    assert not session.negotiated
    assert _messages(_feed(session, NEGOTIATE)) == [{"return": {}}]
    assert session.negotiated
    assert _messages(_feed(session, NEGOTIATE)) == [
        _error("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
    ]
    assert executor.calls == []


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ('{"enable": ["oob"]}', "Capability 'oob' is not available"),
        ('{"enable": "oob"}', "Invalid parameter type for 'enable', expected: array"),
        ('{"disable": []}', "Parameter 'disable' is unexpected"),
    ],
)
def test_a_negotiation_that_fails_can_be_tried_again(arguments: str, desc: str) -> None:
    session, _ = _session(negotiated=False)
    request = f'{{"execute": "qmp_capabilities", "arguments": {arguments}}}'
    assert _messages(_feed(session, request.encode())) == [_error(desc)]
    assert not session.negotiated
    request = '{"execute": "qmp_capabilities", "arguments": {"enable": []}}'
    assert _messages(_feed(session, request.encode())) == [{"return": {}}]


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        ("[1]", "QMP input must be a JSON object"),
        ("42\n", "QMP input must be a JSON object"),
        ('"text"', "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        ('{"execute": 1}', "QMP input member 'execute' must be a string"),
        (
            '{"execute": "count", "arguments": []}',
            "QMP input member 'arguments' must be an object",
        ),
        ('{"execute": "count", "argument": {}}', "QMP input member 'argument' is unexpected"),
        ('{"exec-oob": "count"}', "QMP input member 'exec-oob' is unexpected"),
        ('{"execute": "fail"}', "it is wrong"),
        ('{"execute": "fail-path"}', "no file /tmp/\\udcff"),
    ],
)
def test_refusals(request_: str, reply: str) -> None:
    assert _ask(request_) == [_error(reply)]


@pytest.mark.parametrize("name", ["fail-bug", "fail-result"])
def test_a_bug_in_a_command_is_an_error_reply_and_is_reported(name: str) -> None:
    reported: list[BaseException] = []
    session = Session(Executor(), reported.append)
    _feed(session, NEGOTIATE)
    (reply,) = _messages(_feed(session, b'{"execute": "%s", "id": 1}' % name.encode()))
    assert reply["error"]["desc"].startswith("internal error: ")
    assert reply["id"] == 1
    assert len(reported) == 1
    assert _messages(_feed(session, b'{"execute": "count"}')) == [{"return": {"n": 2}}]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=8,
)


@given(json_values, st.sampled_from(["count", "fail", "fail-unknown", "fail-bug"]), st.booleans())
def test_every_id_comes_back(tag: object, name: str, ascii_only: bool) -> None:
    request = json.dumps({"execute": name, "id": tag}, ensure_ascii=ascii_only)
    (reply,) = _ask(request)
    assert reply["id"] == tag
    assert ("return" in reply) == (name == "count")


def test_an_id_beyond_64_bits_comes_back_as_it_was() -> None:
    session, _ = _session()
    assert b'"id":123456789012345678901234567890}' in _feed(
        session, b'{"execute": "count", "id": 123456789012345678901234567890}'
    )


requests = st.lists(
    st.tuples(
        st.sampled_from(["", " ", "\n", "\r\n", "\t"]),
        st.fixed_dictionaries(
            {"execute": st.just("count")},
            optional={
                "arguments": st.dictionaries(st.text('a"\\{}[é€', max_size=6), json_values),
                "id": json_values,
            },
        ),
        st.booleans(),
    ),
    max_size=6,
)


@given(requests, st.data())
def test_however_the_stream_is_cut_the_commands_are_the_same(
    wanted: list[tuple[str, dict[str, Any], bool]], data: st.DataObject
) -> None:
    whole = "".join(
        blank + json.dumps(request, ensure_ascii=ascii_only)
        for blank, request, ascii_only in wanted
    ).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))))
    session, executor = _session()
    replies = b"".join(
        _feed(session, whole[start:end])
        for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)
    )
    assert executor.calls == [(r["execute"], r.get("arguments", {})) for _, r, _ in wanted]
    assert [reply["return"]["n"] for reply in _messages(replies)] == [
        number + 1 for number in range(len(wanted))
    ]


noise = st.binary(max_size=60) | st.text("{}[]'\":,\\ \n\r\t\x01truefalse019.-e", max_size=60).map(
    str.encode
)


@settings(max_examples=500)
@given(st.lists(noise, max_size=6))
@example([b'"', b"\\"])
@example([b'{"execute": "count"}', b"\xff"])
def test_garbage_is_answered_by_errors_only_and_by_one_if_it_is_no_json(
    pieces: list[bytes],
) -> None:
    session, executor = _session()
    replies = b""
    for piece in pieces:
        before = session.broken
        found = _feed(session, piece)
        assert not (before and found)
        replies += found
    for reply in _messages(replies):
        assert set(reply) - {"id"} in ({"error"}, {"return"})
    assert len(executor.calls) == sum("return" in reply for reply in _messages(replies))
    # However it is cut, it is the same garbage.
    whole, again = _session()
    assert _feed(whole, b"".join(pieces)) == replies
    assert (whole.broken, again.calls) == (session.broken, executor.calls)


@pytest.mark.parametrize(
    ("garbage", "says"),
    [
        (b"garbage\n", "QMP input must be a JSON object"),
        (b"}\n", "QMP input must be a JSON object"),
        (b"42 ", "QMP input must be a JSON object"),
        # qmp-spec, 'Forcing the JSON parser into known-good state'.
        (b"\xff", "QMP input must be a JSON object"),
        (b"\x01", "QMP input must be a JSON object"),
        (b'{"execute": "count"]', "unexpected ']'"),
        (b'{"execute": "count",}', "trailing comma"),
        (b"{'execute': 'a forgotten quote}\n", "unexpected byte 0x0a"),
        (b'{"execute": "a forgotten quote}\n', "unexpected byte 0x0a"),
        (b'{"execute": "\xff', "unexpected byte 0xff"),
        (b'{"execute": "count"\x01', "unexpected byte 0x01"),
        (b'{"execute": "\\\n"}', "JSON parse error"),
        (b'{"id": "\xc3("}', "JSON parse error"),
        (b'{"id": "\\ud800"}', "JSON parse error"),
        (b'{"id": NaN}', "JSON parse error"),
        (b"{" + b'"a":{' * 200, "nested more than 100 levels deep"),
        (b"[" * 5000, "nested more than 100 levels deep"),
    ],
)
def test_malformed_json_breaks_the_session(garbage: bytes, says: str) -> None:
    session, executor = _session()
    first, second = b'{"execute": "count", "id": 1}', b'{"execute": "count", "id": 2}'
    before, error = _messages(_feed(session, first + garbage + second))
    assert before == {"return": {"n": 1}, "id": 1}
    assert error["error"]["class"] == "GenericError"
    assert says in error["error"]["desc"]
    assert session.broken
    assert _feed(session, second) == b""
    assert executor.calls == [("count", {})]


@pytest.mark.parametrize("request_", [b"[1]", b'"text"', b"{}", b'{"execute": 1}'])
def test_a_wrong_request_that_is_json_breaks_nothing(request_: bytes) -> None:
    session, _ = _session()
    wrong, right = _messages(_feed(session, request_ + b'{"execute": "count"}'))
    assert set(wrong) == {"error"}
    assert right == {"return": {"n": 1}}
    assert not session.broken


def test_what_has_no_end_breaks_the_session() -> None:
    session, _ = _session()
    piece = b'{"execute": "' + b"x" * 65536
    replies = _feed(session, piece)
    for _ in range(stream.MAX_VALUE // 65536 + 1):
        replies += _feed(session, b"x" * 65536)
    (reply,) = _messages(replies)
    assert str(stream.MAX_VALUE) in reply["error"]["desc"]
    assert session.broken
    assert _feed(session, NEGOTIATE) == b""


def test_the_longest_value_is_still_taken() -> None:
    session, executor = _session()
    frame = '{"execute": "count", "arguments": {"x": "%s"}}'
    text = "y" * (stream.MAX_VALUE - len(frame) + 2)
    assert _messages(_feed(session, (frame % text).encode())) == [{"return": {"n": 1}}]
    assert executor.calls == [("count", {"x": text})]


def test_byte_by_byte_costs_no_more_than_at_once() -> None:
    # Quadratic scanning would take minutes here, and the suite's time limit would end it.
    session, executor = _session()
    text = "y" * 200_000
    for byte in f'{{"execute": "count", "arguments": {{"x": "{text}"}}}}'.encode():
        _feed(session, bytes([byte]))
    assert executor.calls == [("count", {"x": text})]


def test_escapes_and_brackets_in_strings_byte_by_byte() -> None:
    session, executor = _session()
    arguments = {'"}\\': ['\\"]', "\\\\", "{[", "\u00e9\u20ac\U0001f600"]}
    request = {"execute": "count", "arguments": arguments}
    for text in (json.dumps(request), json.dumps(request, ensure_ascii=False)):
        for byte in text.encode():
            _feed(session, bytes([byte]))
    assert executor.calls == [("count", arguments)] * 2


def test_long_names_are_cut_in_errors() -> None:
    (reply,) = _ask('{"%s": 1}' % ("x" * 100_000))
    assert len(reply["error"]["desc"]) < 200


def test_an_event_on_the_wire() -> None:
    wire = protocol.event("STOP", now_ns=1_700_000_000_123_456_789)
    assert _messages(wire) == [
        {"timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456}, "event": "STOP"}
    ]
    (message,) = _messages(protocol.event("MIGRATION", {"status": "active"}))
    assert message["data"] == {"status": "active"}
