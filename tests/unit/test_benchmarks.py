"""The benchmark's pure parts: the plan, what is read from smaps, medians, ratios and marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import machines, memory, plan, result, show, stats
from benchmarks.disk import Disk
from lab.errors import LabError


def row(
    vmm: str, part: str, repetition: int = 0, state: str = "done", **sample: Any
) -> dict[str, Any]:
    guest = next(name for name, parts in plan.PARTS.items() if part in parts)
    if vmm == plan.IN_PROCESS:
        guest = "in-process"
    return {
        "state": state, "guest": guest, "vmm": vmm, "part": part, "repetition": repetition, **sample
    }  # fmt: skip


def moved(vmm: str, part: str, **more: Any) -> dict[str, Any]:
    sample = {"total_ms": 1000.0, "downtime_ms": 50.0, "pause_ms": 60.0, "bytes": 80_000_000}
    return row(vmm, part, **{**sample, **more})


# --- the plan -------------------------------------------------------------------------------------
def test_the_vmms_take_turns_in_being_first() -> None:
    planned = plan.jobs(2)
    first = [next(job.vmm for job in planned if job.repetition == n) for n in (0, 1)]
    assert first == [plan.GODWIT, plan.QEMU]


def test_three_vmms_take_turns() -> None:
    planned = plan.jobs(3, (plan.BASE, plan.QEMU))
    turns = [[j.vmm for j in planned if (j.repetition, j.guest) == (n, "hot")] for n in range(3)]
    godwit, base, qemu = plan.GODWIT, plan.BASE, plan.QEMU
    assert turns == [[godwit, base, qemu], [base, qemu, godwit], [qemu, godwit, base]]


def test_another_godwit_is_measured_without_qemu() -> None:
    for planned in (plan.jobs(2, (plan.BASE,)), plan.quick_jobs((plan.BASE,))):
        assert {job.vmm for job in planned} == {plan.GODWIT, plan.BASE}
        parts = {part for job in planned if job.vmm == plan.BASE for part in job.parts}
        assert {"boot", "memory", "idle", "hot", "2g"} <= parts
        assert "limit" not in parts


def test_a_job_is_left_without_the_parts_that_are_had() -> None:
    planned = [plan.Job("small", plan.QEMU, 0, ("boot", "idle", "tcp"))]
    rows = [row(plan.QEMU, "boot", state="began"), row(plan.QEMU, "boot")]
    assert plan.left(planned, rows) == [plan.Job("small", plan.QEMU, 0, ("idle", "tcp"))]


def test_a_part_under_which_labs_died_is_given_up() -> None:
    planned = [plan.Job("hot", plan.GODWIT, 0, ("hot",))]
    began = row(plan.GODWIT, "hot", state="began")
    assert plan.left(planned, [began]) == planned
    assert plan.left(planned, [began, {"state": "lab died"}, began]) == []


def test_some_parts_may_be_chosen() -> None:
    planned = plan.only_parts(plan.jobs(1), ["idle", "limit"])
    assert [(job.guest, job.vmm, job.parts) for job in planned] == [
        ("small", plan.GODWIT, ("idle",)),
        ("small", plan.QEMU, ("idle",)),
        ("large", plan.GODWIT, ("limit",)),
    ]


def test_a_job_survives_json() -> None:
    job = plan.Job("small", plan.GODWIT, 3, ("boot", "memory"))
    assert plan.Job.from_json(job.to_json()) == job


# --- memory ---------------------------------------------------------------------------------------
def mapping(kilobytes: int, pss: int, flags: str) -> str:
    return (
        f"7f0000000000-7f0008000000 rw-p 00000000 00:00 0 \n"
        f"Size:           {kilobytes} kB\nRss:            {2 * pss} kB\n"
        f"Pss:            {pss} kB\nVmFlags: {flags} \n"
    )


def test_guest_ram_is_what_was_advised_huge_pages() -> None:
    text = mapping(131072, 90000, "rd wr mr mw me dc ac hg") + mapping(4096, 100, "rd wr mr mw")
    text += mapping(256, 7, "rd wr hg")  # a ROM: too small for RAM
    assert memory.beyond_ram(text) == memory.Memory(pss=107, rss=214, ram=131072)


# --- statistics -----------------------------------------------------------------------------------
def test_a_spread_needs_numbers() -> None:
    assert stats.spread([3, 1, 2, float("nan")]) == stats.Spread(2, 1, 3, 3)
    assert stats.spread([float("inf")]) is None


def test_ratios_are_of_medians() -> None:
    rows = [moved(plan.GODWIT, "hot", downtime_ms=ms) for ms in (10, 40, 90)]
    rows += [moved(plan.QEMU, "hot", downtime_ms=ms) for ms in (79, 81)]
    assert stats.ratios(stats.quantities(rows))["downtime_hot"] == pytest.approx(0.5)


def test_the_gap_is_that_of_the_worst_flow() -> None:
    rows = [
        moved(plan.GODWIT, "idle", gap_ms={"vlan100 ipv4": 60, "vlan100 ipv6": 90}),
        moved(plan.QEMU, "idle", gap_ms={"vlan100 ipv4": 100, "vlan100 ipv6": 100}),
    ]
    assert stats.ratios(stats.quantities(rows))["gap"] == pytest.approx(0.9)


def test_the_in_process_backend_is_compared_with_qemus_vhost() -> None:
    rows = [
        row(plan.IN_PROCESS, "network", out=2e6, **{"in": 4e6}, round_trip_ms=4.0),
        row(plan.QEMU, "network", out=5e6, **{"in": 7e6}, round_trip_ms=1.0),
    ]
    found = stats.ratios(stats.quantities(rows))
    assert found["throughput_in_process"] == pytest.approx(0.5)
    assert found["round_trip_in_process"] == pytest.approx(4)


def test_the_copy_is_held_against_the_socket_loop() -> None:
    rows = [
        moved(plan.GODWIT, "2g", bytes=1_500_000_000, total_ms=5000.0),
        row(plan.GODWIT, "limit", rate=500e6),
    ]
    (found,) = stats.limits(rows, stats.quantities(rows)).values()
    assert found == {"of": pytest.approx(0.6), "copy": 300, "socket_loop": 500}


@pytest.mark.parametrize(("value", "holds"), [(0.6, True), (0.61, False), (None, False)])
def test_a_mark_holds_up_to_its_value(value: float | None, holds: bool) -> None:
    assert stats.Mark("gap", 0.6, 0.4).holds(value) is holds


def test_throughput_has_to_be_high() -> None:
    mark = stats.Mark("throughput_vhost", 0.95, 1.0, higher=True)
    assert mark.holds(0.96)
    assert not mark.aimed(0.96)
    assert not mark.holds(0.9)


def test_phases_are_told_by_their_length() -> None:
    report = {"stop-phases": {"vcpus-stopped": 2.0, "save": 5.0}, "rounds": []}
    rows = [moved(plan.GODWIT, "idle", report=report)]
    assert stats.phases(rows) == {"idle": {"stop-phases": {"vcpus-stopped": 2.0, "save": 3.0}}}


def test_lost_packets_are_named_for_both() -> None:
    counts = {"to_guest": 5, "from_guest": 1}
    rows = [
        moved(plan.GODWIT, "udp", udp={"untagged ipv4": {**counts, "to_guest": 0}}),
        moved(plan.QEMU, "udp", udp={"untagged ipv4": counts}),
    ]
    found = stats.lost(rows)["UDP to guest untagged ipv4"]
    assert found == {"godwit": 0, "qemu": 5, "each": {"godwit": [0], "qemu": [5]}}


def test_a_disturbed_sample_counts_only_where_there_is_no_better() -> None:
    rows: list[dict[str, Any]] = []
    for vmm, at in ((plan.GODWIT, 100.0), (plan.GODWIT, 200.0), (plan.QEMU, 300.0)):
        rows += [row(vmm, "hot", state="began", at=at), moved(vmm, "hot", at=at + 10)]
    shares = [(105.0, 0.4), (106.0, 0.6), (205.0, 0.1), (305.0, 0.9)]
    samples = stats.with_others([*rows, {"state": "others", "seen": shares}])
    assert [sample["others"] for sample in samples] == [0.5, 0.1, 0.9]
    assert stats.undisturbed(samples) == samples[1:]


def test_godwit_is_held_against_another_godwit() -> None:
    rows = [moved(plan.GODWIT, "hot", downtime_ms=20.0, gap_ms={}) for _ in range(3)]
    report = {"stop-phases": {"save": 1000.0}, "rounds": []}
    rows += [moved(plan.BASE, "hot", downtime_ms=40.0, report=report)]
    rows += [{"state": "settings"}]
    judged = result.judge(rows, {"commit": "new", "base_commit": "old"})
    assert judged["ratios_base"]["downtime_hot"] == pytest.approx(0.5)
    assert judged["ratios"] == {}
    assert judged["medians"]["downtime_hot"][plan.BASE]["median"] == 40
    assert judged["phases"] == {}  # they are this Godwit's alone
    assert show.compared(judged) == ["compared with Godwit at old, as base; this one is at new"]


def test_the_result_is_shown_for_whatever_was_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {"state": "machine", "qemu": "QEMU emulator version 10.0"}
    for vmm, shown in ((plan.QEMU, "Godwit / QEMU"), (plan.BASE, "base")):
        rows = [moved(plan.GODWIT, "hot"), moved(vmm, "hot"), machine]
        judged = result.judge(rows, {})
        show.table(judged)
        out = capsys.readouterr().out
        assert shown in out
        assert "compared with QEMU emulator version 10.0" in out
        show.draw(judged, tmp_path / f"{vmm}.svg")
        assert (tmp_path / f"{vmm}.svg").exists()
    assert "mark" not in out  # which are QEMU's
    assert "QEMU" not in out.replace("QEMU emulator", "")


# --- what is compared -----------------------------------------------------------------------------
def _compared(*argv: str) -> command.Compared:
    return command.Compared.of(command._parser().parse_args(argv))


def _checkout(folder: Path, file: str) -> Path:
    (folder / "src/godwit" / file).parent.mkdir(parents=True)
    (folder / "src/godwit" / file).touch()
    (folder / "src/godwit/__init__.py").touch()
    return folder


def test_programs_are_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = tmp_path / "qemu"
    with pytest.raises(LabError, match="no such file"):
        _compared("--qemu", str(qemu))
    qemu.write_text("#!/bin/sh\n")
    qemu.chmod(0o755)
    base = _checkout(tmp_path / "base", "cli.py")
    assert _compared("--qemu", str(qemu)) == command.Compared((plan.QEMU,), str(qemu), "")
    monkeypatch.chdir(tmp_path)
    assert _compared("--qemu", "./qemu").qemu == str(qemu)
    found = _compared("--base", str(base))
    assert (found.vmms, found.base) == ((plan.BASE,), str(base))
    found = _compared("--base", str(base), "--qemu", str(qemu))
    assert (found.vmms, found.qemu) == ((plan.BASE, plan.QEMU), str(qemu))


def test_an_older_checkout_has_another_command(tmp_path: Path) -> None:
    assert machines.base_module(_checkout(tmp_path / "old", "cli.py")) == "godwit.cli"
    assert machines.base_module(_checkout(tmp_path / "new", "cli/main.py")) == "godwit.cli.main"
    with pytest.raises(LabError, match=r"the tree to compare with, .*/none: no src/godwit"):
        machines.base_module(tmp_path / "none")


def test_another_checkout_runs_its_own_code(tmp_path: Path) -> None:
    base = _checkout(tmp_path, "cli.py")
    text = "import sys; print('base', __file__, *sys.argv[1:])"
    (base / "src/godwit/cli.py").write_text(text)
    with machines.Base("a", tmp_path, ["--cpus", "2"], None, base) as vm:
        assert vm.wait() == 0
        socket = tmp_path / "a.qmp"
        assert vm.console == f"base {base}/src/godwit/cli.py run --qmp {socket} --cpus 2\n"


def test_failures_are_counted_by_vmm() -> None:
    rows = [
        row(plan.QEMU, "hot", state="began"),
        row(plan.QEMU, "hot", state="failed", error="frozen"),
        row(plan.GODWIT, "hot", state="began"),
        row(plan.GODWIT, "hot"),
        {"state": "lab died", "error": "int3"},
    ]
    found = stats.failures(rows)
    assert found == {"samples": {"qemu hot": 1}, "labs_died": 1, "said": ["frozen", "int3"]}


def test_a_result_without_samples_has_marks_that_do_not_hold() -> None:
    judged = result.judge([], {"quick": True})
    assert judged["ratios"] == {}
    assert not any(mark["holds"] for mark in judged["marks"].values())


def test_what_the_time_cut_off_has_not_failed() -> None:
    rows = [row(plan.QEMU, "hot", state="began"), {"state": "time is up"}]
    assert stats.failures(rows)["samples"] == {}
    planned = [plan.Job("hot", plan.QEMU, 0, ("hot",))]
    assert plan.left(planned, rows * plan.ATTEMPTS) == planned


# --- disks ----------------------------------------------------------------------------------------
def test_a_disks_rates_are_compared_and_marked() -> None:
    rows = [
        row(plan.GODWIT, "fio", fio={"seq_read": [190e6, 170e6], "rand_read_1": [4e6]}),
        row(plan.QEMU, "fio", fio={"seq_read": [200e6, 180e6], "rand_read_1": [2e6]}),
    ]
    quantities = stats.quantities(rows)
    assert quantities["disk_seq_read"] == {plan.GODWIT: [190.0, 170.0], plan.QEMU: [200.0, 180.0]}
    ratios = stats.ratios(quantities)
    assert ratios["disk_rand_read_1"] == 2.0
    (mark,) = (mark for mark in stats.MARKS if mark.name == "disk_seq_read")
    assert mark.holds(ratios["disk_seq_read"])
    assert not mark.holds(0.89)


def test_a_turn_in_a_slow_minute_is_slow_for_both() -> None:
    """By medians alone it would be 0.55."""
    rates = {plan.GODWIT: [220.0, 240.0, 110.0, 105.0, 100.0], plan.QEMU: [200.0] * 3 + [100.0] * 2}
    assert stats.ratios({"disk_seq_read": rates})["disk_seq_read"] == pytest.approx(1.05)
    assert stats.ratios({"boot": rates})["boot"] == pytest.approx(0.55)
    for rates in ({plan.GODWIT: []}, {plan.GODWIT: [1.0]}, {plan.GODWIT: [1.0], plan.QEMU: []}):
        assert "disk_seq_read" not in stats.ratios({"disk_seq_read": rates}), "a turn of one alone"


def test_a_job_of_disks_is_done_once_all_vmms_have_their_samples() -> None:
    """The lab may die between two rows, and --base may come with --resume."""
    (job, *_) = plan.only_parts(plan.jobs(1), ["fio"])
    rows = [row(plan.GODWIT, "fio", state="began"), row(plan.GODWIT, "fio")]
    assert plan.left([job], rows) == [job]
    rows.append(row(plan.QEMU, "fio"))
    assert plan.left([job], rows) == []
    further = plan.Job(job.guest, job.vmm, 0, job.parts, (plan.QEMU, plan.BASE))
    assert plan.left([further], rows) == [further]


def test_disks_are_looked_at_by_turns() -> None:
    """One job has the guests of all VMMs, and its looks come back from a plan in JSON."""
    found = plan.only_parts(plan.jobs(3, (plan.QEMU, plan.BASE)), ["fio"])
    assert found == [
        plan.Job("disk", plan.GODWIT, number, ("fio",), (plan.QEMU, plan.BASE))
        for number in range(plan.DISK_REPETITIONS)
    ]
    (quick,) = plan.only_parts(plan.quick_jobs(), ["fio"])
    assert quick.looks < found[0].looks
    assert plan.Job.from_json(json.loads(json.dumps(quick.to_json()))) == quick


def test_both_vmms_get_the_same_disk() -> None:
    disk = Disk(Path("/run/x.raw"), readonly=True)
    assert disk.godwit() == ["--disk", "path=/run/x.raw,readonly"]
    drive, device = disk.qemu(1)[1], disk.qemu(1)[3]
    assert "file=/run/x.raw" in drive
    assert "cache=writeback" in drive
    assert "readonly=on" in drive
    assert device == "virtio-blk-pci,drive=disk1"
