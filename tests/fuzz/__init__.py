"""Fuzzers of whatever takes bytes from a guest, a peer, a client or a file."""

import sys
from pathlib import Path

_TESTS = Path(__file__).parent.parent
#: The benches of the unit tests, and the recorded streams, are what the fuzzers run on.
for _folder in ("unit", "streams"):
    if str(_TESTS / _folder) not in sys.path:
        sys.path.append(str(_TESTS / _folder))
