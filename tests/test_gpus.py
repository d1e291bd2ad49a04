"""The catalogue: complete, sourced, found by every name; a bound stays a bound for an ambiguous name."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from ray.util import accelerators

from varcas import gpus
from varcas.described import described_gpus, gpus_text
from varcas.errors import InputError
from varcas.hardware import KINDS, kind_of

ASKED = {
    "T4", "V100", "A10G", "A10", "L4", "L40S", "A100", "H100", "H200", "B200",
    "RTX-3090", "RTX-4090", "RTX-5090", "MI300X", "A100-SXM-40GB", "A100-PCIe-40GB", "A100-SXM-80GB", "A100-PCIe-80GB",
    "H100-SXM", "H100-PCIe", "H100-NVL",
}  # fmt: skip


def test_every_gpu_of_the_issue_is_there() -> None:
    assert [name for name in sorted(ASKED) if not gpus.variants(name)] == []


@pytest.mark.parametrize("gpu", gpus.catalogue().values(), ids=lambda gpu: gpu.name)
def test_a_table_is_complete_and_plausible(gpu: gpus.GpuSpec) -> None:
    assert gpu.source.startswith("https://")
    assert re.match(r"20\d\d-\d\d", gpu.source_date)
    assert {"fp32", "fp16"} <= set(gpu.peaks)
    assert gpu.peaks["fp32"] < gpu.peaks["fp16"]
    assert gpu.cuda_bytes < gpu.memory_bytes
    assert gpu.cuda_bytes > 0.9 * gpu.memory_bytes
    if gpu.compute_capability is not None:
        assert ("bf16" in gpu.peaks) == (gpu.compute_capability >= 80), "bf16 units came with sm_80"
        assert ("fp8" in gpu.peaks) == (gpu.compute_capability >= 89), "fp8 units came with sm_89"
    assert gpu.price is None or not gpu.price.verified, (
        "nothing could be read at a provider from where this was written"
    )
    for wide, narrow in (("tf32", "fp16"), ("fp16", "fp8"), ("fp16", "int8"), ("int8", "int4"), ("fp8", "fp4")):
        if {wide, narrow} <= set(gpu.peaks):
            assert gpu.peaks[wide] <= gpu.peaks[narrow], "half the bits never run slower"


def test_ratios_that_hold_by_construction() -> None:
    """Dense, not sparse: a tensor core does twice as many 8-bit as 16-bit products."""
    for name in ("T4", "A100-SXM-80GB", "H100-SXM", "H200", "L4", "MI300X", "B200"):
        peaks = gpus.gpu(name).peaks
        assert peaks["int8"] / peaks["fp16"] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("nvml", "key"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-SXM2-16GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("RTX 5090", "RTX-5090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("A100-40G", "A100-PCIe-40GB"),
        ("A100", "A100-SXM-80GB"),
        ("H100", "H100-SXM"),
    ],
)
def test_found_by_the_names_that_people_and_drivers_use(nvml: str, key: str) -> None:
    assert gpus.gpu(nvml).name == key


def test_ray_names_are_rays() -> None:
    known = {value for name, value in vars(accelerators.accelerators).items() if name.isupper()}
    nvidia = {gpu.ray for gpu in gpus.catalogue().values() if gpu.name not in ("A10", "MI300X")}
    assert {name for name in nvidia - known if not name.startswith("GeForce")} == set()


def test_the_name_that_hardware_gives_a_gpu_finds_it() -> None:
    """`hardware.gpu: auto` puts `kind_of(NVML name)` into the experiment."""
    for gpu in gpus.catalogue().values():
        if gpu.name.startswith("MI") or gpu.ray not in KINDS.values():
            continue
        assert gpu in gpus.variants(kind_of(gpu.names[0]))


def test_no_name_means_two_gpus_by_accident() -> None:
    for gpu in gpus.catalogue().values():
        assert gpus.gpu(gpu.name) == gpu
    for ray in {gpu.ray for gpu in gpus.catalogue().values()}:
        found = gpus.variants(ray)
        assert len(found) == 1 or sum(gpu.default for gpu in found) == 1


def test_a_ceiling_is_above_every_variant() -> None:
    top = gpus.ceiling("H100")
    for gpu in gpus.variants("H100"):
        assert top.memory_bytes >= gpu.memory_bytes
        assert top.memory_bytes_per_s >= gpu.memory_bytes_per_s
        assert all(top.peaks[dtype] >= peak for dtype, peak in gpu.peaks.items())
    assert gpus.ceiling("H100-PCIe") == gpus.gpu("H100-PCIe")
    ada = gpus.gpu("RTX-4090")
    assert ada.ceiling_flops("fp16") == pytest.approx(gpus.CLOCK_HEADROOM * 2 * ada.peak_flops("fp16"), rel=0.01)


def test_an_installed_gpu_has_the_memory_it_has() -> None:
    found = gpus.installed("Tesla V100-PCIE-16GB", 16 * gpus.GIB)
    assert found is not None
    assert found.memory_bytes == found.cuda_bytes == 16 * gpus.GIB
    assert gpus.installed("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * gpus.GIB) is None


def test_the_ridge_of_a_t4_is_the_seeds() -> None:
    assert gpus.gpu("T4").ridge("fp16") == pytest.approx(203.125)


def test_a_type_without_units_runs_as_the_next() -> None:
    t4 = gpus.gpu("T4")
    assert t4.peak_flops("fp8") == t4.peak_flops("bf16") == t4.peak_flops("fp16") == 65e12
    assert t4.peak_flops("int8") == 130e12


def test_an_unknown_gpu_says_which_there_are() -> None:
    with pytest.raises(InputError, match=r"'T40' is unknown\. Did you mean T4"):
        gpus.gpu("T40")


@pytest.mark.parametrize("text", ["[T4", "[T4]\nray = 'T4'", "[T4]\nspeed = 1", "[T4]\nray = 4"])
def test_a_broken_catalogue_is_said(text: str) -> None:
    with pytest.raises(InputError, match=r"gpus\.toml"):
        gpus.parse_catalogue(text)


def test_this_cpu_is_measured() -> None:
    cpu = gpus.this_cpu()
    assert cpu.measured
    assert cpu.memory_bytes_per_s > 0
    assert cpu.peak_flops("bf16") == cpu.peaks["fp32"] > 0
    assert gpus.this_cpu() is cpu


def said(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "varcas", *arguments], capture_output=True, text=True, timeout=110)
    return done.returncode, done.stdout, done.stderr


def test_the_command_prints_the_catalogue() -> None:
    code, out, _ = said("gpus", "T4", "NVIDIA L4", "--json")
    assert code == 0
    assert [gpu["name"] for gpu in json.loads(out)["gpus"]] == ["T4", "L4"]
    assert gpus_text(described_gpus([])).count("\n") > len(gpus.catalogue())
    code, out, err = said("gpus", "T40")
    assert (code, out) == (2, "")
    assert "'T40' is unknown" in err


def test_the_probe_stops_at_its_budget() -> None:
    calls: list[float] = []

    def once() -> float:
        calls.append(1.0)
        return 1.0

    assert list(gpus._rounds(0.0, once)) == [1.0]
    assert len(calls) == 1
