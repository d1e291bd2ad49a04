"""What the engine's tests share: the stand-in for a Python with vLLM, and a model directory that it accepts."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SERVERS = Path(__file__).resolve().parents[1] / "servers"


@pytest.fixture
def fake_python() -> str:
    """A stand-in, not vLLM: see its header."""
    return str(SERVERS / "fake_vllm_python")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory that passes for a model."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return path


@pytest.fixture
def without_vllm() -> str:
    """This environment's base Python, which has no vLLM."""
    return os.path.realpath(sys.executable)


@pytest.fixture
def executable(tmp_path: Path) -> Callable[[str], str]:
    """Makes an executable of a shell script."""

    def make(script: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make
