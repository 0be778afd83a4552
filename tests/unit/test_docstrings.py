"""The docstrings of the package: their form, and words that it has given up.

The sources are parsed, and not imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2] / "src/godwit"

#: First words that leave the thing unnamed.
VAGUE = {"What", "Whether", "Of", "How", "As", "Who", "Whom", "Where", "When", "Whenever", "If"}
#: At least so many words: a shorter sentence repeats the name.
FEWEST_WORDS = 5
#: Pronouns for a thing that may be out of sight; each noun repeated costs a word and spares a look.
PRONOUN = re.compile(r"\b(it|its|they|those|that)\b", re.IGNORECASE)
#: Pronouns per 1,000 words of all docstrings. It may only fall.
MOST_PRONOUNS = 26
#: The first words of functions. A new one is a verb in the imperative.
_VERBS = """
Add Announce Answer Append Ask Assemble Back Become Begin Build Call Cancel Carry Change Check
Clear Close Collect Connect Copy Count Deliver Disable Do Drop End Enter Execute Fill Find Flush
Forget Free Give Go Hand Handle Have Ignore Import Install Interrupt Introduce Judge Keep Learn
Leave Lend Let Listen Load Log Look Lose Make Map Migrate Move Note Notify Open Park Pass Pause
Place Plug Populate Prepare Press Print Put Query Raise React Read Reboot Receive Refuse Remember
Remove Repeat Replace Report Requeue Reserve Reset Rest Restore Resume Return Run Scan Send Serve
Set Show Signal Stand Start Stop Store Switch Sync Take Throw Undo Wait Watch Write Yield
"""
VERBS = frozenset(_VERBS.split())

#: Words that the package does not use, and the files that have to.
GIVEN_UP: dict[str, list[str]] = {
    "please": [],
    "offence": [],
    "foresight": [],
    # IEEE 802.3's and 802.11's name for a host on a network, in citations of both.
    "station": ["announce/frames.py", "host/net/ethernet.py"],
    "ladder": [],
    "urgency": [],
}

Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Thing(NamedTuple):
    """A module, class or function, and its place."""

    place: str
    node: Node
    public: bool

    @property
    def doc(self) -> str | None:
        """The docstring, without its indentation."""
        return ast.get_docstring(self.node)

    @property
    def is_function(self) -> bool:
        """True for a function or method that is no property."""
        if isinstance(self.node, ast.Module | ast.ClassDef):
            return False
        names = {getattr(one, "attr", getattr(one, "id", "")) for one in self.node.decorator_list}
        return not names & {"property", "cached_property"}


def _within(node: Node, place: str, public: bool) -> Iterator[Thing]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        setter = any(getattr(one, "attr", "") == "setter" for one in child.decorator_list)
        shown = public and not child.name.startswith("_") and not setter
        # What a function defines is its own.
        shown = shown and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        name = f"{place} {child.name}"
        yield Thing(name, child, shown)
        yield from _within(child, name, shown)


def _things() -> Iterator[Thing]:
    for path in sorted(ROOT.rglob("*.py")):
        place = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_text())
        yield Thing(place, tree, True)
        yield from _within(tree, place, True)


THINGS = list(_things())


def first_sentence(doc: str) -> str:
    """Return the first sentence of a docstring, at most its first paragraph."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"\.(?=\s|$)", paragraph)[0]


def words(text: str) -> list[str]:
    """Return the words of a sentence; a name in backquotes is one, whatever it holds."""
    return re.findall(r"[\w/'-]+", re.sub(r"``.*?``|:\w+:`.*?`", "name", text))


def _first_sentences() -> Iterator[tuple[Thing, str]]:
    for thing in THINGS:
        if thing.doc is not None:
            yield thing, first_sentence(thing.doc)


def test_the_package_is_found() -> None:
    assert len(THINGS) > 1000


def test_everything_public_has_a_docstring() -> None:
    assert [thing.place for thing in THINGS if thing.public and not thing.doc] == []


def test_a_first_sentence_names_the_thing() -> None:
    found = [(t.place, s) for t, s in _first_sentences() if words(s)[0] in VAGUE]
    assert found == []


def test_a_first_sentence_is_one() -> None:
    found = [(t.place, s) for t, s in _first_sentences() if ";" in re.sub(r"``.*?``", "", s)]
    assert found == []


def test_a_first_sentence_is_more_than_the_name() -> None:
    found = [(t.place, s) for t, s in _first_sentences() if len(words(s)) < FEWEST_WORDS]
    assert found == []


def test_a_function_begins_with_a_verb() -> None:
    found = [
        (t.place, s) for t, s in _first_sentences() if t.is_function and words(s)[0] not in VERBS
    ]
    assert found == [], "no verb, or one to be added to VERBS"


def test_things_are_named_and_not_pointed_at() -> None:
    text = " ".join(thing.doc for thing in THINGS if thing.doc)
    rate = 1000 * len(PRONOUN.findall(text)) / len(re.findall(r"[A-Za-z0-9']+", text))
    assert rate <= MOST_PRONOUNS


@pytest.mark.parametrize("word", GIVEN_UP)
def test_words_that_were_given_up(word: str) -> None:
    pattern = re.compile(rf"\b{word}s?\b", re.IGNORECASE)
    found = [
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.rglob("*.py"))
        if pattern.search(path.read_text().replace("_", " "))
    ]
    assert found == GIVEN_UP[word]


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Send it.", "Send it"),
        ("Send ``a.b`` to\nall of them. Raises OSError.", "Send ``a.b`` to all of them"),
        ("Return 1.5 seconds\n\nor more.", "Return 1.5 seconds"),
    ],
)
def test_where_a_first_sentence_ends(doc: str, sentence: str) -> None:
    assert first_sentence(doc) == sentence
