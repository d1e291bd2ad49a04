from __future__ import annotations

import itertools
import json
import pickle
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from varcas.errors import InputError
from varcas.experiment import Experiment, parse_experiment
from varcas.space import Label, ServingConfig, Space, check_flags, distance

NESTED = "[null, {method: ngram, num_speculative_tokens: {choices: [3, 5]}, prompt_lookup_max: 4}]"


def experiment(space: str, *, serve: str = "{dtype: half}", **keys: str) -> Experiment:
    extra = "\n".join(f"{key}: {text}" for key, text in keys.items())
    return parse_experiment(
        f"name: t\nmodel: org/model\nserve: {serve}\nspace: {space}\nworkload: {{rate_rps: 1}}\n{extra}\n"
    )


def space(text: str, **keys: str) -> Space:
    return Space(experiment(text, **keys))


class Drawn:
    """A `Suggest` on a seeded generator, which notes what it was asked."""

    def __init__(self, seed: int = 0) -> None:
        self.rng, self.asked = random.Random(seed), dict[str, Any]()

    def categorical(self, name: str, labels: Sequence[Label]) -> Label:
        self.asked[name] = list(labels)
        return self.rng.choice(labels)

    def integer(self, name: str, low: int, high: int, step: int, log: bool) -> int:
        self.asked[name] = (low, high, step, log)
        return self.rng.randrange(low, high + 1, step)

    def number(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        self.asked[name] = (low, high, step, log)
        return self.rng.uniform(low, high)


def config(**flags: Any) -> ServingConfig:
    return ServingConfig("org/model", None, flags)


# ServingConfig


def test_argv_says_each_kind_of_value_as_vllm_reads_it() -> None:
    made = ServingConfig(
        "m",
        "abc",
        {
            "max_num_seqs": 8,
            "gpu_memory_utilization": 0.9,
            "enable_prefix_caching": True,
            "enforce_eager": False,
            "quantization": None,
            "middleware": ["a", "b"],
            "speculative_config": {"num_speculative_tokens": 3, "method": "ngram"},
            "kv_cache_dtype": "fp8",
            "swap": -1,
        },
    )
    assert made.argv() == [
        *("--model", "m", "--revision", "abc"),
        "--enable-prefix-caching",
        "--no-enforce-eager",
        *("--gpu-memory-utilization", "0.9"),
        *("--kv-cache-dtype", "fp8"),
        *("--max-num-seqs", "8"),
        *("--middleware", "a", "b"),
        *("--speculative-config", '{"method":"ngram","num_speculative_tokens":3}'),
        "--swap=-1",
    ]


def test_a_model_without_revision_and_flags_is_all_there_is() -> None:
    assert ServingConfig("m", None, {}).argv() == ["--model", "m"]


def test_a_flag_that_is_null_is_as_if_it_had_not_been_named() -> None:
    assert config(a=1, b=None) == config(a=1)
    assert config(a=1, b=None).hash == config(a=1).hash


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0, False), ("1", 1), ({"a": 1}, {"a": True})])
def test_hash_keeps_apart_what_python_holds_for_equal(one: Any, other: Any) -> None:
    assert config(x=one).hash != config(x=other).hash


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(0.01, 99) | st.text("abAB -'\"$\\\n", max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
flag_values = st.dictionaries(st.from_regex(r"\A[a-z][a-z0-9_]{0,8}\Z"), json_values, max_size=5)


@given(flag_values, st.randoms())
def test_hash_depends_on_content_alone(flags: dict[str, Any], rng: random.Random) -> None:
    names = list(flags)
    rng.shuffle(names)
    shuffled = {name: flags[name] for name in names}
    assert config(**flags).hash == config(**json.loads(json.dumps(shuffled))).hash
    assert config(**flags).hash != config(**{**flags, "another": 1}).hash


def test_survives_the_way_to_a_ray_worker() -> None:
    made = config(a=1, b={"c": [1, 2]})
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize(
    ("flags", "gpus"),
    [({}, 1), ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 3}, 12)],
)
def test_num_gpus_is_the_product_of_the_parallel_sizes(flags: dict[str, Any], gpus: int) -> None:
    assert config(**flags).num_gpus == gpus


def test_a_parallel_size_that_is_no_number_is_refused_not_read_as_1() -> None:
    with pytest.raises(InputError, match='tensor_parallel_size: "two"'):
        _ = config(tensor_parallel_size="two").num_gpus


def test_command_can_be_pasted_into_a_shell() -> None:
    made = config(speculative_config={"method": "it's"})
    assert shlex.split(made.command("/opt/my python"))[3:] == made.argv()


def test_command_works_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    command = ServingConfig("model", None, {"max_num_seqs": 8}).command("/opt/python", {"B": "1", "A": "x y"})
    words = ["A=x y", "B=1", "/opt/python", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert shlex.split(command) == [*words, str(tmp_path / "model"), "--max-num-seqs", "8"]
    assert command.startswith("A='x y' B=1 /opt/python")


# the start script


@pytest.fixture
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program that prints its arguments and its environment as JSON."""
    path = tmp_path_factory.mktemp("bin") / "fake python"
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$@\"\n")
    path.chmod(0o755)
    return str(path)


def run_script(script: str, tmp_path: Path, *words: str, **env: str) -> tuple[list[str], dict[str, str]]:
    path = tmp_path / "start.sh"
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)
    done = subprocess.run(
        ["bash", str(path), *words], check=True, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **env}
    )
    argv, environment = json.loads(done.stdout)
    return argv, environment


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flags=flag_values)
def test_script_starts_the_server_with_exactly_the_configurations_arguments(
    flags: dict[str, Any], tmp_path: Path, fake_python: str
) -> None:
    made = ServingConfig("models/it's a model", "r1", flags)
    argv, _ = run_script(made.start_script(python=fake_python), tmp_path)
    assert argv[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert argv[2:] == [*made.argv(), "--host", "127.0.0.1", "--port", "8000"]


def test_script_takes_host_port_python_and_key_from_the_environment(tmp_path: Path, fake_python: str) -> None:
    script = config(max_num_seqs=8).start_script(python="/nowhere", comments=["line $HOME\nsecond"], env={"A_B": "x y"})
    argv, env = run_script(
        script, tmp_path, "--extra", SERVE_HOST="0.0.0.0", SERVE_PORT="9", PYTHON=fake_python, VLLM_API_KEY="sesame"
    )
    assert argv[-5:] == ["--host", "0.0.0.0", "--port", "9", "--extra"]
    assert "sesame" not in argv
    assert env["VLLM_API_KEY"] == "sesame"
    assert env["A_B"] == "x y"
    assert "# line $HOME\n# second\n" in script


# the space


def test_parameters_are_named_and_labelled_for_people() -> None:
    asked = Drawn()
    made = space(f"{{max_num_seqs: {{choices: [8, 64]}}, speculative_config: {{choices: {NESTED}}}}}")
    for _ in range(20):
        made.propose(asked)
    assert asked.asked == {
        "max_num_seqs": [8, 64],
        "speculative_config": ["none", "ngram"],
        "speculative_config.ngram.num_speculative_tokens": [3, 5],
    }


def test_a_nested_value_is_searched_only_while_its_choice_is_selected() -> None:
    made = space(f"{{speculative_config: {{choices: {NESTED}}}}}")
    points = list(made.points())
    assert points == [
        ({"speculative_config": "none"}, {"speculative_config": None}),
        *(
            (
                {"speculative_config": "ngram", "speculative_config.ngram.num_speculative_tokens": tokens},
                {"speculative_config": {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_max": 4}},
            )
            for tokens in (3, 5)
        ),
    ]
    assert made.size() == 3


def test_mixed_choices_stay_apart() -> None:
    made = space('{x: {choices: [1, true, "1", 1.0, null, [1, 2], {a: 1}]}}')
    asked = Drawn()
    made.propose(asked)
    assert asked.asked["x"] == ["1", "true", '"1"', "1.0", "null", "[1,2]", '{"a":1}']
    assert len({c.hash for c in made.configs()}) == made.size() == 7


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("{low: 1, high: 4}", [1, 2, 3, 4]),
        ("{low: 1, high: 8, step: 3}", [1, 4, 7]),
        ("{low: 2, high: 4, log: true}", [2, 3, 4]),
        ("{low: 0.8, high: 0.96, step: 0.05}", [0.8, 0.85, 0.9, 0.95]),
        ("{low: 0.5, high: 0.5}", [0.5]),
        ("{low: 7, high: 7}", [7]),
    ],
)
def test_a_range_lists_exactly_its_values(entry: str, values: list[float]) -> None:
    made = space(f"{{x: {entry}}}")
    assert [flags["x"] for _, flags in made.points()] == values
    assert made.size() == len(values)


def test_a_continuous_space_has_no_size_and_tidy_values() -> None:
    made = space("{x: {low: 0.8, high: 0.95}}")
    assert made.size() is None
    _, flags = made.propose(Drawn(3))
    assert len(str(flags["x"])) <= 8
    assert made.params_of({"dtype": "half", **flags}) == flags
    with pytest.raises(ValueError, match="continuous"):
        next(made.points())


def test_a_conditional_flag_is_left_out_where_its_condition_does_not_hold() -> None:
    made = space(
        "{a: {choices: [1, 2, 3]}, b: {choices: [x, y], when: {a: [1, 3]}}, c: {choices: [0, 5], when: {b: y}}}"
    )
    assert [made.config(flags).flags for _, flags in made.points()] == [
        {"a": a, **rest, "dtype": "half"}
        for a in (1, 2, 3)
        for rest in ([{}] if a == 2 else [{"b": "x"}, {"b": "y", "c": 0}, {"b": "y", "c": 5}])
    ]
    assert made.size() == 7


def test_a_condition_may_stand_before_the_flag_it_names_and_may_name_a_fixed_one() -> None:
    made = space(
        "{b: {choices: [x, y], when: {a: true}}, a: {choices: [true, false]}, "
        "c: {choices: [1, 2], when: {dtype: half}}}"
    )
    assert made.size() == (2 + 1) * 2


def test_a_condition_names_a_mapping_by_its_method() -> None:
    made = space(f"{{s: {{choices: {NESTED}}}, x: {{choices: [1, 2], when: {{s: ngram}}}}}}")
    assert made.size() == 1 + 2 * 2


def choices() -> st.SearchStrategy[dict[str, Any]]:
    scalars = st.lists(st.sampled_from([None, True, False, 1, 2, 1.0, "a", "none"]), min_size=1, max_size=3)
    distinct = scalars.map(lambda values: list({json.dumps(v): v for v in values}.values()))
    ranges = st.builds(lambda low, width, step: {"low": low, "high": low + width, "step": step},
                       st.integers(1, 5), st.integers(0, 4), st.integers(1, 3))  # fmt: skip
    nested = st.builds(
        lambda inner, plain: {"choices": [*plain, {"method": "m", "n": inner}]},
        ranges | st.builds(lambda c: {"choices": c}, distinct),
        distinct,
    )
    return ranges | nested | st.builds(lambda c: {"choices": c}, distinct)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    entries = draw(st.lists(choices(), min_size=1, max_size=4))
    named: dict[str, dict[str, Any]] = {f"flag{index}": entry for index, entry in enumerate(entries)}
    if len(named) > 1 and draw(st.booleans()) and "choices" in named["flag0"]:
        wanted = [c for c in named["flag0"]["choices"] if not isinstance(c, dict)]
        if wanted:
            named["flag1"]["when"] = {"flag0": [draw(st.sampled_from(wanted))]}
    return space(json.dumps(named))


@settings(deadline=None)
@given(spaces(), st.integers(0, 99))
def test_params_of_is_the_inverse_of_propose(made: Space, seed: int) -> None:
    params, flags = made.propose(Drawn(seed))
    config = made.config(flags)
    again = made.params_of(config.flags)
    assert again == params
    assert json.dumps(again) == json.dumps(params)
    stored = json.loads(json.dumps(dict(config.flags)))
    assert made.params_of(stored) == params
    assert made.config(made.over_serve(config)).hash == config.hash


@settings(deadline=None)
@given(spaces())
def test_a_finite_space_lists_each_configuration_once(made: Space) -> None:
    hashes = [config.hash for config in made.configs()]
    assert len(hashes) == len(set(hashes)) == made.size()
    drawn = {made.config(made.propose(Drawn(seed))[1]).hash for seed in range(20)}
    assert drawn <= set(hashes)


def test_a_huge_space_is_counted_and_begun_without_being_built() -> None:
    made = space("{a: {choices: [null, {n: {low: 1, high: 1000000000}}]}, b: {low: 1, high: 1000000000}}")
    assert made.size() == (10**9 + 1) * 10**9
    assert len(list(itertools.islice(made.configs(), 3))) == 3


@pytest.mark.parametrize(
    "flags",
    [
        {"dtype": "half", "x": 3},
        {"dtype": "half"},
        {"dtype": "float", "x": 1},
        {"dtype": "half", "x": 1, "y": 1},
        {"dtype": "half", "x": True},
    ],
)
def test_params_of_is_none_outside_of_the_space(flags: dict[str, Any]) -> None:
    made = space("{x: {choices: [1, 2]}}")
    assert made.params_of({"dtype": "half", "x": 1}) == {"x": 1}
    assert made.params_of(flags) is None


def test_a_flag_over_serve_may_be_left_out() -> None:
    made = space("{x: {choices: [1]}}", serve="{dtype: half, y: 2}")
    config = made.config({"y": None, "x": 1})
    assert config.flags == {"dtype": "half", "x": 1}
    assert made.over_serve(config) == {"x": 1, "y": None}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "space: is empty"),
        ("{b: {choices: [1], when: {max_num_seq: 1}}, max_num_seqs: {choices: [1, 2]}}", "Did you mean max_num_seqs"),
        (
            "{a: {choices: [1], when: {b: 1}}, b: {choices: [1], when: {a: 1}}}",
            "a and b hang on each other in a circle",
        ),
        ("{a: {choices: [1], when: {a: 1}}}", "circle"),
        ("{a: {choices: [1, 2]}, b: {choices: [1], when: {a: 3}}}", r"space.b.when.a: 3: never occurs. a has: 1, 2"),
        ("{a: {choices: [1, 2]}, b: {choices: [1], when: {a: true}}}", r"space.b.when.a: true: never occurs"),
        ("{b: {choices: [1], when: {dtype: bf16}}}", r'b.when.dtype: "bf16": never occurs. dtype has: "half"'),
        (
            "{a: {choices: [1, 2]}, b: {choices: [1, 2], when: {a: 1}}, c: {choices: [1], when: {a: 2, b: 1}}}",
            "space.c.when: .*never hold together",
        ),
        ("{a: {low: 0.0, high: 1.0}, b: {choices: [1], when: {a: 0.5}}}", "space.a: is continuous"),
        ("{a: {low: 1, high: 9999999}, b: {choices: [1], when: {a: 1}}}", "at most 1000000"),
        ("{a: {choices: [{m: {choices: [1, 1]}}]}}", r"space.a.choices.0.m.choices: .*1 stands twice"),
        ("{a: {choices: [{m: {low: 5, high: 3}}]}}", r"space.a.choices.0.m: .*low 5 is above high 3"),
        ("{a: {choices: [{m: {choices: [1], whn: 1}}]}}", r"space.a.choices.0.m.whn"),
        ("{a: {choices: [{m: {low: 5}}]}}", r"space.a.choices.0.m.high: .*required"),
        ("{a: {choices: [{m: {choices: [1], when: {b: 1}}}]}}", r"space.a.choices.0.m.when: is for flags"),
        ("{a: {choices: [[{choices: [1]}]]}}", r"space.a.choices.0: .*nothing is searched inside of a list"),
        ("{a: {choices: [{m: {choices: [1, 2]}}, {m: 2}]}}", "two choices lead to this value"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        space(text)


@pytest.mark.parametrize(
    ("entry", "said"),
    [("{port: 1}", "study.enqueue.1: port: varcas chooses"), ("{--max-num-seqs: 1}", "write max_num_seqs")],
)
def test_enqueued_flags_are_checked(entry: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        space("{x: {choices: [1]}}", study=f"{{enqueue: [{{x: 2}}, {entry}]}}")


def test_a_list_of_configurations_needs_no_space() -> None:
    made = space("{}", study="{enqueue: [{x: 2}]}")
    assert made.size() == len(list(made.configs())) == 0


def test_close_numbers_lie_closer_than_far_ones_and_than_other_choices() -> None:
    assert distance({"a": 8}, {"a": 8}) == 0
    assert 0 < distance({"a": 8}, {"a": 16}) < distance({"a": 8}, {"a": 256}) < 1
    assert distance({"a": 8, "b": "x"}, {"a": 8, "b": "y"}) == distance({"a": True}, {"a": 1}) == 1
    assert distance({"a": 8, "a.b": 1}, {"a": 8}) == 1


KNOWN = ["--max-num-seqs", "enable_prefix_caching", "disable_log_stats", "enable_log_requests"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("max_num_seq", "Did you mean max_num_seqs?"),
        ("--max-num-seqs", "Write max_num_seqs."),
        ("--no-enable-prefix-caching", "Write enable_prefix_caching: false."),
        ("no_enable_prefix_caching", "Write enable_prefix_caching: false."),
        ("disable_log_requests", "Write enable_log_requests: false."),
        ("enable_log_stats", "It has disable_log_stats, which means the opposite."),
        ("api-key", "fresh key"),
        ("zzz", "has no such flag. `python -m"),
    ],
)
def test_unknown_flags_are_answered_with_the_nearest_right_spelling(flag: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_flags(["max_num_seqs", flag], KNOWN)
    assert said in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_every_place_that_names_a_flag_is_checked_with_its_line() -> None:
    text = (
        "name: t\nmodel: m\nworkload: {rate_rps: 1}\nserve:\n  dtyp: half\nbaseline:\n  max_num_seq: 1\n"
        "space:\n  max_num_seqs: {choices: [1, 2]}\nstudy:\n  enqueue:\n    - {enable_prefix_cachin: true}\n"
    )
    with pytest.raises(InputError) as caught:
        Space(parse_experiment(text, "x.yaml")).check_names([*KNOWN, "dtype"])
    assert [line.split(" the installed")[0] for line in str(caught.value).splitlines()] == [
        "x.yaml:5: serve.dtyp:",
        "x.yaml:7: baseline.max_num_seq:",
        "x.yaml:12: study.enqueue.0.enable_prefix_cachin:",
    ]


def test_known_flags_pass() -> None:
    check_flags(["max_num_seqs", "enable_prefix_caching"], KNOWN)
