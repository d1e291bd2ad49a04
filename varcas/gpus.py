"""What GPUs can do at best: datasheet figures from `gpus.toml`, and this host's CPU measured by a small probe.

A peak is a ceiling for bounds, never a prediction: a T4 sustains about 24 of its 65 fp16 TFLOPS under its 70 W cap.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from varcas.errors import InputError, nearest

GB = 10**9
GIB = 2**30
CLOCK_HEADROOM = 1.2
"""Datasheets take the boost clock; cards run above it while power allows: an H100 at 1980 for 1830 MHz, an RTX 3090 at
about 2000 for 1695."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one GPU costs an hour on demand.

    Attributes:
        usd_per_h: list price.
        provider: who asks it, and for what.
        date: year and month it is known from.
        verified: read at the provider on that date.
    """

    usd_per_h: float
    provider: str
    date: str
    verified: bool


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU's ceilings.

    Attributes:
        name: key in `gpus.toml`, say `H100-SXM`.
        ray: Ray's accelerator type, as `hardware.gpu` has it.
        names: every other name it goes by, NVML's among them.
        compute_capability: times 10; None where there is no such thing (AMD, CPU).
        memory_bytes: what is soldered on: no driver shows more. For hard rules.
        cuda_bytes: what `cudaMemGetInfo` calls total, within 0.5 %. For estimates.
        memory_bytes_per_s: peak bandwidth.
        peaks: data type to dense FLOP/s (OP/s), fp32 accumulation; `_acc16` keys: fp16 accumulation.
        power_w: board power limit; None when unknown.
        interconnect: between GPUs of one host.
        interconnect_bytes_per_s: of it, both directions together.
        price: None when unknown.
        source: where the figures stand.
        source_date: of that document, year and month.
        unverified: figures that no second source confirmed.
        measured: by the probe here, so an estimate and not a ceiling.
        default: what its `ray` name alone means, among several variants.
    """

    name: str
    ray: str
    names: tuple[str, ...]
    compute_capability: int | None
    memory_bytes: int
    cuda_bytes: int
    memory_bytes_per_s: float
    peaks: Mapping[str, float]
    power_w: float | None
    interconnect: str
    interconnect_bytes_per_s: float
    price: Price | None
    source: str
    source_date: str
    unverified: tuple[str, ...] = ()
    measured: bool = False
    default: bool = False

    def peak_flops(self, dtype: str) -> float:
        """Dense FLOP/s with fp32 accumulation for operands of a type; a type it lacks runs as the next it has.

        fp8, int4 and fp4 weights on a GPU without units for them are widened to fp16 (vLLM's Marlin kernels do so).

        Raises:
            InputError: no such type.
        """
        for name in (dtype, *FALLBACKS.get(dtype, ())):
            if name in self.peaks:
                return self.peaks[name]
        raise InputError(f"dtype: {dtype!r} is no type of arithmetic units. Known: {', '.join(FALLBACKS)}.")

    def ceiling_flops(self, dtype: str) -> float:
        """The most that any kernel can reach for operands of a type, for hard rules.

        With fp16 accumulation, and at clocks above the datasheet's.
        """
        peak = self.peak_flops(dtype)
        faster = {"fp16": "fp16_acc16", "bf16": "fp16_acc16", "fp8": "fp8_acc16", "fp32": "tf32"}.get(dtype, dtype)
        return CLOCK_HEADROOM * max(peak, self.peaks.get(faster, 0.0))

    def ridge(self, dtype: str) -> float:
        """Arithmetic intensity, FLOP/byte, above which compute and not memory is the limit."""
        return self.peak_flops(dtype) / self.memory_bytes_per_s


FALLBACKS: dict[str, tuple[str, ...]] = {
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
    "fp32": (),
    "tf32": ("fp32",),
    "fp8": ("fp16", "bf16", "fp32"),
    "int8": ("fp16", "bf16", "fp32"),
    "int4": ("fp16", "bf16", "fp32"),
    "fp4": ("fp16", "bf16", "fp32"),
}


class _Table(BaseModel):
    """One table of `gpus.toml`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    ray: str
    ray_also: list[str] = []
    default: bool = False
    nvml: list[str] = Field(min_length=1)
    compute_capability: int | None = None
    memory_gib: float = Field(gt=0)
    cuda_gib: float = Field(gt=0)
    memory_gb_per_s: float = Field(gt=0)
    power_w: float = Field(gt=0)
    tflops: dict[str, float] = Field(min_length=1)
    interconnect: str
    interconnect_gb_per_s: float = Field(gt=0)
    source: str = Field(pattern="^https://")
    source_date: str = Field(pattern=r"^20\d\d-\d\d$")
    seen: str | None = None
    usd_per_h: float | None = None
    price_provider: str = ""
    price_date: str = ""
    price_verified: bool = False
    unverified: list[str]

    def spec(self, name: str) -> GpuSpec:
        return GpuSpec(
            name=name,
            ray=self.ray,
            names=(*self.nvml, *self.ray_also),
            compute_capability=self.compute_capability,
            memory_bytes=int(self.memory_gib * GIB),
            cuda_bytes=int(self.cuda_gib * GIB),
            memory_bytes_per_s=self.memory_gb_per_s * GB,
            peaks=MappingProxyType({dtype: tflops * 1e12 for dtype, tflops in self.tflops.items()}),
            power_w=self.power_w,
            interconnect=self.interconnect,
            interconnect_bytes_per_s=self.interconnect_gb_per_s * GB,
            price=None if self.usd_per_h is None else self._price(self.usd_per_h),
            source=self.source,
            source_date=self.source_date,
            unverified=tuple(self.unverified),
            default=self.default,
        )

    def _price(self, usd_per_h: float) -> Price:
        return Price(usd_per_h, self.price_provider, self.price_date, self.price_verified)


@functools.cache
def catalogue() -> Mapping[str, GpuSpec]:
    """Every GPU of `gpus.toml` by its key."""
    text = resources.files("varcas").joinpath("gpus.toml").read_text(encoding="utf-8")
    return MappingProxyType(parse_catalogue(text))


def parse_catalogue(text: str, origin: str = "gpus.toml") -> dict[str, GpuSpec]:
    """Checks a catalogue.

    Raises:
        InputError: not TOML, an unknown or missing field, a value of the wrong type.
    """
    try:
        tables = tomllib.loads(text)
        return {name: _Table.model_validate(table).spec(name) for name, table in tables.items()}
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise InputError(f"{origin}: {error}") from error


def variants(name: str) -> tuple[GpuSpec, ...]:
    """Every GPU that goes by a name: a key, Ray's accelerator type, or NVML's name. Empty when there is none."""
    wanted = _plain(name)
    return tuple(
        gpu for gpu in catalogue().values() if wanted in {_plain(known) for known in (gpu.name, gpu.ray, *gpu.names)}
    )


def gpu(name: str) -> GpuSpec:
    """The GPU of a name; of several variants (`A100`) the one marked as default, the larger SXM one.

    Raises:
        InputError: nobody goes by that name.
    """
    found = variants(name)
    if not found:
        known = sorted({name for gpu in catalogue().values() for name in (gpu.name, gpu.ray)})
        raise InputError(
            f"gpu: {name!r} is unknown.{nearest(name, known)} Known: {', '.join(known)}. "
            "A new GPU is a table in gpus.toml."
        )
    exact = [gpu for gpu in found if gpu.name == name]
    return (exact or [gpu for gpu in found if gpu.default] or list(found))[0]


def ceiling(name: str) -> GpuSpec:
    """The best of every figure over the variants of a name: no GPU called so does better. For hard rules.

    Raises:
        InputError: nobody goes by that name.
    """
    chosen, found = gpu(name), variants(name)
    if chosen.name == name or len(found) == 1:
        return chosen
    dtypes = {dtype for gpu in found for dtype in gpu.peaks}
    return replace(
        chosen,
        name=f"{name} (best of {', '.join(gpu.name for gpu in found)})",
        memory_bytes=max(gpu.memory_bytes for gpu in found),
        cuda_bytes=max(gpu.cuda_bytes for gpu in found),
        memory_bytes_per_s=max(gpu.memory_bytes_per_s for gpu in found),
        peaks=MappingProxyType({dtype: max(gpu.peaks.get(dtype, 0.0) for gpu in found) for dtype in sorted(dtypes)}),
        interconnect_bytes_per_s=max(gpu.interconnect_bytes_per_s for gpu in found),
    )


def installed(nvml_name: str, memory_bytes: int) -> GpuSpec | None:
    """The catalogue's GPU for one that NVML sees, with the memory it has; None when the catalogue lacks it."""
    found = variants(nvml_name)
    if not found:
        return None
    closest = min(found, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes))
    return replace(closest, memory_bytes=memory_bytes, cuda_bytes=min(closest.cuda_bytes, memory_bytes))


def _plain(name: str) -> str:
    words = name.lower().replace("_", " ").replace("-", " ").split()
    return " ".join(word for word in words if word not in ("nvidia", "tesla", "geforce"))


PROBE_S = 1.6
"""Wall seconds of the probe, of the 2 it may take: the last copy and the last matmul overrun their share."""


@functools.cache
def this_cpu() -> GpuSpec:
    """This host's CPU: memory bandwidth by copying, FLOP/s by numpy's fp32 matmul. Takes at most 2 s, once a process.

    An estimate, never a ceiling: the copy may stay in a large cache, and kernels with AMX beat numpy.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bytes_per_s, flops = copy_bytes_per_s(PROBE_S / 2), matmul_flops(PROBE_S / 2)
    return GpuSpec(
        name="cpu",
        ray="cpu",
        names=(),
        compute_capability=None,
        memory_bytes=total,
        cuda_bytes=node_bytes(),
        memory_bytes_per_s=bytes_per_s,
        peaks=MappingProxyType({"fp32": flops}),
        power_w=None,
        interconnect="memory",
        interconnect_bytes_per_s=bytes_per_s,
        price=None,
        source="probe: varcas.gpus.this_cpu",
        source_date=time.strftime("%Y-%m", time.gmtime()),
        measured=True,
    )


def node_bytes() -> int:
    """What vLLM's CPU build calls all memory: of the NUMA node it runs on, at most what the control group may have.

    Source: `get_memory_node_info`, vLLM `utils/cpu_resource_utils.py`. Less than the host's where the node holds less.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = min(os.sched_getaffinity(0))
    nodes = [path.read_text() for path in Path(f"/sys/devices/system/cpu/cpu{cpu}").glob("node*/meminfo")]
    totals = [int(found[1]) * 2**10 for text in nodes if (found := re.search(r"MemTotal:\s+(\d+) kB", text))]
    limits = [Path(f"/sys/fs/cgroup/{name}") for name in ("memory.max", "memory/memory.limit_in_bytes")]
    given = [int(text) for path in limits if path.exists() and (text := path.read_text().strip()).isdecimal()]
    return min([whole, *totals, *given[:1]])


def copy_bytes_per_s(budget_s: float, size_bytes: int = 64 * 2**20) -> float:
    """Bytes read plus bytes written a second by `memmove` on every CPU this process may use; the best of its rounds."""
    cpus = len(os.sched_getaffinity(0))
    share = size_bytes // cpus
    buffers = [(ctypes.create_string_buffer(share), ctypes.create_string_buffer(share)) for _ in range(cpus)]
    with ThreadPoolExecutor(cpus) as threads:  # ctypes lets go of the GIL while it copies

        def once() -> float:
            start = time.perf_counter()
            list(threads.map(lambda pair: ctypes.memmove(pair[0], pair[1], share), buffers))
            return 2 * share * cpus / (time.perf_counter() - start)

        return max(_rounds(budget_s, once))


def matmul_flops(budget_s: float, size: int = 512) -> float:
    """FLOP/s of an fp32 matmul by numpy's BLAS; the best of its rounds."""
    left = np.ones((size, size), dtype=np.float32)

    def once() -> float:
        start = time.perf_counter()
        _ = left @ left
        return 2 * size**3 / (time.perf_counter() - start)

    return max(_rounds(budget_s, once))


def _rounds(budget_s: float, once: Callable[[], float]) -> Iterator[float]:
    end = time.perf_counter() + budget_s
    yield once()
    while time.perf_counter() < end:
        yield once()
