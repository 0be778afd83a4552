"""Running commands: probe, job files, results, and the machine itself as the lab."""

import os
import select
import subprocess
import time
from pathlib import Path

import pytest

from godwit.client.kvm import why_unusable
from lab import emulator, host, kernels
from lab.errors import LabCrashed, LabError, LabTimeout


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GODWIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "device", "reason"),
    [
        ("fpu vme svm_lock", "yes", "neither vmx nor svm"),
        ("fpu svm", "no", "is missing: load kvm"),
        ("fpu vmx", "yes", None),
    ],
)
def test_why_kvm_is_unusable(tmp_path: Path, flags: str, device: str, reason: str | None) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: svm\n")
    (tmp_path / "yes").touch()
    why = why_unusable(str(tmp_path / device), str(tmp_path / "cpuinfo"))
    if reason is None:
        assert why is None
    else:
        assert why is not None
        assert reason in why


def test_a_job_survives_quoting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels.Kernel("full-6.12", "6", tmp_path, tmp_path)
    monkeypatch.setattr(kernels, "get", lambda name: kernel)
    odd = 'it\'s "$HOME" `x` \\ * \n end'
    argv = ["sh", "-c", 'printf %s "$1$ODD$PWD$GODWIT_LAB"', "sh", odd]
    with emulator.job(argv, tmp_path, {"ODD": odd}, [tmp_path]) as job:
        done = subprocess.run(["sh", str(job / "job")], capture_output=True, text=True, check=True)
        assert (job / "mounts").read_text() == f"rw0 {tmp_path}\n"
    assert done.stdout == f"{odd}{odd}{tmp_path}1"
    assert not job.exists()


def test_a_status_is_the_result(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("17\n")
    assert host._result(tmp_path, in_time=True) == 17


def test_a_lab_without_a_result_is_told_apart(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "console.log").write_text("[ 1.0] fine\n[ 2.0] Oops: int3: 0000 [#1]\n[ 2.1] RIP\n")
    with pytest.raises(LabCrashed, match=r"Oops: int3: 0000"):
        host._result(tmp_path, in_time=True)
    with pytest.raises(LabTimeout):
        host._result(tmp_path, in_time=False)
    assert any("Oops" in log.read_text() for log in (cache / "lab-failures").iterdir())


@pytest.fixture
def has_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "why_unusable", lambda: None)


@pytest.mark.usefixtures("has_kvm")
def test_with_kvm_the_command_runs_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["sh", "-c", 'echo "$X"; pwd >&2; exit 5']
    rw = tmp_path / "new"
    assert host.run(argv, timeout_s=10, cwd=tmp_path, env={"X": "y"}, rw=[rw]) == 5
    assert capfd.readouterr().out == f"y\n{tmp_path}\n"
    assert rw.is_dir()


@pytest.mark.usefixtures("has_kvm")
def test_with_kvm_there_is_no_other_cpu(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="EPYC-Rome: this machine has KVM"):
        host.run(["true"], timeout_s=10, cwd=tmp_path, cpu="EPYC-Rome")


@pytest.mark.usefixtures("has_kvm")
def test_a_command_past_its_time_is_ended_with_its_children(tmp_path: Path) -> None:
    argv = ["sh", "-c", f"sleep 60 & echo $! >{tmp_path}/pid; wait"]
    with pytest.raises(LabTimeout):
        host.run(argv, timeout_s=0.5)
    assert _ended(int((tmp_path / "pid").read_text()), deadline_s=10)


def _ended(pid: int, deadline_s: float) -> bool:
    """Wait until *pid* has ended: SIGKILL is acted on a moment after it was sent.

    A zombie that nobody has reaped yet has ended: its pidfd is readable (pidfd_open(2)).
    """
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], deadline_s)[0])
    finally:
        os.close(process)


def test_output_is_copied_until_the_end_or_the_deadline(
    capfd: pytest.CaptureFixture[str],
) -> None:
    source, sink = os.pipe()
    os.write(sink, b"abc")
    assert not host._copy(source, deadline=time.monotonic() + 0.05)
    os.close(sink)
    assert host._copy(source, deadline=time.monotonic() + 10)
    os.close(source)
    assert capfd.readouterr().out == "abc"
