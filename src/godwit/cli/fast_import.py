"""A lighter import of msgspec, to be imported first by what starts a guest.

msgspec looks for typing_extensions first (msgspec/_utils.py), which only development tools bring
here, and with it inspect, ast and tokenize: a sixth of the start-up, which a guest waits for. The
standard library's typing has all that is used. An entry of None makes an import fail (importlib's
documentation, sys.modules).
"""

import sys

if "msgspec" not in sys.modules and "typing_extensions" not in sys.modules:
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]
    try:
        import msgspec  # noqa: F401
    finally:
        del sys.modules["typing_extensions"]
