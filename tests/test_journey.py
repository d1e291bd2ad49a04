"""Phases: each starts from the winner so far, says what it found, and judges what was said before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.sweep_work import EasyNode, outcome
from varcas.errors import InputError
from varcas.experiment import Experiment, load_experiment, parse_experiment
from varcas.inprocess import InProcessPool
from varcas.journey import Base, Journey, journey_text, opening, run_phases, study_of
from varcas.records import Outcome
from varcas.store import Store
from varcas.trial import TrialTask

TWO = """\
name: two
model: some/model
hardware: {{gpu: cpu}}
serve: {{max_num_seqs: 2}}
workload: {{profile: chat-short, rate_rps: 2, duration_s: 2}}
study: {{trials: 6, repeats: 3}}
results: {results}
phases:
  - name: size
    space: {{max_num_seqs: {{choices: [2, 4, 8]}}}}
    claims:
      - {{said: "16 does not start", flags: {{max_num_seqs: 16}}}}
      - said: "4 is slower"
        flags: {{max_num_seqs: 4}}
        helps: false
        figures: {{output_tokens_per_s: 7}}
        note: why
  - name: kind
    why: another flag
    space: {{dtype: {{choices: [half, float]}}}}
    serve: {{seed: 1}}
  - name: elsewhere
    hardware: {{gpu: nowhere}}
    keep: false
    space: {{max_num_seqs: {{choices: [8, 4]}}}}
"""
NOISE = [0, 1, -1, 0, 2, -2, 1, 0]


class Speeds:
    """Measurements made up on purpose: throughput by configuration, a little different each time."""

    def __init__(self) -> None:
        self.starts = 0

    def __call__(self, task: TrialTask, cancelled: object) -> Outcome:
        self.starts += 1
        flags: dict[str, Any] = dict(task.config.flags)
        if flags["max_num_seqs"] == 16:
            return outcome(
                1, state="failed", load=None, failure_kind="out_of_memory", failure_detail="CUDA out of memory"
            )
        factor = 0.5 if flags.get("dtype") == "float" else 1.0
        return outcome(int(factor * (2000 + 1000 * flags["max_num_seqs"])) + 10 * NOISE[self.starts % len(NOISE)])


class Node(EasyNode):
    def flag_names(self) -> list[str]:
        return ["max_num_seqs", "dtype", "seed"]


def pool(hardware: Any) -> InProcessPool:
    if hardware.gpu == "nowhere":
        raise InputError("hardware.gpu: 'nowhere': not here: Ray sees no GPU.")
    return InProcessPool(hardware)


def two(results: Path) -> Experiment:
    return parse_experiment(TWO.format(results=results), "two.yaml")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    return run_phases(two(tmp_path_factory.mktemp("phases")), run=Speeds(), node=Node, pool=pool)


def test_the_winner_of_a_phase_is_the_base_of_the_next(found: Journey) -> None:
    size, kind, _ = found.stages
    assert (size.base, size.changes, size.kept) == ({"max_num_seqs": 2}, {"max_num_seqs": 8}, True)
    assert size.verdict == "better"
    assert size.gain is not None
    assert size.gain.ratio == pytest.approx(2.5, rel=0.02)
    assert kind.base == {"max_num_seqs": 8, "seed": 1}
    assert not kind.kept
    assert found.deploy == {"max_num_seqs": 8}
    assert (found.last_value or 0) / (found.first_value or 1) == pytest.approx(2.5, rel=0.02)


def test_each_configuration_has_its_verdict(found: Journey) -> None:
    said = {tuple(one.flags.items()): one for one in found.stages[0].found}
    assert said["max_num_seqs", 8].effect == "helps" if ("max_num_seqs", 8) in said else True
    effects = {one.flags.get("max_num_seqs"): one.effect for one in found.stages[0].found}
    assert effects == {4: "helps", 8: "helps", 16: "fails"}
    failed = next(one for one in found.stages[0].found if one.effect == "fails")
    assert "out_of_memory: CUDA out of memory" in (failed.cause or "")
    assert failed.hint
    kinds = {one.flags.get("dtype"): one.effect for one in found.stages[1].found}
    assert kinds == {"float": "hurts", "half": "no difference"}


def test_claims_are_tried_and_judged(found: Journey) -> None:
    refused, slower = found.stages[0].claims
    assert refused.agrees
    assert refused.found.effect == "fails"
    assert not slower.agrees
    assert slower.found.figures["output_tokens_per_s"] == pytest.approx(6000 * 20 / 10 / 2, rel=0.5)


def test_hardware_that_is_not_here_is_passed_over(found: Journey) -> None:
    last = found.stages[2]
    assert (last.verdict, last.kept, last.found) == ("not run", False, [])
    assert "not here" in last.headline


def test_the_text_says_what_each_step_brought(found: Journey) -> None:
    text = journey_text(found)
    assert text.startswith("# two: 3 phases\n")
    for words in (
        "| size | ",
        "max_num_seqs=8",
        "2.50x",
        '"4 is slower": differs',
        "said and found",
        "  why",
        "Deploy:",
    ):
        assert words in text
    assert "SIMULATED" not in text


def test_a_journey_resumes_without_a_start(tmp_path: Path) -> None:
    made, speeds = two(tmp_path), Speeds()
    first = run_phases(made, run=speeds, node=Node, pool=pool)
    starts = speeds.starts
    again = run_phases(made, run=speeds, node=Node, pool=pool)
    assert speeds.starts == starts
    assert again == first
    assert set(Store(made.results, readonly=True).study_names()) == {"two.size", "two.kind"}


def test_a_phase_is_an_experiment_of_its_own(tmp_path: Path) -> None:
    made = two(tmp_path)
    study = study_of(made, made.phases[0], Base.first(made))
    assert (study.name, study.serve, study.baseline) == ("two.size", {}, {"max_num_seqs": 2})
    assert study.study.enqueue == [{"max_num_seqs": 16}, {"max_num_seqs": 4}]
    assert opening(made) == study
    assert opening(study) is study


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("space: {max_num_seqs: {choices: [1]}}\n", "stand in place of `space`"),
        ("", "'a' stands twice"),
    ],
)
def test_phases_and_a_space_do_not_go_together(wrong: str, words: str) -> None:
    one = "{name: a, space: {max_num_seqs: {choices: [1]}}}"
    other = one.replace("a,", "b,") if wrong else one
    text = f"name: t\nmodel: m\nworkload: {{rate_rps: 2}}\n{wrong}phases: [{one}, {other}]\n"
    with pytest.raises(InputError, match=words):
        parse_experiment(text)


def test_a_phase_without_anything_to_search_is_refused() -> None:
    with pytest.raises(InputError, match="a phase needs flags to search"):
        parse_experiment("name: t\nmodel: m\nworkload: {rate_rps: 2}\nphases: [{name: a}]\n")


def test_the_journey_of_the_seed(tmp_path: Path) -> None:
    """Simulated, every row of the seed has a verdict with a cause, and nothing simulated looks measured."""
    made = load_experiment("experiments/t4_journey.yaml")
    study = made.study.model_copy(update={"repeats": 3})
    workload = made.workload.model_copy(update={"duration_s": 25.0, "max_drain_s": 5.0})
    changes = {"engine": "simulated", "results": str(tmp_path), "study": study, "workload": workload}
    found = run_phases(made.model_copy(update=changes))
    assert found.simulated
    assert len(found.stages) == 7
    judged = {claim.said.partition(":")[0]: claim for stage in found.stages for claim in stage.claims}
    assert judged["FP8 KV Cache"].found.effect == "fails"
    assert judged["FP8 KV Cache"].agrees
    assert judged["Prefix Caching"].found.effect == "no difference"
    assert judged["Chunked Prefill"].found.effect == "no difference"
    assert judged["N-Gram"].found.effect == "not real"
    assert judged["Use non-quantized target model"].found.effect == "fails"
    assert "kv_cache_too_small" in (judged["Use non-quantized target model"].found.cause or "")
    assert all(claim.note for claim in judged.values() if "16" not in claim.said)
    text = journey_text(found)
    assert text.startswith("# t4-journey: 7 phases (SIMULATED)")
    assert "Deploy (SIMULATED: no server was measured):" in text
