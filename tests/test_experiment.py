from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from varcas.errors import InputError
from varcas.experiment import Arrival, Choices, Experiment, Range, load_experiment, parse_experiment

GOOD = """\
name: t
model: some/model
workload: {profile: chat-short, rate_rps: 2}
"""
WORKLOAD = "name: t\nmodel: some/model\nworkload:\n  rate_rps: 2\n"
EXPERIMENTS = sorted(Path("experiments").glob("*.yaml"))


def error(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_experiment(text, "x.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_in_the_repository_is_well_formed(path: Path) -> None:
    experiment = load_experiment(path)
    jsonschema.validate(yaml.safe_load(path.read_text()), Experiment.model_json_schema())
    again = Experiment.model_validate_json(experiment.model_dump_json())
    assert again.model_dump() == experiment.model_dump()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "hardwre: {}\n", ["x.yaml:4", "hardwre", "Did you mean hardware?", "Known here"]),
        (GOOD + "hardware:\n  gpu: T4\n  cont: 2\n", ["x.yaml:6", "hardware.cont", "count"]),
        (GOOD + "study: {trials: many}\n", ["x.yaml:4", "study.trials", '"many"', "integer"]),
        (GOOD + "study: {trials: 0}\n", ["x.yaml:4", "study.trials", "0", "must be at least 1"]),
        ("name: t\nmodel: m\nworkload: {profile: chat-short}\n", ["x.yaml:3", "workload.rate_rps", "missing"]),
        (GOOD + "name: again\n", ["x.yaml:4", "name", "twice"]),
        ("a: [1\n", ["x.yaml:", "not valid YAML"]),
        ("- 1\n", ["x.yaml:1", "mapping"]),
        (GOOD + "space:\n  max_num_seqs: [1, 2]\n", ["x.yaml:5", "max_num_seqs", "{choices: [1, 2]}"]),
        (GOOD + "space:\n  a: {choices: [1]}\n  max_num_seqs: {choises: [1]}\n", ["x.yaml:6", "choises", "choices"]),
        (GOOD + "space:\n  max_num_seqs: {choices: []}\n", ["x.yaml:5", "max_num_seqs", "must not be empty"]),
        (GOOD + "space:\n  max_num_seqs: {choices: [8, 8]}\n", ["x.yaml:5", "8", "twice"]),
        (GOOD + "space:\n  max_num_seqs: {low: 8, high: 2}\n", ["x.yaml:5", "low 8 is above high 2"]),
        (GOOD + "serve:\n  max-num-seqs: 8\n", ["x.yaml:5", "max-num-seqs", "max_num_seqs"]),
        (GOOD + "serve:\n  port: 8000\n", ["x.yaml:5", "port", "free port"]),
        (GOOD + "serve: {a: 1}\nspace: {a: {choices: [1, 2]}}\n", ["a", "`serve`", "`space`"]),
        (GOOD + "slo: {ttft_p95: 500}\n", ["x.yaml:4", "ttft_p95", "ttft_p95_ms"]),
        (GOOD + "slo: {ttft_p95_ms: -1}\n", ["x.yaml:4", "ttft_p95_ms", "above 0"]),
        (GOOD + "objective: {maximize: throughput}\n", ["x.yaml:4", "throughput", "output_tokens_per_s"]),
        (GOOD + "objective: {maximise: e2e_p50_ms}\n", ["x.yaml:4", "maximise", "maximize"]),
        (GOOD + "objective: {maximize: ttft_p95_ms}\n", ["x.yaml:4", "ttft_p95_ms", "minimize"]),
        (GOOD + "objective: {maximize: goodput_rps}\n", ["goodput_rps", "slo"]),
        (GOOD + "server: {env: {HF_TOKEN: abc}}\n", ["x.yaml:4", "HF_TOKEN", "environment"]),
        (WORKLOAD + "  arrival: posson\n", ["x.yaml:5: workload.arrival: ", '"posson"', "'poisson'", "'closed'"]),
        (WORKLOAD + "  arrival: 3\n", ["x.yaml:5: workload.arrival: 3: "]),
        (WORKLOAD + "  arrival:\n    kind: gama\n", ["x.yaml:6: workload.arrival.kind: ", '"gama"', "'gamma'"]),
        (
            WORKLOAD + "  arrival:\n    kind: gamma\n    burstines: 2\n",
            ["x.yaml:7: workload.arrival.burstines: unknown key. Did you mean burstiness?", "Known here: kind, "],
        ),
        (WORKLOAD + "  arrival: {kind: gamma}\n", ["x.yaml:5: workload.arrival: gamma needs `burstiness`"]),
        (
            WORKLOAD + "  arrival:\n    kind: poisson\n    users: 4\n",
            ["x.yaml:7: workload.arrival.users: is a setting of `closed`, not of `poisson`"],
        ),
        (WORKLOAD + "  arrival: {kind: closed, users: 3}\n", ["x.yaml:4: workload.rate_rps: `closed` sets the rate"]),
        (WORKLOAD + "  arrival: trace\n", ["x.yaml:5: workload.arrival: `trace` needs `data`"]),
        (
            WORKLOAD + "  arrival:\n    kind: steps\n    steps: [[1, 2]]\n",
            ["x.yaml:7: workload.arrival.steps: begin at second 0"],
        ),
        (WORKLOAD + "  arrival: {kind: ramp, to_rps: fast}\n", ["x.yaml:5: workload.arrival.to_rps: ", '"fast"']),
        (WORKLOAD + "  profile: {rag: 0}\n", ["x.yaml:5: workload.profile: shares must be above 0"]),
        (WORKLOAD + "  data: x.csv\n  turns: 2.0\n", ["x.yaml:6: workload.turns: the conversations in `data`"]),
        (WORKLOAD + "  data: x.csv\n  shared_prefixes: 2\n", ["x.yaml:6: workload.shared_prefixes: say how long"]),
        (GOOD + "objective: [{maximise: e2e_p50_ms}]\n", ["x.yaml:4", "maximise", "Did you mean maximize"]),
        (GOOD + "serve: {a: 2026-01-01}\n", ["quote the value"]),
        (GOOD.replace("name: t", "name: a/b"), ["x.yaml:1", "name", "letters, digits"]),
        (GOOD + "hardware: H100\n", ["x.yaml:4", "hardware", '"H100"', "must be a mapping"]),
        (GOOD + "space:\n  a: {low: x, high: 3}\n", ["x.yaml:5", "space.a.low", '"x"', "must be a number"]),
        (GOOD + "server: {env: {X: true}}\n", ["x.yaml:4", "server.env.X", "true", 'e.g. "1"']),
        (GOOD + "objective: {maximize: tokens_per_second}\n", ["Did you mean output_tokens_per_s?"]),
    ],
)
def test_bad_input_says_where_what_and_what_instead(text: str, words: list[str]) -> None:
    message = error(text)
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1, f"one error, one line: {message}"


@pytest.mark.parametrize(
    ("text", "arrival", "described", "mean_rps"),
    [
        ("", Arrival(kind="poisson"), "chat-medium at 2 requests/s", 2),
        ("  arrival: constant\n", Arrival(kind="constant"), "chat-medium at 2 requests/s (constant)", 2),
        (
            "  arrival: {kind: gamma, burstiness: 0.5}\n",
            Arrival(kind="gamma", burstiness=0.5),
            "chat-medium at 2 requests/s (gamma)",
            2,
        ),
        (
            "  arrival: {kind: ramp, to_rps: 6}\n",
            Arrival(kind="ramp", to_rps=6),
            "chat-medium at 4 requests/s (ramp)",
            4,
        ),
        ("  data: a/b.csv\n  arrival: trace\n", Arrival(kind="trace"), "b.csv at 2 requests/s", 2),
        ("  profile: {rag: 1, code: 2}\n", Arrival(kind="poisson"), "rag + code at 2 requests/s", 2),
    ],
)
def test_an_arrival_is_a_name_or_has_settings(text: str, arrival: Arrival, described: str, mean_rps: float) -> None:
    workload = parse_experiment(WORKLOAD + text).workload
    assert (workload.arrives, workload.described, workload.mean_rps) == (arrival, described, mean_rps)


def test_steps_and_a_closed_loop_set_the_rate_themselves() -> None:
    head = WORKLOAD.replace("  rate_rps: 2\n", "")
    steps = parse_experiment(head + "  duration_s: 40\n  arrival: {kind: steps, steps: [[0, 5], [10, 1]]}\n").workload
    assert steps.mean_rps == (10 * 5 + 30 * 1) / 40
    closed = parse_experiment(head + "  arrival: {kind: closed, users: 8}\n").workload
    assert (closed.mean_rps, closed.described) == (None, "chat-medium, 8 users in a closed loop")
    assert parse_experiment(head + "  arrival: trace\n  data: x\n").workload.mean_rps is None


def test_a_secret_is_not_repeated_in_the_error() -> None:
    assert "s3cr3t" not in error(GOOD + "server: {env: {MY_API_KEY: s3cr3t}}\n")


def test_every_error_of_a_file_is_shown_at_once() -> None:
    message = error(GOOD + "hardwre: {}\nstudy: {trials: x}\n")
    assert len(message.splitlines()) == 2


def test_numbers_in_the_environment_are_taken_as_text() -> None:
    assert parse_experiment(GOOD + "server: {env: {X: 1, Y: 0.5, Z: a}}\n").server.env == {
        "X": "1",
        "Y": "0.5",
        "Z": "a",
    }


def test_a_message_about_a_key_gets_its_place() -> None:
    experiment = parse_experiment(GOOD + "space:\n  a: {choices: [1]}\n", "x.yaml")
    assert experiment.located("space.a.when: 'b': no") == "x.yaml:5: space.a.when: 'b': no"
    assert experiment.located("workload.profile: 'b': no") == "x.yaml:3: workload.profile: 'b': no"
    assert experiment.located("x.yaml:5: space.a: no") == "x.yaml:5: space.a: no"
    assert experiment.located("--budget: no") == "--budget: no"


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        load_experiment("nowhere.yaml")


def test_objectives_are_one_or_several() -> None:
    one = parse_experiment(GOOD + "objective: {minimize: ttft_p95_ms}\n")
    assert [(o.metric, o.direction) for o in one.objectives] == [("ttft_p95_ms", "minimize")]
    two = parse_experiment(GOOD + "objective: [{maximize: output_tokens_per_s}, {minimize: ttft_p95_ms}]\n")
    assert [o.metric for o in two.objectives] == ["output_tokens_per_s", "ttft_p95_ms"]


def test_space_entries_are_told_apart() -> None:
    text = GOOD + "space:\n  a: {choices: [1, null, {method: ngram}]}\n  b: {low: 0.5, high: 0.9}\n"
    space = parse_experiment(text).space
    assert isinstance(space["a"], Choices)
    assert isinstance(space["b"], Range)


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=5) | st.none(), max_size=4))
def test_any_mapping_is_accepted_or_refused_in_words(data: dict[str, object]) -> None:
    try:
        parse_experiment(json.dumps(data), "x.yaml")
        message = "x.yaml:"
    except InputError as caught:
        message = str(caught)
    assert message.startswith("x.yaml:")
