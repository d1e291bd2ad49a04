"""Weight formats: what `quantization_config` says, and the bytes of a linear layer as vLLM holds it on the device.

Sources are files of vLLM 0.32, below `vllm/model_executor/layers/quantization/`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from varcas.errors import InputError

METHODS = ("awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors")
ALIASES = {"awq_marlin": "awq", "gptq_marlin": "gptq", "fbgemm_fp8": "fp8"}
BNB_BLOCK = 64
"""Weights a scale of bitsandbytes: `blocksize` of `quantize_4bit`."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the linear layers are stored.

    Attributes:
        method: one of METHODS.
        weights: type of a stored weight: int4, int8, fp8, fp4 or nf4; int2 and int3 for GPTQ.
        bits: of a stored weight.
        group_size: inputs that share a scale; -1 for all of an output's, 0 where scales are few.
        zero_points: stored beside the scales.
        act_order: GPTQ's `desc_act`: the order of the inputs is kept too.
        activations: fp8 or int8 where the matmul runs in that type; None where weights are widened to fp16 or bf16.
        block: outputs x inputs that share a scale (DeepSeek's fp8); None otherwise.
        skipped: names of layers left as they are; `re:` begins a pattern.
        lm_head: the output projection is quantised too.
    """

    method: str
    weights: str
    bits: int
    group_size: int = 0
    zero_points: bool = False
    act_order: bool = False
    activations: str | None = None
    block: tuple[int, int] | None = None
    skipped: tuple[str, ...] = ()
    lm_head: bool = False

    def skips(self, name: str) -> bool:
        """Whether a layer of this name stays unquantised (`is_layer_skipped` in `utils/quant_utils.py`)."""
        return any(
            bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern in name
            for pattern in self.skipped
        )

    def tensors(self, inputs: int, outputs: int, dtype_bytes: float, wide_zeros: bool = False) -> tuple[int, ...]:
        """Bytes of each tensor of a linear layer `inputs` x `outputs`.

        Args:
            inputs: of the part on this device.
            outputs: of the part on this device.
            dtype_bytes: of the type that activations have.
            wide_zeros: zero points are held in that type, already times the scale. On Hopper, vLLM's Machete kernel
                does so (`MacheteLinearKernel.process_weights_after_loading`,
                `kernels/linear/mixed_precision/machete.py`).
        """
        weights = math.ceil(inputs * outputs * self.bits / 8)
        if self.method == "bitsandbytes":  # nested scales are unpacked to fp32 when loaded (bitsandbytes.py)
            scales = 4 * (outputs if self.bits == 8 else math.ceil(inputs * outputs / BNB_BLOCK))
            return weights, scales
        if self.block is not None:  # `weight_scale_inv`, fp32 (fp8.py, `create_fp8_scale_parameter`)
            return weights, 4 * math.ceil(outputs / self.block[0]) * math.ceil(inputs / self.block[1])
        if self.weights in ("fp8", "int8") and self.method in ("fp8", "compressed-tensors") and self.group_size <= 0:
            return weights, 4 * outputs  # a scale a channel at most
        if self.weights == "fp4":  # NVFP4: an fp8 scale for 16 weights
            return weights, math.ceil(inputs / 16) * outputs
        groups = 1 if self.group_size == -1 else math.ceil(inputs / self.group_size)
        zeros = groups * outputs * (dtype_bytes if wide_zeros else self.bits / 8) if self.zero_points else 0
        order = 4 * inputs if self.act_order else 0
        sizes = (weights, int(groups * outputs * dtype_bytes), math.ceil(zeros), order)
        return tuple(size for size in sizes if size)


def parse(config: Mapping[str, Any] | None, where: str = "config.json") -> Quantisation | None:
    """Reads a `quantization_config`; None without one.

    Raises:
        InputError: a method or a format that is not known here.
    """
    if not config:
        return None
    method = str(config.get("quant_method", "")).lower().replace("_", "-")
    method = ALIASES.get(method.replace("-", "_"), method)
    readers = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "bitsandbytes": _bnb, "compressed-tensors": _compressed}
    if method not in readers:
        raise InputError(
            f"{where}: quantization_config.quant_method: {config.get('quant_method')!r} is not described here. "
            f"Known: {', '.join(METHODS)}."
        )
    return readers[method](config)


def online(method: str) -> Quantisation:
    """What `--quantization` makes of an unquantised checkpoint while loading it.

    Raises:
        InputError: a method that needs a checkpoint made for it.
    """
    if method == "fp8":
        return Quantisation("fp8", "fp8", 8, activations="fp8")
    if method == "bitsandbytes":
        return Quantisation("bitsandbytes", "nf4", 4)
    raise InputError(
        f"quantization: {method!r}: the checkpoint is not quantised, and only fp8 and bitsandbytes quantise while "
        "loading. Take a checkpoint made for it."
    )


def _names(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(name for key in keys for name in config.get(key) or ())


def _awq(config: Mapping[str, Any]) -> Quantisation:
    bits = int(config.get("bits", config.get("w_bit", 4)))
    group_size = int(config.get("group_size", config.get("q_group_size", 128)))
    zeros = bool(config.get("zero_point", True))
    return Quantisation("awq", f"int{bits}", bits, group_size, zeros, skipped=_names(config, "modules_to_not_convert"))


def _gptq(config: Mapping[str, Any]) -> Quantisation:
    """Symmetric GPTQ drops its zero points after loading (`MarlinLinearKernel`: `marlin_make_empty`)."""
    if "24" in str(config.get("checkpoint_format")):
        raise InputError("quantization_config.checkpoint_format: sparse (2:4) weights are not described here.")
    bits, act_order = int(config.get("bits", 4)), bool(config.get("desc_act", False))
    return Quantisation(
        "gptq",
        f"int{bits}",
        bits,
        int(config.get("group_size", 128)),
        zero_points=not config.get("sym", True),
        act_order=act_order,
        skipped=_names(config, "modules_to_not_convert"),
        lm_head=bool(config.get("lm_head", False)),
    )


def _fp8(config: Mapping[str, Any]) -> Quantisation:
    block = config.get("weight_block_size")
    skipped = _names(config, "ignored_layers", "modules_to_not_convert")
    size = (int(block[0]), int(block[1])) if block else None
    return Quantisation("fp8", "fp8", 8, activations="fp8", block=size, skipped=skipped)


def _bnb(config: Mapping[str, Any]) -> Quantisation:
    skipped = _names(config, "llm_int8_skip_modules")
    if config.get("load_in_4bit", config.get("_load_in_4bit", False)):
        return Quantisation("bitsandbytes", str(config.get("bnb_4bit_quant_type", "nf4")), 4, skipped=skipped)
    return Quantisation("bitsandbytes", "int8", 8, skipped=skipped)


def _compressed(config: Mapping[str, Any]) -> Quantisation:
    """Sparse weights take less memory and time than is reckoned here."""
    if config.get("sparsity_config") or "24" in str(config.get("format")):
        raise InputError("quantization_config.sparsity_config: sparse (2:4) weights are not described here.")
    groups = list((config.get("config_groups") or {}).values())
    if len({repr((group.get("weights"), group.get("input_activations"))) for group in groups}) != 1:
        raise InputError(
            "quantization_config.config_groups: schemes that differ by layer are not described here (mixed precision)."
        )
    weights, inputs = groups[0]["weights"], groups[0].get("input_activations")
    bits, kind = int(weights["num_bits"]), str(weights.get("type", "int"))
    group_size = int(weights.get("group_size") or -1)
    return Quantisation(
        "compressed-tensors",
        f"{'fp' if kind == 'float' else 'int'}{bits}",
        bits,
        group_size,
        zero_points=not weights.get("symmetric", True),
        activations=f"{'fp' if inputs.get('type') == 'float' else 'int'}{inputs['num_bits']}" if inputs else None,
        skipped=_names(config, "ignore"),
        lm_head="lm_head" in groups[0].get("targets", ()),
    )
