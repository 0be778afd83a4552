"""The result for people: a table, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plan, stats

if TYPE_CHECKING:
    from rich.table import Table


def table(result: dict[str, Any]) -> None:
    """Print the result as tables and lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    for line in compared(result):
        console.print(line, highlight=False)
    for other, ratios in _RATIOS.items():
        if result[ratios]:
            console.print(_medians(result, other, result[ratios]))

    vmms = [vmm for vmm in _NAMES if any(vmm in by for by in result["lost"].values())]
    columns = [column for vmm in vmms for column in (_NAMES[vmm], "each")]
    rows = Table("packets lost a migration", *columns, title_justify="left", box=box.SIMPLE)
    for name, by in result["lost"].items():
        row = [name]
        for vmm in vmms:
            row += [
                f"{by[vmm]:g}" if vmm in by else "",
                " ".join(map(str, by["each"].get(vmm, []))),
            ]
        rows.add_row(*row)
    console.print(rows)

    if result["ratios"] or not result["ratios_base"]:
        console.print(_marks(result))
    for name, limit in result["limits"].items():
        console.print(
            f"{name}: {limit['copy']:.0f} MB/s of the socket loop's {limit['socket_loop']:.0f}"
        )
    for load, kinds in result["phases"].items():
        for kind, phases in kinds.items():
            listed = ", ".join(f"{phase} {took:g}" for phase, took in phases.items())
            console.print(f"Godwit, {load}, {kind}: {listed}", highlight=False)
    if result["disturbed"]:
        console.print(
            f"[yellow]{result['disturbed']} of {len(result['samples'])} samples were disturbed by "
            "other programs on this machine, and count only where there is no better[/yellow]"
        )
    failed = result["failures"]
    if failed["samples"] or failed["labs_died"]:
        console.print(
            f"[yellow]failed samples[/yellow]: {failed['samples']}; labs that died: "
            f"{failed['labs_died']} (see bench.json)",
            highlight=False,
        )


def compared(result: dict[str, Any]) -> list[str]:
    """Return the names of the compared programs, a line each."""
    lines = []
    if result["machine"].get("qemu"):
        lines.append(f"compared with {result['machine']['qemu']}")
    if result["settings"].get("base_commit"):
        commits = result["settings"]["base_commit"], result["settings"]["commit"]
        lines.append("compared with Godwit at {}, as base; this one is at {}".format(*commits))
    return lines


_NAMES = {plan.GODWIT: "Godwit", plan.QEMU: "QEMU", plan.BASE: "base"}
#: VMM that Godwit is compared with -> the ratios' key in the result.
_RATIOS = {plan.QEMU: "ratios", plan.BASE: "ratios_base"}


def _medians(result: dict[str, Any], other: str, ratios: dict[str, float]) -> Table:
    from rich import box
    from rich.table import Table

    rows = Table(
        "", "Godwit", "range", _NAMES[other], "range", "ratio",
        title="medians (times in ms but boot in s; sizes in MB; rates in MB/s)",
        title_justify="left", box=box.SIMPLE,
    )  # fmt: skip
    for name, by in sorted(result["medians"].items(), key=lambda item: _order(item[0])):
        ratio = ratios.get(name)
        cells = [cell for vmm in (plan.GODWIT, other) for cell in _cells(by.get(vmm))]
        rows.add_row(name, *cells, "" if ratio is None else f"{ratio:.2f}")
    return rows


def _marks(result: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    rows = Table(
        "mark", "value", "must", "aim", "", title="Godwit / QEMU; copy_2g: of the socket loop",
        title_justify="left", box=box.SIMPLE,
    )  # fmt: skip
    for name, mark in result["marks"].items():
        sign = "≥" if mark["higher"] else "≤"
        value = mark["value"]
        verdict = "[yellow]not measured[/yellow]" if value is None else "[red]FALLS SHORT[/red]"
        if mark["holds"]:
            verdict = (
                "[green]holds, aim reached[/green]" if mark["aimed"] else "[green]holds[/green]"
            )
        shown = "" if value is None else f"{value:.2f}"
        rows.add_row(name, shown, f"{sign} {mark['must']:g}", f"{sign} {mark['aim']:g}", verdict)
    return rows


#: Names in the table's order. A quantity that is not named comes last.
_FIRST = (
    "boot",
    "vmm_memory",
    "throughput",
    "round",
    "total",
    "downtime",
    "pause",
    "gap",
    "bytes",
    "disk",
    "qcow2",
    "qcow2",
)


def _order(name: str) -> tuple[int, str]:
    places = [place for place, first in enumerate(_FIRST) if name.startswith(first)]
    return (places[0] if places else len(_FIRST)), name


def _cells(spread: dict[str, Any] | None) -> tuple[str, str]:
    if spread is None:
        return "", ""
    least, most = spread["least"], spread["most"]
    return number(spread["median"]), f"{number(least)} to {number(most)} ({spread['count']})"


def number(value: float) -> str:
    """Return a number with three digits at least, and no exponent."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the ratios with their marks and medians into ``path``."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    other = plan.QEMU if result["ratios"] or not result["ratios_base"] else plan.BASE
    ratios = result[_RATIOS[other]]
    named = [mark.name for mark in stats.MARKS if mark.name in ratios]
    more = sorted(
        (name for name in ratios if name not in named and not name.startswith("gap ")),
        key=_order,
    )
    names = [*named, *more]
    figure, axis = pyplot.subplots(figsize=(9, 1.2 + 0.27 * len(names)))
    for row, name in enumerate(reversed(names)):
        value = ratios[name]
        mark = result["marks"].get(name) if other == plan.QEMU else None
        colour = "tab:gray"
        if mark:
            colour = "tab:green" if mark["holds"] else "tab:red"
            axis.plot([mark["must"]] * 2, [row - 0.4, row + 0.4], color="black")
            axis.plot([mark["aim"]] * 2, [row - 0.4, row + 0.4], color="black", linestyle=":")
        axis.barh(row, value, color=colour, alpha=0.6)
        by = result["medians"].get(name, {})
        both = " / ".join(number(by[vmm]["median"]) for vmm in (plan.GODWIT, other) if vmm in by)
        text = f"{value:.2f}" + (f"  ({both})" if both else "")
        beside = max(value, mark["must"] if mark else 0.0, mark["aim"] if mark else 0.0)
        axis.text(beside + 0.02, row, text, va="center", fontsize=7)
    axis.axvline(1, color="tab:blue", linewidth=0.8)
    axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=7)
    axis.set_xlim(0, max([1.5, *(ratios[name] * 1.25 for name in names)]))
    axis.set_title(
        f"Godwit / {_NAMES[other]}, ratio of medians (and both); line: must, dots: aim", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
