"""Every form hands the server the arguments of the trial's own command, and holds no secret."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from tests.rows import confirm, experiment, failed, row
from varcas.errors import InputError
from varcas.experiment import Experiment
from varcas.export import (
    FORMS,
    SECRETS,
    Deployment,
    Options,
    export,
    file_name,
    form_named,
    recommended,
    trial_deployment,
    write_scripts,
)
from varcas.space import SERVER_MODULE

HOSTILE: dict[str, JsonValue] = {
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "gpu_memory_utilization": 0.9,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "note": 'it\'s $HOME `id` "quoted" 100%'},
    "chat_template": "{{ messages }}\n'$(id)' \\ \"x\" ; %h",
    "cudagraph_capture_sizes": [1, 2, 4],
    "served": "no",
}


def made(flags: dict[str, JsonValue] | None = None, of: Experiment | None = None, **columns: Any) -> Deployment:
    text = json.dumps(HOSTILE if flags is None else flags)
    found = row(8, 130.0, number=7, config_json=text, server_start_s=40.0, **columns)
    return trial_deployment(found, of or experiment(server="{env: {VLLM_X: 'a $b 50% \"c\"'}}"))


def served(deployment: Deployment, port: int = 8000, host: str = "127.0.0.1") -> list[str]:
    """What the server must be given."""
    return [*deployment.config.argv(placed=True), "--host", host, "--port", str(port)]


# what each form hands over


def of_sh(text: str, directory: Path) -> tuple[list[str], dict[str, str]]:
    """Runs the script with a Python that prints what it is given."""
    script, echo = directory / "start.sh", directory / "python"
    script.write_text(text)
    echo.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done; printf "\\0"; env -0\n')
    echo.chmod(0o755)
    done = subprocess.run(
        ["bash", str(script)], env={"PATH": os.environ["PATH"], "PYTHON": str(echo)}, capture_output=True, check=True
    )
    words, _, env = done.stdout.decode().partition("\0\0")
    return words.split("\0")[2:], dict(line.partition("=")[::2] for line in env.split("\0") if line)


def of_compose(text: str) -> tuple[list[str], dict[str, str]]:
    service = yaml.safe_load(text)["services"]["vllm"]
    assert service["entrypoint"] == ["python3", "-m", SERVER_MODULE]
    env = {name: undoubled(value) for name, value in service["environment"].items() if value is not None}
    return [undoubled(word) for word in service["command"]], env


def of_kubernetes(text: str) -> tuple[list[str], dict[str, str]]:
    container = next(yaml.safe_load_all(text))["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python3", "-m", SERVER_MODULE]
    env = {entry["name"]: undoubled(entry["value"]) for entry in container["env"] if "value" in entry}
    return [undoubled(word) for word in container["args"]], env


def undoubled(text: str) -> str:
    """What Compose and Kubernetes make of a value: `$$` is `$`; a single one would be a variable."""
    assert "$" not in text.replace("$$", "")
    return text.replace("$$", "$")


def of_systemd(text: str) -> tuple[list[str], dict[str, str]]:
    lines = dict(line.partition("=")[::2] for line in text.splitlines() if not line.startswith(("#", "Environment=")))
    words = [word.replace("$$", "$") for word in unit_words(lines["ExecStart"])]
    assert words[1:3] == ["-m", SERVER_MODULE]
    env = [unit_words(line.partition("=")[2])[0] for line in text.splitlines() if line.startswith("Environment=")]
    return words[3:], dict(entry.partition("=")[::2] for entry in env)


def unit_words(line: str) -> list[str]:
    """A slow reading of systemd.syntax: words, double quotes, C escapes, and `%%`."""
    words, word, quoted, escaped, inside = [], "", False, False, False
    for letter in line:
        if escaped:
            word, escaped = word + {"n": "\n", "t": "\t"}.get(letter, letter), False
        elif letter == "\\":
            escaped = True
        elif letter == '"':
            quoted, inside = not quoted, True
        elif letter == " " and not quoted:
            words, word, inside = [*words, word] if word or inside else words, "", False
        else:
            word += letter
    assert not quoted
    assert not escaped
    words = [*words, word] if word or inside else words
    assert all("%" not in word.replace("%%", "") for word in words)
    return [word.replace("%%", "%") for word in words]


def of_vllm_yaml(text: str) -> list[str]:
    """As vLLM 0.32's `load_config_file` reads it; tests/e2e asks vLLM itself."""
    words: list[str] = []
    for key, value in yaml.safe_load(text).items():
        assert not isinstance(value, dict)
        assert value is not False
        words += [f"--{key}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    return words


def joined(argv: list[str]) -> list[str]:
    """`--flag=value` is `--flag value`."""
    return [part for word in argv for part in (word.split("=", 1) if re.match(r"--[a-z-]+=", word) else [word])]


def test_a_script_hands_over_every_word(tmp_path: Path) -> None:
    words, env = of_sh(export(made(), "sh"), tmp_path)
    assert words == served(made())
    assert env["VLLM_X"] == 'a $b 50% "c"'


@pytest.mark.parametrize(("form", "read"), [("compose", of_compose), ("k8s", of_kubernetes), ("systemd", of_systemd)])
def test_a_file_hands_over_every_word(form: str, read: Any) -> None:
    words, env = read(export(made(), form, Options(port=9000)))
    assert words == served(made(), 9000, "127.0.0.1" if form == "systemd" else "0.0.0.0")
    assert env == {"VLLM_X": 'a $b 50% "c"'}


def test_vllms_own_file_hands_over_every_word() -> None:
    assert of_vllm_yaml(export(made(), "vllm-yaml")) == served(made())


VALUES = st.one_of(
    st.booleans(),
    st.integers(-9, 9),
    st.floats(0.01, 99),
    st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), max_size=12),
)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{2,6}_[a-z]{2,6}", fullmatch=True),
        st.one_of(VALUES, st.dictionaries(st.text("abc", min_size=1), VALUES, max_size=3)),
        max_size=5,
    )
)
def test_whatever_the_flags_no_form_loses_a_word(flags: dict[str, JsonValue]) -> None:
    deployment = made(flags)
    assert of_compose(export(deployment, "compose"))[0] == served(deployment, host="0.0.0.0")
    assert of_kubernetes(export(deployment, "k8s"))[0] == served(deployment, host="0.0.0.0")
    assert of_systemd(export(deployment, "systemd"))[0] == served(deployment)
    document = json.loads(export(deployment, "json"))
    assert document["argv"] == deployment.config.argv(placed=True)
    try:
        text = export(deployment, "vllm-yaml")
    except InputError:
        return
    assert of_vllm_yaml(text) == joined(served(deployment))


def test_what_vllms_file_cannot_hold_is_said() -> None:
    with pytest.raises(InputError, match=r"chat_template.*--format sh"):
        export(made({"chat_template": "-x"}), "vllm-yaml")


@pytest.mark.parametrize("form", FORMS)
def test_no_secret_is_in_any_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "hf_verysecret")
    text = export(made(), form)
    assert "verysecret" not in text
    assert "SIMULATED" not in text


@pytest.mark.parametrize("form", FORMS)
def test_what_was_simulated_says_so(form: str, tmp_path: Path) -> None:
    text = export(made(simulated=True), form)
    assert "SIMULATED: no server was measured" in text
    if form == "sh":
        (tmp_path / "s.sh").write_text(text)
        for forced, code in ({}, 1), ({"VARCAS_SIMULATED_OK": "1"}, 0):
            env = {"PYTHON": "/bin/true", "PATH": os.environ["PATH"], **forced}
            done = subprocess.run(
                ["bash", str(tmp_path / "s.sh")], env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == code
            assert ("SIMULATED" in done.stderr) == (code == 1)


# each form's own tool or schema


def on_gpu(directory: Path) -> Deployment:
    (directory / "config.json").write_text("{}")
    of = experiment(hardware="{gpu: T4, count: 2}", server="{env: {VLLM_X: 'a $b'}}")
    of = of.model_copy(update={"model": str(directory)})
    return made({**HOSTILE, "tensor_parallel_size": 2}, of, gpu_name="Tesla T4", gpu_count=2)


def test_compose_is_valid_by_the_compose_specification(tmp_path: Path) -> None:
    spec = pytest.importorskip("compose_spec")
    for deployment in (made(), on_gpu(tmp_path)):
        spec.PyCompose.from_yaml(export(deployment, "compose")).validate()
    text = yaml.safe_load(export(on_gpu(tmp_path), "compose"))
    devices = text["services"]["vllm"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}]
    assert text["services"]["vllm"]["ports"] == ["127.0.0.1:8000:8000"]
    with pytest.raises(ValueError, match="healthchek"):
        spec.PyCompose.from_yaml(export(made(), "compose").replace("healthcheck:", "healthchek:"))


def test_kubernetes_is_valid_by_its_own_schema(tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for deployment in (made(), on_gpu(tmp_path)):
        for document in yaml.safe_load_all(export(deployment, "k8s")):
            validate.validate(document, "1.34", strict=True)
    document = next(yaml.safe_load_all(export(on_gpu(tmp_path), "k8s")))
    container = document["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    document["spec"]["replicas"] = "one"
    with pytest.raises(validate.ValidationError):
        validate.validate(document, "1.34", strict=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_unit_is_valid_by_systemd_itself(tmp_path: Path) -> None:
    unit = tmp_path / "vllm.service"
    unit.write_text(export(made(), "systemd"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vllm.service" not in done.stderr, done.stderr
    unit.write_text(export(made(), "systemd").replace("KillMode=mixed", "KillMode=mxed"))
    again = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "kill mode" in again.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_the_script_is_clean_by_shellcheck(tmp_path: Path) -> None:
    script = tmp_path / "start.sh"
    script.write_text(export(made(), "sh"))
    subprocess.run(["shellcheck", str(script)], check=True)


# names, images, roles


def test_files_are_named_by_what_they_hold() -> None:
    names = [
        file_name("sh", ""),
        file_name("sh", "optimized"),
        file_name("compose", "trial_7"),
        file_name("systemd", ""),
    ]
    assert names == ["start_vllm.sh", "start_vllm_optimized.sh", "compose_trial_7.yaml", "vllm.service"]
    with pytest.raises(InputError, match="Did you mean compose"):
        form_named("composs")


@pytest.mark.parametrize(
    ("columns", "image"),
    [
        ({"gpu_name": "Tesla T4", "engine_version": "0.32.0"}, "vllm/vllm-openai:v0.32.0"),
        ({"gpu_name": "Tesla T4", "engine_version": None}, "vllm/vllm-openai:latest"),
        ({"engine_version": "0.32.0+cpu"}, "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:v0.32.0"),
    ],
)
def test_the_image_is_vllms_own_of_the_measured_version(columns: dict[str, Any], image: str) -> None:
    text = export(made(of=experiment(hardware="{gpu: auto}"), **columns), "compose")
    assert yaml.safe_load(text)["services"]["vllm"]["image"] == image
    assert "mine:1" in export(made(**columns), "k8s", Options(image="mine:1"))


def test_what_is_recommended_is_exported() -> None:
    rows = [row(None, 100), row(8, 130), *confirm(None, 100.0, 101.0, 99.0), *confirm(8, 120.0, 121.0, 119.0)]
    found = recommended(rows, experiment())
    assert found is not None
    assert found.role == "optimized"
    assert found.config.flags == {"dtype": "half", "max_num_seqs": 8}
    kept = recommended([row(None, 100), row(8, 90)], experiment())
    assert kept is not None
    assert (kept.role, dict(kept.config.flags)) == ("", {"dtype": "half"})
    assert recommended([failed(None), failed(8)], experiment()) is None


def test_a_trial_that_failed_says_so_in_its_file() -> None:
    broken = failed(8, "out_of_memory", number=3)
    assert "# varcas study t, trial 3: it is failed (out_of_memory)" in export(
        trial_deployment(broken, experiment()), "sh"
    )


def test_an_answer_that_changed_takes_its_old_script_away(tmp_path: Path) -> None:
    assert write_scripts([row(None, 100), row(8, 130)], experiment(), tmp_path) == str(
        tmp_path / "start_vllm_optimized.sh"
    )
    assert write_scripts([row(None, 100), row(8, 90)], experiment(), tmp_path) == str(tmp_path / "start_vllm.sh")
    assert [path.name for path in tmp_path.iterdir()] == ["start_vllm.sh"]
    assert os.access(tmp_path / "start_vllm.sh", os.X_OK)


def test_the_command_of_a_row_is_that_of_its_script() -> None:
    deployment = made()
    command = shlex.split(deployment.config.command("python3"))
    assert command[3:] == deployment.config.argv(placed=True)
