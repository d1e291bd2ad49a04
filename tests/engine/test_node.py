"""What a node does before any server starts there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from varcas.engine.node import Node, other_models
from varcas.errors import TrialError
from varcas.experiment import Server


@pytest.mark.parametrize(
    ("flags", "models"),
    [
        ({}, []),
        ({"speculative_config": None, "tokenizer": "org/tok"}, [("org/tok", None)]),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, []),
        ({"speculative_config": {"model": "[ngram]", "num_speculative_tokens": 3}}, []),
        ({"speculative_config": {"model": "org/draft", "revision": "v1"}}, [("org/draft", "v1")]),
    ],
)
def test_a_configuration_names_its_other_models(flags: dict[str, Any], models: list[tuple[str, str | None]]) -> None:
    assert other_models(flags) == models


def test_a_draft_model_that_cannot_be_had_fails_before_a_server_starts(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VARCAS_CACHE", str(tmp_path))
    node = Node(Server(env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}), str(model_dir), None)
    node.fetch_others({"speculative_config": {"method": "ngram"}})
    node.fetch_others({"speculative_config": {"model": str(model_dir)}})
    with pytest.raises(TrialError) as caught:
        node.fetch_others({"speculative_config": {"model": "org/absent-draft"}})
    assert caught.value.kind == "model_download"
    assert "org/absent-draft" in caught.value.detail
