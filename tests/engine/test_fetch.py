"""A model is fetched once a node, with a deadline; a directory is checked."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from varcas.engine.fetch import (
    FetchedModel,
    check_local_model,
    fetch_model,
    is_local,
    lacks_weights,
    local_revision,
    weights_problem,
)
from varcas.errors import InputError, TrialError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fetch(
    model: str, tmp_path: Path, python: str = sys.executable, deadline_s: float = 60, **more: object
) -> FetchedModel:
    """Fetches with caches of the test's own and no network."""
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    return fetch_model(
        model,
        None,
        python=python,
        env=env,
        cache_dir=tmp_path / "cache",
        log=tmp_path / "fetch.log",
        deadline_s=deadline_s,
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture
def in_hub_cache(tmp_path: Path) -> Path:
    """A snapshot of org/name as huggingface_hub lays it out."""
    root = tmp_path / "hf" / "hub" / "models--org--name"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize(
    ("model", "local"),
    [
        ("org/name", False),
        ("gpt2", False),
        ("meta-llama/Llama-2-7b-hf", False),
        ("/x/y", True),
        ("./y", True),
        ("~/y", True),
        ("a/b/c", True),
        ("with space", True),
    ],
)
def test_hub_ids_and_paths_are_told_apart(model: str, local: bool) -> None:
    assert is_local(model) == local


def test_a_directory_needs_a_config(tmp_path: Path, model_dir: Path) -> None:
    check_local_model(str(model_dir))
    check_local_model("org/name")
    with pytest.raises(InputError, match=r"model: /nowhere/x: no such directory"):
        check_local_model("/nowhere/x")
    with pytest.raises(InputError, match=r"has no config\.json"):
        check_local_model(str(tmp_path))


def test_a_missing_directory_under_an_existing_one_is_no_hub_id() -> None:
    with pytest.raises(InputError, match=r"model: tests/absent: no such directory") as caught:
        check_local_model("tests/absent")
    assert str(Path("tests/absent").absolute()) in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.gguf", "model.safetensors.index.json"])
def test_weights_are_looked_for(name: str, model_dir: Path) -> None:
    assert lacks_weights(str(model_dir))
    assert "load_format: dummy" in (weights_problem(str(model_dir), {}) or "")
    assert weights_problem(str(model_dir), {"load_format": "dummy"}) is None
    (model_dir / name).touch()
    assert not lacks_weights(str(model_dir))
    assert weights_problem(str(model_dir), {}) is None


def test_the_weights_of_a_hub_model_are_not_looked_for() -> None:
    assert not lacks_weights("org/name")


def test_a_directory_is_its_own_path_and_its_revision_follows_its_content(tmp_path: Path, model_dir: Path) -> None:
    fetched = fetch(str(model_dir), tmp_path)
    assert fetched == FetchedModel(str(model_dir), local_revision(model_dir))
    (model_dir / "model.safetensors").write_bytes(b"123")
    with_weights = local_revision(model_dir)
    assert with_weights != fetched.revision
    (model_dir / "model.safetensors").write_bytes(b"1234")
    assert local_revision(model_dir) != with_weights
    (model_dir / "model.safetensors").unlink()
    assert local_revision(model_dir) == fetched.revision
    (model_dir / "config.json").write_text("{}")
    assert local_revision(model_dir) != fetched.revision


def test_a_directory_that_is_none_fails_the_trial(tmp_path: Path) -> None:
    with pytest.raises(TrialError) as caught:
        fetch(str(tmp_path), tmp_path)
    assert caught.value.kind == "bad_model_files"


def test_a_hub_model_is_found_in_the_cache_and_then_remembered(tmp_path: Path, in_hub_cache: Path) -> None:
    assert fetch("org/name", tmp_path) == FetchedModel(str(in_hub_cache), COMMIT)
    began_s = time.perf_counter()
    assert fetch("org/name", tmp_path, python="/not/asked/again").revision == COMMIT
    assert time.perf_counter() - began_s < 0.05


def test_without_network_the_download_fails_as_such(tmp_path: Path) -> None:
    with pytest.raises(TrialError) as caught:
        fetch("org/absent", tmp_path)
    assert caught.value.kind == "model_download"
    assert "org/absent" in caught.value.detail


def test_a_python_without_the_hub_is_a_missing_dependency(tmp_path: Path, without_vllm: str) -> None:
    with pytest.raises(TrialError) as caught:
        fetch("org/name", tmp_path, python=without_vllm)
    assert caught.value.kind == "missing_dependency"
    assert "huggingface_hub" in caught.value.detail


def test_a_slow_download_ends_at_its_deadline(tmp_path: Path, executable: Callable[[str], str]) -> None:
    slow = executable("trap '' TERM; sleep 60 & echo $! > $(dirname $0)/pid; wait")
    began_s = time.monotonic()
    with pytest.raises(TrialError, match="not fetched before the deadline") as caught:
        fetch("org/name", tmp_path, python=slow, deadline_s=0.5)
    assert caught.value.kind == "model_download"
    assert time.monotonic() - began_s < 15
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_a_download_ends_when_the_sweep_does(tmp_path: Path, executable: Callable[[str], str]) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(TrialError) as caught:
        fetch("org/name", tmp_path, python=executable("exec sleep 60"), cancelled=cancelled)
    assert caught.value.kind == "interrupted"


def test_several_at_once_fetch_once(tmp_path: Path, executable: Callable[[str], str], model_dir: Path) -> None:
    python = executable(f"""sleep 0.5; echo '{{"path": "{model_dir}", "revision": "{COMMIT}"}}'""")
    got: list[FetchedModel] = []
    threads = [
        threading.Thread(target=lambda: got.append(fetch("org/name", tmp_path, python=python))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [FetchedModel(str(model_dir), COMMIT)] * 4
    assert (tmp_path / "fetch.log").read_text().count("$ ") == 1


def test_the_token_is_taken_from_the_environment_and_shown_nowhere(
    tmp_path: Path, executable: Callable[[str], str]
) -> None:
    python = executable('echo "ValueError: I was given $HF_TOKEN" >&2; exit 1')
    os.environ["HF_TOKEN"] = "hf_secretsecretsecret"
    try:
        with pytest.raises(TrialError) as caught:
            fetch("org/name", tmp_path, python=python)
    finally:
        del os.environ["HF_TOKEN"]
    assert "hf_[redacted]" in caught.value.detail
    assert "secretsecret" not in caught.value.detail
