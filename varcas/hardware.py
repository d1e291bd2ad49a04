"""Which GPUs this node has, as NVML sees them and as experiment files name them. Without NVML there are none."""

from __future__ import annotations

import functools
import importlib
import os
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KINDS = {
    "RTX PRO 6000": "RTX-PRO-6000",
    **{name: name for name in ("GB300", "GB200", "B300", "B200", "H200", "H100", "H20", "L40S", "A100", "A10G")},
    **{name: name for name in ("L40", "L20", "L4", "A40", "A30", "A10", "V100", "P100", "T4", "P4", "K80")},
}
"""Part of NVML's name to the name in `hardware.gpu`, which is Ray's accelerator type (ray.util.accelerators)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        index: NVML's, in the order of PCI addresses.
        uuid: `GPU-...` or `MIG-...`.
        name: as NVML names it, say `NVIDIA H100 80GB HBM3`.
        kind: as `hardware.gpu` and Ray name it, say `H100`.
        memory_bytes: all of it.
        compute_capability: times 10, say 75 for a T4; None when unknown.
        driver_version: of the NVIDIA driver.
    """

    index: int
    uuid: str
    name: str
    kind: str
    memory_bytes: int
    compute_capability: int | None
    driver_version: str


@dataclass(frozen=True, slots=True)
class GpuState:
    """One look at one GPU; None is what it does not report."""

    power_w: float | None
    memory_used_bytes: int | None
    sm_clock_mhz: float | None
    temperature_c: float | None
    util_frac: float | None
    throttled: bool | None


def kind_of(name: str) -> str:
    """`Tesla T4` → `T4`, `NVIDIA A100-SXM4-40GB` → `A100`; an unknown one as Ray would call it."""
    for part, kind in KINDS.items():
        if re.search(rf"(^|[\s-]){re.escape(part)}($|[\s-])", name):
            return kind
    return re.sub(r"^NVIDIA\s+", "", name).strip().replace(" ", "-")


def gpus(visible: str | None = None) -> tuple[Gpu, ...]:
    """Returns the GPUs that a server started here would see.

    Args:
        visible: as CUDA_VISIBLE_DEVICES, which it is by default: indices, UUIDs or their beginnings.
    """
    nvml = _nvml()
    if nvml is None:
        return ()
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    found = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    return tuple(found) if wanted is None else select(found, wanted)


def select(found: list[Gpu], visible: str) -> tuple[Gpu, ...]:
    """What CUDA_VISIBLE_DEVICES leaves of these: it ends at the first name that it does not know."""
    chosen: list[Gpu] = []
    for name in (part.strip() for part in visible.split(",")):
        same = [gpu for gpu in found if name == str(gpu.index) or (name and gpu.uuid.startswith(name))]
        if len(same) != 1:
            break
        chosen += same
    return tuple(chosen)


def state_of(gpu: Gpu) -> GpuState:
    """Looks at one GPU; takes about 1 ms."""
    nvml = _nvml()
    if nvml is None:
        return GpuState(None, None, None, None, None, None)
    handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
    power_mw = _asked(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    memory = _asked(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)  # v1 counts the driver's own share
    util = _asked(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    reasons = _asked(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    harmless = (
        nvml.nvmlClocksEventReasonGpuIdle
        | nvml.nvmlClocksEventReasonApplicationsClocksSetting
        | nvml.nvmlClocksEventReasonSwPowerCap  # how a 70 W T4 runs under any load: its speed, not a disturbance
    )
    return GpuState(
        power_w=None if power_mw is None else power_mw / 1000,
        memory_used_bytes=None if memory is None else int(memory.used),
        sm_clock_mhz=_asked(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        temperature_c=_asked(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        util_frac=None if util is None else util.gpu / 100,
        throttled=None if reasons is None else bool(reasons & ~harmless),
    )


def memory_used_bytes(found: tuple[Gpu, ...]) -> int:
    """Returns the memory in use on these GPUs together, whoever holds it; 0 without any."""
    return sum(state_of(gpu).memory_used_bytes or 0 for gpu in found)


def processes_on(gpu: Gpu) -> dict[int, int]:
    """Returns the processes that compute on a GPU, and the bytes each holds; in a container often none."""
    nvml = _nvml()
    if nvml is None:
        return {}
    handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
    running = _asked(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    return {process.pid: process.usedGpuMemory or 0 for process in running}


@functools.cache
def _nvml() -> types.ModuleType | None:
    """NVML, initialised once a process; None without a driver."""
    pynvml: types.ModuleType = importlib.import_module("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    capability = _asked(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=name,
        kind=kind_of(name),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=None if capability is None else capability[0] * 10 + capability[1],
        driver_version=nvml.nvmlSystemGetDriverVersion(),
    )


def _asked(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """Returns NVML's answer, None when this GPU (a MIG slice, say) does not report it."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None
