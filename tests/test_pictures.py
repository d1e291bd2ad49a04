"""The pictures hold the answer's data, say what they show, and need no network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from tests.test_limits import experiment
from varcas.limits import roofline_report
from varcas.limits_answer import MeasuredPoint, Roofline
from varcas.pictures import PARTS, draw, pictures


def measured(simulated: bool) -> MeasuredPoint:
    return MeasuredPoint(
        study="t", number=3, kind="decode", batch=7.5, context=400, prefill_tokens=0, intensity=20, flops_per_s=2e12,
        efficiency=0.3, kernel="awq", engine_version="0.32.0", simulated=simulated,
    )  # fmt: skip


@pytest.fixture(scope="module")
def answer() -> Roofline:
    space = {"max_num_seqs": {"choices": [1, 8, 40]}, "kv_cache_dtype": {"choices": ["auto", "fp8"]}}
    found = roofline_report(experiment(space=space), engine_version="0.32.0")
    gpu = found.gpus[0].model_copy(update={"measurements": [measured(False), measured(True)]})
    return found.model_copy(update={"gpus": [gpu]})


@pytest.fixture(scope="module")
def specs(answer: Roofline) -> dict[str, dict[str, Any]]:
    return {name: chart.to_dict() for name, chart in pictures(answer, answer.gpus[0]).items()}


def data(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row of every layer, once."""
    rows = []
    for layer in [spec, *spec.get("layer", [])]:
        rows += layer.get("data", {}).get("values", [])
    rows += [row for values in spec.get("datasets", {}).values() for row in values]
    return rows


def test_the_roofline_holds_every_point(answer: Roofline, specs: dict[str, Any]) -> None:
    gpu, rows = answer.gpus[0], data(specs["roofline"])
    drawn = {round(row["intensity"], 6) for row in rows if "batch" in row}
    assert drawn == {round(p.intensity, 6) for p in (*gpu.decode, *gpu.prefill, *gpu.prefill_unfused)}
    assert all(row["flops_per_s"] <= gpu.peak_flops * (1 + 1e-9) for row in rows if "batch" in row)
    text = json.dumps(specs["roofline"])
    for words in ("compute: 65 TFLOP/s fp16", "memory: 320 GB/s", "ridge: 203 FLOP/byte"):
        assert words in text, words


def test_the_roofline_tells_measured_from_simulated(specs: dict[str, Any]) -> None:
    rows = [row for row in data(specs["roofline"]) if "efficiency" in row]
    assert {row["series"] for row in rows} == {"measured", "measured (SIMULATED)"}
    assert "1 of them SIMULATED" in json.dumps(specs["roofline"]["title"])


def test_memory_bars_add_up_to_the_gpu(answer: Roofline, specs: dict[str, Any]) -> None:
    gpu, rows = answer.gpus[0], data(specs["memory"])
    for of in gpu.memory_of:
        bar = {row["part"]: row for row in rows if row["label"] == of.label}
        assert list(bar) == list(PARTS)
        assert bar["not asked for"]["end"] == pytest.approx(gpu.memory.total / 2**30, abs=1e-6)
    words = [row["words"] for row in rows]
    assert f"KV cache {gpu.memory.kv_cache / 2**30:.2f}: {gpu.memory.kv_tokens:,} tokens" in words
    assert "refused: cache_type_without_units" in words


def test_the_region_holds_every_cell_and_frames_the_baseline(answer: Roofline, specs: dict[str, Any]) -> None:
    gpu, rows = answer.gpus[0], data(specs["region"])
    drawn = {(row["max_num_seqs"], row["max_model_len"], row["verdict"]) for row in rows}
    assert drawn == {(cell.max_num_seqs, cell.max_model_len, cell.verdict) for cell in gpu.region}
    assert (gpu.memory.flags["max_num_seqs"], gpu.memory.flags["max_model_len"]) in {row[:2] for row in drawn}
    assert all(row["words"] for row in rows), "every cell says what it means without its grey"


def test_titles_say_model_gpu_and_what_is_what(specs: dict[str, Any]) -> None:
    for spec in specs.values():
        title = spec["title"]
        assert "TheBloke/Llama-2-7B-AWQ on T4" in title["text"]
        assert re.search("bound|estimate", " ".join(title["subtitle"]).lower())


def test_black_and_white(specs: dict[str, Any]) -> None:
    """No colour but greys."""
    for name, spec in specs.items():
        colours = set(re.findall(r"#[0-9a-fA-F]{6}", json.dumps(spec)))
        assert all(len({c[1:3], c[3:5], c[5:7]}) == 1 for c in colours), (name, colours)


def test_files_of_each_kind_without_the_network(answer: Roofline, tmp_path: Path) -> None:
    files = draw(answer, tmp_path / "new" / "plots")
    assert [path.name for path in files] == [
        f"{name}-T4.{kind}" for name in ("roofline", "memory", "region") for kind in ("svg", "png", "html")
    ]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in files[0].read_text()[:200]
    html = files[2].read_text()
    assert not re.findall(r"<script[^>]*src=", html), "nothing is fetched"
    assert "decode, " in html
