"""A model as its `config.json` describes it: every weight matrix, the attention of every layer, and nothing guessed.

An architecture that is not in FAMILIES is refused: a wrong count would make a wrong rule. Shapes follow
`vllm/model_executor/models/` and `transformers/models/` (checked on the meta device in `tests/test_model.py`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from varcas.errors import InputError, nearest
from varcas.quantisation import Quantisation, online, parse

Op = Literal["embed", "attention", "mlp", "moe", "logits", "norm"]
Split = Literal["column", "row", "vocab", "none"]
VOCAB_PADDING = 64
"""`DEFAULT_VOCAB_PADDING_SIZE` in vLLM's `layers/vocab_parallel_embedding.py`."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_ALIASES = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
MAX_HEADER_BYTES = 100 * 2**20
"""Of a safetensors file; its authors allow no more."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the matrices that vLLM fuses into a weight: its name in the checkpoint and its outputs.

    `heads` says into how many pieces tensor parallelism may cut it; with more ranks than pieces, ranks hold copies.
    """

    name: str
    outputs: int
    heads: int = 0

    def on_rank(self, ranks: int) -> int:
        """Outputs of it that one of `ranks` holds."""
        return self.outputs // self.heads * max(1, self.heads // ranks) if self.heads else -(-self.outputs // ranks)


@dataclass(frozen=True, slots=True)
class Weight:
    """A kind of weight tensor, as vLLM fuses it, in all the layers that have it.

    Attributes:
        path: its module in layer `{}`, as `quantization_config` would name it.
        parts: what is fused; one for most.
        op: operator class it belongs to.
        inputs: rows; 0 for a vector such as a norm's.
        layers: that have it; (-1,) for one of the whole model.
        split: how tensor parallelism cuts it.
        bias: with a vector of the outputs.
        linear: may be quantised.
        experts: copies of it in a layer.
        used: of those, how many a token goes through.
    """

    path: str
    parts: tuple[Part, ...]
    op: Op
    inputs: int
    layers: tuple[int, ...] = (-1,)
    split: Split = "none"
    bias: bool = False
    linear: bool = False
    experts: int = 1
    used: int = 1

    @property
    def outputs(self) -> int:
        """Columns, all parts together."""
        return sum(part.outputs for part in self.parts)

    @property
    def elements(self) -> int:
        """Of its matrix in one layer, one expert, without the bias."""
        return self.inputs * self.outputs if self.inputs else self.outputs

    @property
    def parameters(self) -> int:
        """In the whole model."""
        return len(self.layers) * self.experts * (self.elements + (self.outputs if self.bias else 0))

    def shape_on_rank(self, ranks: int) -> tuple[int, int]:
        """Inputs and outputs that one of `ranks` holds."""
        if self.split == "column":
            return self.inputs, sum(part.on_rank(ranks) for part in self.parts)
        if self.split == "row":
            return -(-self.inputs // ranks), self.outputs
        if self.split == "vocab":
            return self.inputs, -(-_padded(self.outputs) // ranks)
        return self.inputs, self.outputs

    def names(self, layer: int) -> Iterator[str]:
        """Of its parts in a layer, in the checkpoint."""
        for part in self.parts:
            yield f"{self.path.format(layer)}.{part.name}" if self.path else part.name


@dataclass(frozen=True, slots=True)
class Attention:
    """The layers that attend alike.

    Attributes:
        layers: how many.
        heads: query heads.
        kv_heads: key and value heads; 1 for MLA, whose latent vector all heads share.
        head_dim: of a query and a key.
        value_dim: of a value.
        window: tokens that a query sees; None for all.
        latent_dim: of MLA's cached vector, position part included; 0 without MLA.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    latent_dim: int = 0

    def cuts_into(self, ranks: int) -> bool:
        """Whether tensor parallelism over `ranks` is possible: whole heads, and whole or copied key-value heads.

        Source: `LlamaAttention.__init__`, vLLM `models/llama.py`; `ModelConfig.verify_with_parallel_config`.
        """
        copies = self.kv_heads % ranks == 0 if self.kv_heads >= ranks else ranks % self.kv_heads == 0
        return self.heads % ranks == 0 and (copies or bool(self.latent_dim))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the headers of a directory's safetensors files say: nothing is loaded."""

    files: int
    tensors: int
    bytes: int
    elements: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model.

    Attributes:
        name: of its directory.
        family: `model_type` of the text model.
        dtype: of the checkpoint: float32, float16 or bfloat16.
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        vocab_size: rows of the embedding, unpadded.
        max_position: longest context of `config.json`.
        rotary_dim: of a head, rotated.
        attention: kinds of attention, with the number of layers of each.
        weights: every tensor.
        tied: the output projection is the embedding.
        complete: false where a part outside the text model (a vision tower) is not counted.
        quantisation: of the linear layers; None without.
        plain: for each of `weights`, in how many of its layers it is held unquantised; empty without quantisation.
        checkpoint: the files' own headers, where there are files.
    """

    name: str
    family: str
    dtype: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_position: int
    rotary_dim: int
    attention: tuple[Attention, ...]
    weights: tuple[Weight, ...]
    tied: bool
    complete: bool = True
    quantisation: Quantisation | None = None
    plain: tuple[int, ...] = ()
    checkpoint: Checkpoint | None = None

    @property
    def parameters(self) -> int:
        """All of them, a tied embedding once."""
        return sum(weight.parameters for weight in self.weights)

    @property
    def active_parameters(self) -> int:
        """That one token goes through: of the experts only those it is sent to."""
        return sum(weight.parameters * weight.used // weight.experts for weight in self.weights)

    @property
    def is_moe(self) -> bool:
        """Some layer has experts."""
        return any(weight.experts > 1 for weight in self.weights)

    def quantised(self, method: str) -> ModelSpec:
        """This model as `--quantization METHOD` loads it. Raises InputError when it cannot be."""
        return self if self.quantisation is not None else self.stored_as(online(method))

    def stored_as(self, quantisation: Quantisation | None) -> ModelSpec:
        """This model with its linear layers in a format."""
        if quantisation is None:
            return replace(self, quantisation=None, plain=())
        plain = tuple(sum(_is_plain(w, layer, quantisation) for layer in w.layers) for w in self.weights)
        return replace(self, quantisation=quantisation, plain=plain)

    def held(self) -> Iterator[tuple[Weight, int, int]]:
        """Each weight, in how many layers it is held unquantised, and in how many quantised."""
        plain = self.plain or [len(weight.layers) for weight in self.weights]
        for weight, count in zip(self.weights, plain, strict=True):
            yield weight, count, len(weight.layers) - count

    def tensors(self, dtype: str, ranks: int = 1, wide_zeros: bool = False) -> Counter[int]:
        """Sizes in bytes of the tensors that one rank holds once loaded, and how many there are of each.

        Args:
            dtype: that vLLM computes in.
            ranks: of tensor parallelism.
            wide_zeros: see `Quantisation.tensors`.
        """
        width, sizes = DTYPE_BYTES[dtype_name(dtype)], Counter[int]()
        for weight, plain, packed in self.held():
            inputs, outputs = weight.shape_on_rank(ranks)
            if plain:
                sizes[weight.experts * max(inputs, 1) * outputs * width] += plain
            if weight.bias:
                sizes[weight.experts * outputs * width] += len(weight.layers)
            if self.quantisation is not None and packed:
                for size in self.quantisation.tensors(inputs, outputs, width, wide_zeros):
                    sizes[weight.experts * size] += packed
        if self.quantisation is not None and (absorbed := self._absorbed_bytes(ranks, width)):
            sizes[absorbed] += self.num_layers
        return sizes

    def weight_bytes(self, dtype: str, ranks: int = 1, wide_zeros: bool = False) -> int:
        """Bytes of the weights that one rank holds once loaded: see `tensors`."""
        return sum(size * count for size, count in self.tensors(dtype, ranks, wide_zeros).items())

    def _absorbed_bytes(self, ranks: int, width: int) -> int:
        """MLA keeps `kv_b_proj` once more, widened, to attend over the latent vector.

        Source: `MLAAttention.process_weights_after_loading`, vLLM `layers/attention/mla_attention.py` (`W_UK_T`, `W_UV`
        from the dequantised weight; of an unquantised one they are views and cost nothing).
        """
        up = [weight for weight in self.weights if weight.parts[0].name == "kv_b_proj"]
        return math.prod(up[0].shape_on_rank(ranks)) * width if up else 0


def _is_plain(weight: Weight, layer: int, quantisation: Quantisation) -> bool:
    if not (weight.linear or (weight.op == "logits" and quantisation.lm_head)):
        return True
    return all(quantisation.skips(name) for name in weight.names(layer))


def dtype_name(dtype: str) -> str:
    """`half` → `float16`. Raises InputError for a type that vLLM does not compute in."""
    name = DTYPE_ALIASES.get(dtype, dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise InputError(
            f"dtype: {dtype!r}: no type to compute in.{nearest(dtype, DTYPE_BYTES)} Known: {', '.join(DTYPE_BYTES)}."
        )
    return name


def describe(directory: str | Path) -> ModelSpec:
    """Reads a model's directory: `config.json`, and the headers of safetensors files where there are any.

    Raises:
        InputError: no readable `config.json`, an architecture or a format that is not described here.
    """
    path = Path(directory)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model: {path}: no readable config.json ({error}). Give a model's directory.") from error
    spec = from_config(config, path.name, str(path / "config.json"))
    return replace(spec, checkpoint=read_headers(path))


def from_config(config: Mapping[str, Any], name: str = "model", where: str = "config.json") -> ModelSpec:
    """The model of a `config.json`'s content. Raises InputError as `describe`."""
    if not isinstance(config, dict):
        raise InputError(f"{where}: is no mapping. Give a Hugging Face config.json.")
    text = config.get("text_config")
    flat = {**config, **text} if isinstance(text, dict) else config
    family = str(flat.get("model_type"))
    build = FAMILIES.get(family)
    if build is None:
        raise InputError(
            f"{where}: model_type: {family!r} is not described here.{nearest(family, FAMILIES)} "
            f"Known: {', '.join(sorted(FAMILIES))}. A new one is an entry of FAMILIES in model.py."
        )
    try:
        spec = build(_Config(flat), name, family)
        stored = parse(config.get("quantization_config") or flat.get("quantization_config"), where)
        return replace(spec.stored_as(stored), complete="vision_config" not in config)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{where}: a field of {family} is missing or of the wrong type: {error}.") from error


def read_headers(directory: Path) -> Checkpoint | None:
    """Counts a directory's safetensors files by their headers; None without any.

    Raises:
        InputError: a file that is no safetensors file.
    """
    files = sorted(directory.glob("*.safetensors"))
    elements: Counter[str] = Counter()
    tensors = total = 0
    for file in files:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                tensors += 1
                elements[entry["dtype"]] += math.prod(entry["shape"])
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return Checkpoint(len(files), tensors, total, dict(elements)) if files else None


def _header(file: Path) -> dict[str, Any]:
    """Format: https://huggingface.co/docs/safetensors: 8 bytes of length, then that much JSON."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{file}: header of {length} bytes: no safetensors file.")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: no readable safetensors header ({error}).") from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: its header is no mapping: no safetensors file.")
    return header


def _padded(vocab: int) -> int:
    return -(-vocab // VOCAB_PADDING) * VOCAB_PADDING


@dataclass(frozen=True, slots=True)
class _Config:
    """A flat config with the family's defaults behind it."""

    values: Mapping[str, Any]

    def number(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise KeyError(key)
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)

    def window(self, default: int | None = None) -> int | None:
        value = self.values.get("sliding_window", default)
        return None if value is None else int(value)

    @property
    def dtype(self) -> str:
        return dtype_name(str(self.values.get("dtype") or self.values.get("torch_dtype") or "float32"))


@dataclass(frozen=True, slots=True)
class _Family:
    """What sets a family apart where its `config.json` is silent."""

    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    head_dim: int | None = None
    windows: Callable[[_Config, int], list[int | None]] | None = None
    defaults: tuple[tuple[str, int], ...] = ()

    def __call__(self, config: _Config, name: str, family: str) -> ModelSpec:
        config = _Config({**dict(self.defaults), **config.values})
        shape = _Shape.of(config, self.head_dim)
        windows = self.windows(config, shape.layers) if self.windows else [None] * shape.layers
        kinds = Counter(windows)
        attention = tuple(
            Attention(count, shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim, window)
            for window, count in kinds.items()
        )
        weights = [*_attention(config, shape, self), *_feed_forward(config, shape)]
        weights += _norms(shape, self.norms, per_head=self.qk_norm)
        return _spec(config, shape, name, family, attention, weights, self.tied)


@dataclass(frozen=True, slots=True)
class _Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: _Config, head_dim: int | None = None) -> _Shape:
        hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
        return cls(
            hidden,
            config.number("num_hidden_layers"),
            heads,
            config.number("num_key_value_heads", heads),
            config.number("head_dim", head_dim or hidden // heads),
            config.number("vocab_size"),
        )

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(range(self.layers))


def _spec(
    config: _Config,
    shape: _Shape,
    name: str,
    family: str,
    attention: tuple[Attention, ...],
    weights: list[Weight],
    tied_by_default: bool,
    head_bias: bool = False,
) -> ModelSpec:
    tied = config.flag("tie_word_embeddings", tied_by_default)
    vocab = Part("lm_head", shape.vocab)
    ends = [Weight("model", (Part("embed_tokens", shape.vocab),), "embed", shape.hidden, split="vocab")]
    if not tied:
        ends.append(Weight("", (vocab,), "logits", shape.hidden, split="vocab", bias=head_bias))
    rotary = float(config.values.get("partial_rotary_factor") or 1)
    rope_dim = config.values.get("qk_rope_head_dim") or int(shape.head_dim * rotary)
    return ModelSpec(
        name=name,
        family=family,
        dtype=config.dtype,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        vocab_size=shape.vocab,
        max_position=config.number("max_position_embeddings"),
        rotary_dim=int(rope_dim),
        attention=attention,
        weights=(*ends, *weights),
        tied=tied,
    )


def _attention(config: _Config, shape: _Shape, family: _Family) -> list[Weight]:
    bias = config.flag("attention_bias")
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    qkv = (
        Part("q_proj", width, shape.heads),
        Part("k_proj", kv_width, shape.kv_heads),
        Part("v_proj", kv_width, shape.kv_heads),
    )
    path = "model.layers.{}.self_attn"
    qkv_bias = config.flag("qkv_bias", family.qkv_bias) or bias
    return [
        Weight(path, qkv, "attention", shape.hidden, shape.all, "column", bias=qkv_bias, linear=True),
        Weight(path, (Part("o_proj", shape.hidden),), "attention", width, shape.all, "row", bias=bias, linear=True),
    ]


def _feed_forward(config: _Config, shape: _Shape) -> list[Weight]:
    """Dense layers, and those with experts where the config has some."""
    experts = next((config.number(key) for key in EXPERT_KEYS if config.values.get(key)), 0)
    if not experts:
        return _mlp(shape.hidden, config.number("intermediate_size"), shape.all, bias=config.flag("mlp_bias"))
    sparse = tuple(layer for layer in shape.all if _is_sparse(config, layer))
    dense = tuple(layer for layer in shape.all if layer not in sparse)
    size = config.number("moe_intermediate_size", config.number("intermediate_size"))
    used = config.number("num_experts_per_tok")
    weights = _mlp(shape.hidden, size, sparse, op="moe", path="model.layers.{}.mlp.experts.0", copies=(experts, used))
    weights.append(
        Weight("model.layers.{}.mlp", (Part("gate", experts),), "moe", shape.hidden, sparse)  # the router
    )
    if config.values.get("topk_method") == "noaux_tc":
        weights.append(
            Weight("model.layers.{}.mlp.gate", (Part("e_score_correction_bias", experts),), "moe", 0, sparse)
        )
    if shared := _shared_size(config, size):
        weights += _mlp(shape.hidden, shared, sparse, op="moe", path="model.layers.{}.mlp.shared_experts")
    if config.values.get("shared_expert_intermediate_size"):
        weights.append(Weight("model.layers.{}.mlp", (Part("shared_expert_gate", 1),), "moe", shape.hidden, sparse))
    return [*weights, *(_mlp(shape.hidden, config.number("intermediate_size"), dense) if dense else ())]


EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


def _is_sparse(config: _Config, layer: int) -> bool:
    """Mixtral: all; Qwen: `decoder_sparse_step`, `mlp_only_layers`; DeepSeek: after `first_k_dense_replace`."""
    if layer in (config.values.get("mlp_only_layers") or ()) or layer < config.number("first_k_dense_replace", 0):
        return False
    every = config.number("decoder_sparse_step", 1)
    return (layer + 1) % every == 0 and layer % config.number("moe_layer_freq", 1) == 0


def _shared_size(config: _Config, expert_size: int) -> int:
    return config.number("shared_expert_intermediate_size", config.number("n_shared_experts", 0) * expert_size)


def _mlp(
    hidden: int,
    size: int,
    layers: tuple[int, ...],
    *,
    op: Op = "mlp",
    path: str = "model.layers.{}.mlp",
    bias: bool = False,
    copies: tuple[int, int] = (1, 1),
) -> list[Weight]:
    gate_up, down = (Part("gate_proj", size), Part("up_proj", size)), (Part("down_proj", hidden),)
    experts, used = copies
    return [
        Weight(path, gate_up, op, hidden, layers, "column", bias, True, experts, used),
        Weight(path, down, op, size, layers, "row", bias, True, experts, used),
    ]


def _norms(shape: _Shape, each_layer: int, per_head: bool = False) -> list[Weight]:
    weights = [
        Weight("model.layers.{}", (Part("norms", each_layer * shape.hidden),), "norm", 0, shape.all),
        Weight("model", (Part("norm", shape.hidden),), "norm", 0),
    ]
    if per_head:
        weights.append(
            Weight("model.layers.{}.self_attn", (Part("qk_norm", 2 * shape.head_dim),), "norm", 0, shape.all)
        )
    return weights


def _one_window(config: _Config, layers: int) -> list[int | None]:
    return [config.window()] * layers


def _mistral_windows(config: _Config, layers: int) -> list[int | None]:
    return [config.window(default=4096)] * layers


def _qwen_windows(config: _Config, layers: int) -> list[int | None]:
    if not config.flag("use_sliding_window"):
        return [None] * layers
    first = config.number("max_window_layers", 28)
    return [config.window(default=4096) if layer >= first else None for layer in range(layers)]


def _gemma_windows(config: _Config, layers: int) -> list[int | None]:
    """Gemma 2 and 3: one layer of `sliding_window_pattern` (2, then 6) sees everything."""
    every, window = config.number("sliding_window_pattern"), config.window(default=4096)
    types = config.values.get("layer_types") or [
        "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)
    ]
    return [window if kind == "sliding_attention" else None for kind in types]


def _phi(config: _Config, name: str, family: str) -> ModelSpec:
    """Phi-1, 1.5 and 2: biases everywhere, one LayerNorm a layer, an MLP of two matrices."""
    shape, size = _Shape.of(config), config.number("intermediate_size")
    path = "model.layers.{}.mlp"
    attention = Weight(
        "model.layers.{}.self_attn",
        tuple(
            Part(part, heads * shape.head_dim, heads)
            for part, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads), ("v_proj", shape.kv_heads))
        ),
        "attention", shape.hidden, shape.all, "column", bias=True, linear=True,
    )  # fmt: skip
    width = shape.heads * shape.head_dim
    out = Part("dense", shape.hidden)
    weights = [
        attention,
        Weight("model.layers.{}.self_attn", (out,), "attention", width, shape.all, "row", True, True),
        Weight(path, (Part("fc1", size),), "mlp", shape.hidden, shape.all, "column", True, True),
        Weight(path, (Part("fc2", shape.hidden),), "mlp", size, shape.all, "row", True, True),
        Weight("model.layers.{}", (Part("input_layernorm", shape.hidden),), "norm", 0, shape.all, bias=True),
        Weight("model", (Part("final_layernorm", shape.hidden),), "norm", 0, bias=True),
    ]
    kinds = (Attention(shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim),)
    return _spec(config, shape, name, family, kinds, weights, False, head_bias=True)


def _deepseek(config: _Config, name: str, family: str) -> ModelSpec:
    """DeepSeek V2 and V3: latent attention, dense layers first; the files' next-token (MTP) layers are not counted."""
    shape = _Shape.of(config)
    nope, rope = config.number("qk_nope_head_dim"), config.number("qk_rope_head_dim")
    value, latent = config.number("v_head_dim"), config.number("kv_lora_rank")
    rank = config.number("q_lora_rank", 0) if config.values.get("q_lora_rank") else 0
    path, every = "model.layers.{}.self_attn", shape.all
    queries = Part("q_b_proj" if rank else "q_proj", shape.heads * (nope + rope), shape.heads)
    up, width = Part("kv_b_proj", shape.heads * (nope + value), shape.heads), shape.heads * value
    down = (*((Part("q_a_proj", rank),) if rank else ()), Part("kv_a_proj_with_mqa", latent + rope))
    weights = [
        Weight(path, down, "attention", shape.hidden, every, linear=True),
        Weight(path, (queries,), "attention", rank or shape.hidden, every, "column", linear=True),
        Weight(path, (up,), "attention", latent, every, "column", linear=True),
        Weight(path, (Part("o_proj", shape.hidden),), "attention", width, every, "row", linear=True),
        Weight(path, (Part("a_layernorms", latent + rank),), "norm", 0, every),
        *_feed_forward(config, shape),
        *_norms(shape, 2),
    ]
    kinds = (Attention(shape.layers, shape.heads, 1, nope + rope, value, latent_dim=latent + rope),)
    return _spec(config, shape, name, family, kinds, weights, False)


_GEMMA3 = _Family(
    tied=True,
    qk_norm=True,
    norms=4,
    head_dim=256,
    windows=_gemma_windows,
    defaults=(
        ("sliding_window_pattern", 6),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("vocab_size", 262208),
        ("max_position_embeddings", 131072),
    ),
)

FAMILIES: dict[str, Callable[[_Config, str, str], ModelSpec]] = {
    "llama": _Family(),
    "mistral": _Family(windows=_mistral_windows, defaults=(("num_key_value_heads", 8),)),
    "mixtral": _Family(windows=_one_window, defaults=(("num_key_value_heads", 8),)),
    "qwen2": _Family(qkv_bias=True, windows=_qwen_windows),
    "qwen2_moe": _Family(qkv_bias=True, windows=_qwen_windows),
    "qwen3": _Family(qk_norm=True, head_dim=128, windows=_qwen_windows),
    "qwen3_moe": _Family(qk_norm=True, windows=_qwen_windows),
    "gemma": _Family(tied=True, head_dim=256),
    "gemma2": _Family(
        tied=True, norms=4, head_dim=256, windows=_gemma_windows, defaults=(("sliding_window_pattern", 2),)
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi": _phi,
    "phi3": _Family(windows=_one_window),
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
"""`model_type` to what builds its description."""
