"""GPUs are named as experiment files and Ray name them, and CUDA_VISIBLE_DEVICES is read as CUDA reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varcas import hardware
from varcas.hardware import Gpu, gpus, kind_of, select

NAMES = [
    ("Tesla T4", "T4"),
    ("Tesla V100-SXM2-16GB", "V100"),
    ("Tesla P100-PCIE-16GB", "P100"),
    ("Tesla K80", "K80"),
    ("NVIDIA A10", "A10"),
    ("NVIDIA A10G", "A10G"),
    ("NVIDIA L4", "L4"),
    ("NVIDIA L40", "L40"),
    ("NVIDIA L40S", "L40S"),
    ("NVIDIA A100-SXM4-40GB", "A100"),
    ("NVIDIA A100 80GB PCIe", "A100"),
    ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100"),
    ("NVIDIA H200", "H200"),
    ("NVIDIA H20", "H20"),
    ("NVIDIA B200", "B200"),
    ("NVIDIA GB200", "GB200"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
    ("NVIDIA GeForce RTX 4090", "GeForce-RTX-4090"),
]
FOUND = [Gpu(i, f"GPU-{'abc'[i]}1234", "Tesla T4", "T4", 16 * 10**9, 75, "580.1") for i in range(3)]


@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_marketing_names_become_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_kinds_are_rays_accelerator_types(name: str, kind: str) -> None:
    """Ray finds the type by itself on a node; ours must be the same word, or no node has it."""
    ray = pytest.importorskip("ray._private.accelerators.nvidia_gpu")
    assert ray.NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(name) == kind


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("0,1,2", [0, 1, 2]),
        ("2,0", [2, 0]),
        (" 1 ", [1]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("GPU-b1234,GPU-a", [1, 0]),
        ("0,7,1", [0]),  # CUDA stops at the first that it does not know
        ("GPU-", []),  # names several
    ],
)
def test_visible_devices_are_read_as_cuda_does(visible: str, indices: list[int]) -> None:
    assert [gpu.index for gpu in select(FOUND, visible)] == indices


@given(st.text())
def test_any_text_selects_known_gpus_only(visible: str) -> None:
    assert set(select(FOUND, visible)) <= set(FOUND)


@pytest.mark.skipif(not gpus(), reason="no GPU that NVML sees")
def test_a_real_gpu_has_a_name_and_memory() -> None:
    gpu = gpus()[0]
    assert gpu.memory_bytes > 10**9
    assert gpu.uuid.startswith(("GPU-", "MIG-"))
    assert gpu.compute_capability is not None
    assert gpu.kind in gpu.name.replace(" ", "-")
    assert gpus("") == ()
    assert gpus(gpu.uuid)[0] == gpu


@pytest.mark.skipif(bool(gpus()), reason="there is a GPU")
def test_without_a_gpu_nothing_is_asked_of_one() -> None:
    assert gpus("0") == ()
    assert hardware.memory_used_bytes(()) == 0
    assert hardware.state_of(FOUND[0]).power_w is None
    assert hardware.processes_on(FOUND[0]) == {}
