"""docs/workloads.md: its table is what is drawn, and its examples are what is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest

from varcas.experiment import ARRIVAL_SETTINGS, Workload
from varcas.workload.arrivals import ARRIVALS
from varcas.workload.data import open_data
from varcas.workload.profiles import PROFILES
from varcas.workload.schedule import check_workload, schedule

PAGE = Path(__file__).parents[2] / "docs" / "workloads.md"
FORMATS = re.findall(r"^### (.+?)\n.*?```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def spread(values: Sequence[int]) -> str:
    ordered = sorted(values)
    return f"{fmean(ordered):,.0f} / {ordered[len(ordered) // 2]:,} / {ordered[len(ordered) * 9 // 10]:,}"


def row(name: str) -> str:
    """A line of the page's table, from 20,000 conversations."""
    profile = PROFILES[name]
    asked = schedule(
        Workload(profile=name, rate_rps=100, seed=0), start_s=0, duration_s=200, max_len=None, stream="measure"
    )
    num = len({request.conversation for request in asked})
    prompts = spread([request.prompt_tokens for request in asked])
    outputs = spread([request.output_tokens for request in asked])
    shared = f"{profile.prefixes} × {profile.prefix_tokens:,}" if profile.prefix_tokens else "–"
    turns = f"{len(asked) / num:.2f}" if profile.turns > 1 else "1"
    return f"| `{name}` | {turns} | {prompts} | {outputs} | {shared} | {profile.max_tokens:,} |"


@pytest.mark.parametrize("name", PROFILES)
def test_the_table_has_what_is_drawn(name: str) -> None:
    assert row(name) in PAGE.read_text().splitlines()


@pytest.mark.parametrize("name", PROFILES)
def test_the_page_has_every_source(name: str) -> None:
    assert f"- `{name}`: {PROFILES[name].source}" in PAGE.read_text().replace("\n  ", " ")


def test_the_page_has_every_arrival_and_setting() -> None:
    text = PAGE.read_text()
    assert [kind for kind in [*ARRIVALS, "trace", "closed", *ARRIVAL_SETTINGS] if f"`{kind}`" not in text] == []


@pytest.mark.parametrize(("title", "language", "example"), FORMATS, ids=[title for title, _, _ in FORMATS])
def test_every_example_of_a_format_is_read(title: str, language: str, example: str, tmp_path: Path) -> None:
    path = tmp_path / f"example.{language}"
    path.write_text(example)
    data = open_data(str(path))
    assert len(data) >= 2
    check_workload(Workload(data=str(path), rate_rps=1), {"max_model_len": 16384})
    assert schedule(Workload(data=str(path), rate_rps=5), start_s=0, duration_s=5, max_len=16384, stream="measure")


def test_there_are_examples_of_all_formats() -> None:
    assert len(FORMATS) == 5
