"""Makes a local model directory with no download: a `config.json` and a small BPE tokenizer trained here.

    python experiments/make_model.py tiny-llama models/tiny-llama
    python experiments/make_model.py llama-2-7b-awq models/llama-2-7b-awq

vLLM serves it with `load_format: dummy`: random weights of the right shape, so the *speed* is real and the text is not.
Weight values hardly matter to the time of a step; acceptance rates of speculative decoding do depend on them and mean
nothing here.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float16",
}

SHAPES: dict[str, dict[str, Any]] = {
    # 4 layers of 256: ready in about 40 s on 2 cores
    "tiny-llama": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "vocab_size": 2048,
        "torch_dtype": "float32",
    },
    # https://huggingface.co/TheBloke/Llama-2-7B-AWQ/blob/main/config.json: shape and quantisation, not its weights
    "llama-2-7b-awq": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
        },
    },
}


def train_tokenizer(vocab_size: int, seed: int = 0) -> Tokenizer:
    """A byte-level BPE tokenizer trained on pseudo-words drawn from `seed`: the same bytes for the same arguments."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(4000)]
    corpus = [" ".join(rng.choices(words, k=40)) for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=min(vocab_size, 2000),
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def make_model(shape: str, directory: Path, chat_template: bool = True) -> None:
    """Writes `config.json`, `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = LLAMA | SHAPES[shape]
    tokenizer = train_tokenizer(config["vocab_size"])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "model_max_length": config["max_position_embeddings"],
    }
    if chat_template:
        tokenizer_config["chat_template"] = CHAT_TEMPLATE
    for name, content in {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
    }.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--no-chat-template", action="store_true", help="make a base model, which vLLM refuses to chat with"
    )
    args = parser.parse_args()
    make_model(args.shape, args.directory, chat_template=not args.no_chat_template)
    print(f"{args.shape}: {args.directory}", file=sys.stderr)


if __name__ == "__main__":
    main()
