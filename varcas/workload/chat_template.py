"""Whether a model is asked through chat or through completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from varcas.workload.wire import Endpoint

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tekken.json")
"""Files that bring a chat template; Mistral's own tokenizer has its template built in."""


def decide_endpoint(
    endpoint: Literal["auto", "chat", "completions"], model_dir: Path | None, serve_flags: Mapping[str, JsonValue]
) -> Endpoint:
    """Decides before a server starts: `auto` is chat when there is a chat template, else completions.

    Args:
        endpoint: as the workload has it.
        model_dir: the local directory of the model; None when there is none to look into.
        serve_flags: of the server, with underscores; `chat_template` and `tokenizer_mode` count.
    """
    if endpoint != "auto":
        return endpoint
    has_template = (
        bool(serve_flags.get("chat_template"))
        or serve_flags.get("tokenizer_mode") == "mistral"
        or (model_dir is not None and _has_template(model_dir))
    )
    return "chat" if has_template else "completions"


def _has_template(model_dir: Path) -> bool:
    if any((model_dir / name).is_file() for name in TEMPLATE_FILES):
        return True
    try:
        config = json.loads((model_dir / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):  # vLLM will say what is wrong with it
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))
