"""Descriptions of CPUs in files: what was written is read, and nothing else is taken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.cli import main
from godwit.cli.cpu import baseline, describe
from godwit.errors import ConfigError, GodwitError, HostError
from godwit.hw.cpu import files
from godwit.hw.cpu.choice import chosen
from godwit.hw.cpu.compare import lacks
from godwit.hw.cpu.description import Cpu
from godwit.hw.cpu.features import features, has
from godwit.spec.config import CpuConfig
from tests.fakes.cpus import EPYC, HASWELL, SKYLAKE
from tests.fakes.kvm import FakeCpu, FakeSystem


@pytest.fixture
def described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Path]:
    """The files that ``godwit cpu describe`` prints on some hosts."""
    found = {}
    for name, cpu in {"skylake": SKYLAKE, "haswell": HASWELL, "epyc": EPYC}.items():
        assert describe(lambda cpu=cpu: FakeSystem(cpu)) == 0
        found[name] = tmp_path / f"{name}.json"
        found[name].write_text(capsys.readouterr().out)
    return found


def test_a_description_has_what_a_guest_could_be_told(described: dict[str, Path]) -> None:
    cpu = files.read(str(described["skylake"]))
    assert (cpu.tsc_khz, cpu.tsc_scaling) == (2_000_000, False)
    assert cpu.msrs == [0x277, 0x4B564D00, 0x48, 0x345, 0xC0000103]
    assert has(features(cpu.cpuid), "hypervisor")
    assert has(features(cpu.cpuid), "tsc-deadline")
    text = described["skylake"].read_text()
    assert json.loads(text)["godwit-cpu"] == 1
    assert files.to_text(cpu) == text.rstrip("\n")


def test_a_baseline_is_for_all_its_hosts_and_for_no_other(
    described: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baseline([str(described["skylake"]), str(described["haswell"])]) == 0
    both = tmp_path / "both.json"
    both.write_text(capsys.readouterr().out)
    told = {}
    for name, cpu in {"skylake": SKYLAKE, "haswell": HASWELL}.items():
        offered = files.read(str(described[name])).cpuid
        told[name] = chosen(CpuConfig(str(both)), offered, 2)
        assert lacks(told[name], offered) == []
        assert cpu.cpuid != told[name]
    assert told["skylake"] == told["haswell"]
    with pytest.raises(HostError, match=r"both.json asks for.*GenuineIntel, this CPU is of Auth"):
        chosen(CpuConfig(str(both)), files.read(str(described["epyc"])).cpuid, 2)


def test_the_command_line_has_both(
    described: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(described[name]) for name in ("skylake", "haswell")]
    assert main.main(["cpu", "baseline", *paths]) == 0
    assert json.loads(capsys.readouterr().out)["godwit-cpu"] == 1
    assert main.main(["cpu", "baseline", str(described["epyc"]), paths[0]]) == 1
    assert "godwit: CPUs of AuthenticAMD and GenuineIntel" in capsys.readouterr().err
    with mock.patch("godwit.cli.cpu.describe", return_value=0) as called:
        assert main.main(["cpu", "describe"]) == 0
    called.assert_called_once_with()


def test_a_host_that_lacks_what_a_file_asks_for_is_refused_by_name(
    described: dict[str, Path],
) -> None:
    path = str(described["skylake"])
    with pytest.raises(HostError, match=r"skylake.json asks for PDCM, SMEP, AVX512F") as caught:
        chosen(CpuConfig(path), files.read(str(described["haswell"])).cpuid, 1)
    assert "46 physical address bits, this CPU has 39" in str(caught.value)
    less = CpuConfig(path, ("pdcm", "smep", "avx512f"))
    with pytest.raises(HostError) as caught:
        chosen(less, files.read(str(described["haswell"])).cpuid, 1)
    assert "SMEP" not in str(caught.value)


def _whole() -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(
        files.to_text(Cpu([(1, 0, 0, 1, 2, 3, 4)], 1000, True, [0x277]))
    )
    return whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"godwit-cpu": 2}, "godwit-cpu"),
        ({"more": 1}, "unknown field `more`"),
        ({"cpu": None}, "Expected `object`"),
        ({"cpu": {"cpuid": []}}, "length >= 1"),
        ({"cpu": {"cpuid": [[1, 0, 0, 0, 0, 0, 0]] * 257}}, "length <= 256"),
        ({"cpu": {"cpuid": [[1, 0, 0, 0, 0, 0, 1 << 32]]}}, r"\$.cpu.cpuid\[0\]\[6\]"),
        ({"cpu": {"cpuid": [[1, 0, 0, 0, 0, 0, -1]]}}, r"\$.cpu.cpuid\[0\]\[6\]"),
        ({"cpu": {"cpuid": [[1, 0, 0, 0]]}}, r"\$.cpu.cpuid\[0\]"),
        ({"cpu": {"cpuid": [[1, 0, 2, 0, 0, 0, 0]]}}, r"\$.cpu.cpuid\[0\]\[2\]"),
        ({"cpu": {"cpuid": [[1, 0, 0, 0, 0, 0, 0]] * 2}}, "leaf 0x1, index 0, is there twice"),
        ({"cpu": {"cpuid": [[7, 1, 0, 0, 0, 0, 0]]}}, "leaf 0x7 has index 1, but no indices"),
        (
            {"cpu": {"cpuid": [[7, 0, 0, 0, 0, 0, 0], [7, 1, 1, 0, 0, 0, 0]]}},
            "leaf 0x7, index 1, is there twice",
        ),
        ({"cpu": {"tsc_khz": -1}}, "tsc_khz"),
        ({"cpu": {"tsc_khz": "fast"}}, "tsc_khz"),
        ({"cpu": {"msrs": [0] * 1025}}, "msrs"),
    ],
)
def test_a_file_with_something_wrong_is_refused_by_field(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    whole = _whole()
    for key, value in change.items():
        if isinstance(value, dict):
            whole[key].update(value)
        else:
            whole[key] = value
    path = tmp_path / "odd"
    path.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=says) as caught:
        files.read(str(path))
    assert "'godwit cpu describe'" in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b" " * (257 << 10))
    (tmp_path / "deep").write_text("[" * 200_000)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name, says in {
        "none": "No such file",
        "pipe": "no regular file",
        ".": "no regular file",
        "long": "more than 262144 bytes",
        "deep": "is no CPU description",
        "binary": "is no CPU description",
        "\0": "cannot read the CPU description",
    }.items():
        with pytest.raises(ConfigError, match=says):
            files.read(f"{tmp_path}/{name}")


@given(data=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_whatever_a_file_holds_is_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        files.read(str(path))


def test_a_word_that_is_no_model_and_no_file_is_named() -> None:
    with pytest.raises(ConfigError, match="'x86-64-v9': No such file") as caught:
        chosen(CpuConfig("x86-64-v9"), SKYLAKE.cpuid, 1)
    assert "x86-64-v2" in str(caught.value)


def test_kvm_that_shows_nothing_is_an_error() -> None:
    class Broken(FakeSystem):
        def create_vm(self) -> Any:
            raise OSError(12, "Cannot allocate memory")

    with pytest.raises(GodwitError, match="Cannot allocate memory"):
        describe(lambda: Broken(FakeCpu()))
