from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny local Llama with a chat template, made by the quickstart's own script."""
    spec = importlib.util.spec_from_file_location("make_model", ROOT / "experiments" / "make_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    module.make_model("tiny-llama", directory)
    return directory
