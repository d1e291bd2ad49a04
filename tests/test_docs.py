"""README and docs: links lead somewhere, YAML is an experiment, commands parse, Python names what there is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from varcas.cli import app
from varcas.engine.failures import FAILURES
from varcas.experiment import parse_experiment
from varcas.export import FORMS
from varcas.gpus import parse_catalogue
from varcas.journey import opening
from varcas.rules import RULES
from varcas.space import Space
from varcas.study import SAMPLERS
from varcas.workload.profiles import PROFILES

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{page.name}:{page.read_text()[: found.start()].count(chr(10)) + 1}", found[2])
        for page in PAGES
        for found in BLOCK.finditer(page.read_text())
        if found[1] == language
    ]


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for place, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while (
                words
                and (start := next((i for i, w in enumerate(words) if w.split("/")[-1] == "varcas"), None)) is not None
            ):
                words = words[start + 1 :]
                end = next((i for i, w in enumerate(words) if w in (">", "|", "&&")), len(words))
                found.append((f"{place}: {line}", words[:end]))
                words = words[end:]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize(("place", "text"), blocks("yaml"), ids=lambda value: value[:24])
def test_yaml_is_an_experiment_or_a_cluster(place: str, text: str) -> None:
    if "apiVersion" in yaml.safe_load(text):
        job = yaml.safe_load(text)
        words = shlex.split(job["spec"]["entrypoint"])
        assert words[:3] == ["python3", "-m", "varcas"]
        check_command(words[3:])
        pods = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
        for pod in pods:
            spec = pod["template"]["spec"]
            mounted = {m["name"] for c in spec["containers"] for m in c["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in spec["volumes"]}
        return
    assert Space(opening(parse_experiment(text, place))).size()


@pytest.mark.parametrize(("place", "text"), blocks("toml"), ids=lambda value: value[:24])
def test_toml_is_a_table_of_the_gpu_catalogue(place: str, text: str) -> None:
    assert parse_catalogue(text, place)


@pytest.mark.parametrize(("line", "words"), commands(), ids=lambda value: str(value)[:60])
def test_commands_are_what_the_command_line_takes(line: str, words: list[str]) -> None:
    check_command(words)
    for word in words:
        if word.startswith("experiments/"):
            assert (ROOT / word).is_file()


def check_command(words: list[str]) -> None:
    root: Any = typer.main.get_command(app)
    command = root.commands[words[0]]
    command.make_context(words[0], list(words[1:]))


def test_there_are_commands_and_snippets_to_check() -> None:
    assert len(commands()) >= 10
    assert blocks("yaml")
    assert blocks("python")


@pytest.mark.parametrize(("place", "text"), blocks("python"), ids=lambda value: value[:24])
def test_python_compiles_and_names_what_there_is(place: str, text: str) -> None:
    compile(text, place, "exec")
    names = re.findall(r"varcas\.(\w+)", text)
    done = subprocess.run(
        [sys.executable, "-c", f"import varcas; [getattr(varcas, n) for n in {names!r}]"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_make_targets_in_the_readme_exist() -> None:
    targets = re.findall(r"`?make (\w+)`?", (ROOT / "README.md").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert {"quickstart", "test"} <= set(targets)
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/failures.md", [failure.kind for failure in FAILURES]),
        ("docs/rules.md", [rule.name for rule in RULES]),
        ("docs/deploy.md", list(FORMS)),
        ("docs/index.md", [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"]),
        ("zensical.toml", [page.name for page in (ROOT / "docs").glob("*.md")]),
        ("CONTRIBUTING.md", ["FAILURES", "SAMPLERS", "PROFILES", "CANDIDATES", "FORMS", "SECTIONS", "CHARTS"]),
        ("docs/experiment.md", [*PROFILES, *SAMPLERS]),
    ],
)
def test_every_entry_is_documented(page: str, names: list[str]) -> None:
    text = (ROOT / page).read_text()
    assert [name for name in names if name not in text] == []


def test_public_functions_of_the_package_are_documented() -> None:
    import varcas

    for name in varcas.__all__:
        if name != "__version__":
            assert (getattr(varcas, name).__doc__ or "").strip(), name
