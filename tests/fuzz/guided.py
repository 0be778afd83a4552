"""A target under libFuzzer, by atheris, where that is installed (``pip install atheris``).

libFuzzer's own guidance beside the driver's: it sees comparisons, too. The corpus is the same, and
what is found is replayed by the driver.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .fuzzer import OUT
from .target import LONGEST, Target


def fuzz(target: Target, seconds: float, seed: int) -> int:
    """Fuzz for some time. libFuzzer ends the process: by status 0, or 77 with a finding."""
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: .venv/bin/pip install atheris", file=sys.stderr)
        return 2
    grown = OUT / f"{target.name}-grown"
    grown.mkdir(parents=True, exist_ok=True)
    corpus = target.corpus[0].parent if target.corpus else grown
    _instrument(atheris, target)
    options = [f"-max_total_time={int(seconds)}", f"-seed={seed}", f"-max_len={LONGEST}"]
    options += [f"-artifact_prefix={OUT}/{target.name}-", f"-timeout={int(target.limit) + 5}"]
    options += ["-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(grown), str(corpus)], target.run)
    atheris.Fuzz()
    return 0


def _instrument(atheris: object, target: Target) -> None:
    """Instrument the functions of the subject, which are loaded already."""
    for module in list(sys.modules.values()):
        path = str(Path(getattr(module, "__file__", None) or ""))
        if not any(part in path for part in target.subjects) or "/tests/" in path:
            continue
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            functions = vars(value) if isinstance(value, type) else {"": value}
            for function in functions.values():
                if hasattr(function, "__code__"):
                    atheris.instrument_func(function)
