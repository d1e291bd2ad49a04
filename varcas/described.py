"""What `varcas gpus` and `varcas models show` answer: as JSON, and in words."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from varcas.errors import InputError
from varcas.gpus import GIB, GpuSpec, catalogue, this_cpu, variants
from varcas.memory import Serve, kv_bytes_per_token, loaded_bytes
from varcas.model import ModelSpec, describe

ANSWER = ConfigDict(extra="forbid", frozen=True)


class PriceAnswer(BaseModel):
    """What one GPU costs."""

    model_config = ANSWER
    usd_per_h: float
    provider: str
    date: str
    verified: bool = Field(description="read at the provider on that date")


class GpuAnswer(BaseModel):
    """One GPU of the catalogue."""

    model_config = ANSWER
    name: str
    ray: str = Field(description="as `hardware.gpu` and Ray name it")
    also: list[str] = Field(description="other names, NVML's among them")
    compute_capability: int | None
    memory_bytes: int = Field(description="what is soldered on")
    cuda_bytes: int = Field(description="what CUDA calls total, within 0.5 %")
    memory_bytes_per_s: float
    peak_flops: dict[str, float] = Field(description="dense, by data type; `_acc16`: fp16 accumulation")
    ridge_fp16: float = Field(description="FLOP/byte above which fp16 compute is the limit")
    power_w: float | None
    interconnect: str
    interconnect_bytes_per_s: float
    price: PriceAnswer | None
    source: str
    source_date: str
    unverified: list[str]
    measured: bool = Field(description="probed here: an estimate, no ceiling")


class Gpus(BaseModel):
    """The catalogue."""

    model_config = ANSWER
    gpus: list[GpuAnswer]


class AttentionAnswer(BaseModel):
    """Layers that attend alike."""

    model_config = ANSWER
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    latent_dim: int = Field(description="of MLA's cached vector; 0 without MLA")


class ModelAnswer(BaseModel):
    """A model, and what it takes on one GPU."""

    model_config = ANSWER
    name: str
    family: str
    complete: bool = Field(description="false where a vision tower is not counted")
    parameters: int
    active_parameters: int = Field(description="that one token goes through")
    hidden_size: int
    layers: int
    attention: list[AttentionAnswer]
    vocab_size: int
    max_position: int
    tied_embeddings: bool
    checkpoint_dtype: str
    quantisation: str | None
    dtype: str = Field(description="that the figures below are for")
    weight_bytes: int = Field(description="packed, on one GPU")
    loaded_bytes: int = Field(description="as vLLM logs it: with the allocator's rounding and the rotary table")
    kv_bytes_per_token: float = Field(description="in all layers, windows not considered")
    checkpoint_bytes: int | None = Field(description="of the safetensors files; null where there are none")
    checkpoint_elements: dict[str, int] | None = Field(description="of the safetensors files, by data type")


def described_gpus(names: list[str], probe: bool = False) -> Gpus:
    """The catalogue, or the GPUs of some names; `probe` adds this host's CPU.

    Raises:
        InputError: nobody goes by a name.
    """
    chosen: list[GpuSpec] = []
    for name in names:
        if not (found := variants(name)):
            known = ", ".join(catalogue())
            raise InputError(f"gpu: {name!r} is unknown. Known: {known}. A new GPU is a table in gpus.toml.")
        chosen += [gpu for gpu in found if gpu not in chosen]
    chosen = chosen if names else list(catalogue().values())
    return Gpus(gpus=[_gpu(gpu) for gpu in (*chosen, *((this_cpu(),) if probe else ()))])


def _gpu(gpu: GpuSpec) -> GpuAnswer:
    price = gpu.price
    return GpuAnswer(
        name=gpu.name,
        ray=gpu.ray,
        also=list(gpu.names),
        compute_capability=gpu.compute_capability,
        memory_bytes=gpu.memory_bytes,
        cuda_bytes=gpu.cuda_bytes,
        memory_bytes_per_s=gpu.memory_bytes_per_s,
        peak_flops=dict(gpu.peaks),
        ridge_fp16=gpu.ridge("fp16"),
        power_w=gpu.power_w,
        interconnect=gpu.interconnect,
        interconnect_bytes_per_s=gpu.interconnect_bytes_per_s,
        price=price
        and PriceAnswer(usd_per_h=price.usd_per_h, provider=price.provider, date=price.date, verified=price.verified),
        source=gpu.source,
        source_date=gpu.source_date,
        unverified=list(gpu.unverified),
        measured=gpu.measured,
    )


def described_model(directory: Path, dtype: str | None = None) -> ModelAnswer:
    """A model's directory. Raises InputError as `model.describe`, and for an unknown `dtype`."""
    model = describe(directory)
    serve = Serve(dtype=dtype or ("bfloat16" if model.dtype == "float32" else model.dtype))
    files = model.checkpoint
    return ModelAnswer(
        name=model.name,
        family=model.family,
        complete=model.complete,
        parameters=model.parameters,
        active_parameters=model.active_parameters,
        hidden_size=model.hidden_size,
        layers=model.num_layers,
        attention=_attention(model),
        vocab_size=model.vocab_size,
        max_position=model.max_position,
        tied_embeddings=model.tied,
        checkpoint_dtype=model.dtype,
        quantisation=_format(model),
        dtype=serve.dtype,
        weight_bytes=model.weight_bytes(serve.dtype),
        loaded_bytes=loaded_bytes(model, serve),
        kv_bytes_per_token=kv_bytes_per_token(model, serve),
        checkpoint_bytes=files and files.bytes,
        checkpoint_elements=files and dict(files.elements),
    )


def _attention(model: ModelSpec) -> list[AttentionAnswer]:
    return [
        AttentionAnswer(
            layers=kind.layers,
            heads=kind.heads,
            kv_heads=kind.kv_heads,
            head_dim=kind.head_dim,
            value_dim=kind.value_dim,
            window=kind.window,
            latent_dim=kind.latent_dim,
        )
        for kind in model.attention
    ]


def _format(model: ModelSpec) -> str | None:
    """`awq int4, groups of 128`."""
    if (stored := model.quantisation) is None:
        return None
    groups = f", groups of {stored.group_size}" if stored.group_size > 0 else ""
    return stored.method + (f" {stored.weights}" if stored.weights != stored.method else "") + groups


def gpus_text(answer: Gpus) -> str:
    """The catalogue as a table."""
    head = ("GPU", "Ray", "GiB", "GB/s", "fp16", "fp8", "int8", "ridge", "W", "$/h", "link GB/s")
    rows = [head, *(_row(gpu) for gpu in answer.gpus)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [*lines, "", "Peaks are dense TFLOPS; ridge is fp16 FLOP/byte. Prices: list, see --json for dates."]
    )


def _row(gpu: GpuAnswer) -> tuple[str, ...]:
    peaks = [
        f"{gpu.peak_flops[dtype] / 1e12:.4g}" if dtype in gpu.peak_flops else "-" for dtype in ("fp16", "fp8", "int8")
    ]
    return (
        gpu.name,
        gpu.ray,
        f"{gpu.memory_bytes / GIB:.4g}",
        f"{gpu.memory_bytes_per_s / 1e9:.4g}",
        *peaks,
        f"{gpu.ridge_fp16:.3g}",
        "-" if gpu.power_w is None else f"{gpu.power_w:.4g}",
        "-" if gpu.price is None else f"{gpu.price.usd_per_h:.3g}",
        f"{gpu.interconnect_bytes_per_s / 1e9:.4g}",
    )


def model_text(answer: ModelAnswer) -> str:
    """The model in words."""
    active = f", {answer.active_parameters:,} for one token" if answer.active_parameters < answer.parameters else ""
    lines = [
        f"{answer.name}: {answer.family}, {answer.parameters:,} parameters{active}"
        f"{'' if answer.complete else ' (text model alone: the vision tower is not counted)'}",
        f"{answer.layers} layers of {answer.hidden_size}, vocabulary {answer.vocab_size:,}, "
        f"context up to {answer.max_position:,}{', tied embeddings' if answer.tied_embeddings else ''}",
        *(_attention_text(kind) for kind in answer.attention),
        f"stored as {answer.quantisation or answer.checkpoint_dtype}; on one GPU in {answer.dtype}: "
        f"weights {answer.loaded_bytes / GIB:.2f} GiB, KV cache {answer.kv_bytes_per_token / 1024:.1f} KiB a token",
    ]
    if answer.checkpoint_bytes is not None:
        lines.append(f"safetensors: {answer.checkpoint_bytes / GIB:.2f} GiB")
    return "\n".join(lines)


def _attention_text(kind: AttentionAnswer) -> str:
    what = f"a latent vector of {kind.latent_dim}" if kind.latent_dim else f"{kind.kv_heads} key-value heads"
    seen = f", window {kind.window}" if kind.window is not None else ""
    return f"{kind.layers} layers: {kind.heads} heads of {kind.head_dim}, {what}{seen}"
