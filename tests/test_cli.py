"""The command line as a person meets it: bad input of each kind, exit codes, JSON on stdout."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.sweeps import ROOT, varcas, write_experiment
from tests.rows import confirm, experiment, failed, row
from varcas.cli import parse_duration
from varcas.errors import InputError
from varcas.live import Progress, reason
from varcas.records import TrialRow
from varcas.starts import Event, Plan
from varcas.store import Store

pytestmark = pytest.mark.timeout(120)


def said(*arguments: str | Path, cwd: Path = ROOT) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "varcas", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, timeout=110, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def refused(run_directory: Path, *arguments: str | Path) -> str:
    """The one error of a command that must start nothing."""
    run = varcas(*arguments)
    code, out, err = run.finish(100)
    assert code == 2, (code, out, err)
    assert "Traceback" not in err + out
    assert not run.marked()
    assert not list(run_directory.glob("results/logs/*/*")), "a server was started"
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, err
    return errors[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spce": {}}, ["spce", "Did you mean space?"]),
        ({"study": {"trials": "many"}}, ["study.trials", '"many"', "integer"]),
        ({"space": {}}, ["space", "empty"]),
        ({"space": {"max_num_seq": {"choices": [1]}}}, ["max_num_seq", "Did you mean max_num_seqs?"]),
        ({"baseline": {"max_num_seqs": 0}}, ["max_num_seqs", "0", "refuses"]),
        ({"model": "nowhere/at/all"}, ["model", "nowhere/at/all", "config.json"]),
        ({"hardware": {"gpu": "T4"}}, ["experiment.yaml:5: hardware.gpu", "'T4'", "no GPU", "gpu: cpu"]),
        ({"results": "/proc/results"}, ["/proc/results"]),
        ({"server": {"python": "/nowhere/python"}}, ["server.python", "/nowhere/python", "pip install"]),
        ({"study": {"storage": "mysql://x"}}, ["study.storage", "mysql"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_error_and_starts_nothing(
    changes: dict[str, Any], words: list[str], tmp_path: Path, model_dir: Path
) -> None:
    path = write_experiment(tmp_path, model_dir, **changes)
    if "results" not in changes:
        changes = {**changes, "results": str(tmp_path / "results")}
    error = refused(tmp_path, "sweep", path)
    assert [word for word in words if word not in error] == [], error


def test_a_model_that_cannot_be_fetched_is_said_in_words(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, Path("nobody-has/this-model"))
    data = json.loads(path.read_text())
    data["server"]["download_timeout_s"] = 30
    path.write_text(json.dumps(data))
    code, _, err = varcas(
        "sweep", path, env={"HF_ENDPOINT": "http://127.0.0.1:9", "VARCAS_CACHE": str(tmp_path)}
    ).finish(100)
    assert code == 1, err
    assert "model_download" in err
    assert "Traceback" not in err


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with Store(tmp_path / "results") as store:
        store.append(row(None))
        store.save_study("t", {"fingerprint": {}, "experiment": json.loads(experiment().model_dump_json())})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = refused(tmp_path, "dashboard", "--results", tmp_path / "results", "--port", port)
    assert port in error
    assert "--port 8081" in error


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "results"
    with Store(path) as store:
        rows = [row(None, 100, number=0), row(8, 130, number=1), failed(4, number=2)]
        for entry in [*rows, *confirm(None, 100, 101, 99), *confirm(8, 120, 121, 119)]:
            store.append(entry)
        store.save_study("t", {"fingerprint": {}, "experiment": json.loads(experiment().model_dump_json())})
    return path


def test_results_as_table_json_csv_and_sql(store: Path) -> None:
    code, out, _ = said("results", "--results", store)
    assert code == 0
    assert "max_num_seqs=8" in out
    assert "out_of_memory" in out
    code, out, _ = said("results", "--results", store, "--json")
    assert len(json.loads(out)) == 9
    code, out, _ = said("results", "--results", store, "--csv")
    assert out.splitlines()[0].startswith("trial_id,trial_key,study")
    assert len(out.splitlines()) == 10
    code, out, _ = said("results", "--results", store, "--json", "--sql", "select count(*) n from trials")
    assert json.loads(out) == [{"n": 9}]
    code, _, err = said("results", "--results", store, "--sql", "select nothing from nowhere")
    assert code == 2
    assert "nowhere" in err


def test_show_says_what_failed_and_how_to_reproduce_it(store: Path) -> None:
    code, out, _ = said("show", "2", "--results", store)
    assert code == 0
    assert "out_of_memory: words" in out
    assert "--max-num-seqs 4" in out
    code, _, err = said("show", "77", "--results", store)
    assert code == 2
    assert "no such trial" in err


def test_show_groups_what_was_measured_and_prints_no_zeros_of_a_failure(tmp_path: Path) -> None:
    stages = {"fetch_s": 0.0, "server_start_s": 40.0, "load_s": 0.0}
    measured: dict[str, Any] = {"num_requests": 54, "num_unfinished": 31, "ttft_mean_ms": 3.5, "slo_met": True}
    cut = {"state": "stopped", "failure_kind": "interrupted", "valid": False, "request_rate_rps": 3.25}
    of = experiment(slo="{ttft_p95_ms: 500}")
    with Store(tmp_path / "results") as opened:
        opened.append(row(None, 100, number=0, constraints={"ttft_p95_ms": -0.486}, **stages, **measured))
        opened.append(failed(4, number=1, **stages))
        opened.append(row(8, 77.7, number=2, **stages, **cut))
        opened.save_study("t", {"fingerprint": {}, "experiment": json.loads(of.model_dump_json())})
    where = ["--results", tmp_path / "results"]
    _, out, _ = said("show", "0", *where)
    for words in ("rates:", "latency in ms:", "timing:", "ttft_p95_ms 257 of 500 ms: met", "-: fewer than 10"):
        assert words in out, words
    _, out, _ = said("show", "1", *where)
    assert "until it failed:\n\ntiming:\n  server_start_s: 40\n\n" in out
    _, out, err = said("results", *where)
    assert "ok, 31 of 54 unfinished" in out
    assert "77.7" not in out
    assert "3.25" not in out
    assert "-: fewer than 10" in err


def test_a_line_of_a_failure_holds_its_first_sentence_alone() -> None:
    assert reason("Traceback\n  File\nValueError: at 0.5 of 1. Try another. Or") == "ValueError: at 0.5 of 1"
    assert len(reason("x" * 500)) == 160


def test_trials_are_counted_within_their_phase(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("t", 4, 4, 1, 3, 6, 40.0, 10.0, None, 1)
    with Progress() as progress:
        progress(Event("plan", plan=plan))
        progress(Event("start", text="trial 1: a=1", number=1))
        progress(Event("row", row=row(8, number=1)))
        progress(Event("confirm", text="confirming", total=2))
        progress(Event("start", text="trial 2: a=1", number=2))
        progress(Event("plan", plan=Plan("t", 4, 4, 4, 0, 0, 40.0, 10.0, None, 1)))
    err = capsys.readouterr().err
    for words in ("up to 3 server starts", "[2/4] trial 1: a=1: starting", "[2/4] trial 1: max_num_seqs=8: ok",
                  "[1/2] trial 2", "nothing left to run"):  # fmt: skip
        assert words in err, err


def test_two_formats_at_once_are_refused(store: Path) -> None:
    code, _, err = said("results", "--results", store, "--json", "--csv")
    assert code == 2
    assert "give one of them" in err


def test_recommend_as_text_and_json(store: Path) -> None:
    code, out, _ = said("recommend", "--results", store)
    assert code == 0
    assert "max_num_seqs = 8" in out
    code, out, _ = said("recommend", "t", "--results", store, "--json")
    assert json.loads(out)["verdict"] == "better"


def test_no_answer_exits_3(tmp_path: Path) -> None:
    with Store(tmp_path / "results") as opened:
        opened.append(failed(None))
        opened.save_study("t", {"fingerprint": {}, "experiment": json.loads(experiment().model_dump_json())})
    code, out, _ = said("recommend", "--results", tmp_path / "results", "--json")
    assert code == 3
    assert json.loads(out)["deploy"] is None


@pytest.mark.parametrize("argument", ["t", "u"])
def test_a_study_that_is_not_there(store: Path, argument: str) -> None:
    code, _, err = said("recommend", argument, "--results", store)
    assert code == (0 if argument == "t" else 2)
    assert argument == "t" or "There: t" in err


def test_no_results_yet(tmp_path: Path) -> None:
    code, _, err = said("results", "--results", tmp_path)
    assert code == 2
    assert "holds no results" in err


def test_schema_is_json() -> None:
    assert json.loads(said("schema")[1])["properties"]["workload"]


def test_doctor_reports_as_json() -> None:
    code, out, _ = said("doctor", "--json")
    report = json.loads(out)
    assert {"python", "vllm", "gpu", "disk"} <= {check["name"] for check in report["checks"]}
    assert code == (0 if report["ok"] else 1)


def test_init_writes_an_experiment_that_validates(tmp_path: Path, model_dir: Path) -> None:
    code, out, err = said("init", model_dir, "--rate", "20", "--slo", "ttft_p95_ms=500")
    assert code == 0, err
    path = tmp_path / "my.yaml"
    path.write_text(out)
    assert "goodput_rps" in out
    code, out, err = said("validate", path, "--json")
    assert code == 0, err
    assert json.loads(out)["baseline_ok"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "T44"], ["--gpu", "'T44'", "Did you mean T4?"]),
        (["--slo", "ttft_p95_ms"], ["--slo", "METRIC=LIMIT"]),
        (["--slo", "ttft_95=3"], ["ttft_95"]),
        (["--profile", "chat-mid"], ["--profile", "chat-medium"]),
    ],
)
def test_init_refuses_what_it_does_not_know(arguments: list[str], words: list[str], model_dir: Path) -> None:
    code, _, err = said("init", model_dir, *arguments)
    assert code == 2
    assert [word for word in words if word not in err] == [], err


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("900s", 900), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3d", "-5m", "30", "1h30"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(InputError):
        parse_duration(text)


def test_help_of_every_command_has_an_example_and_loads_no_heavy_library() -> None:
    code, out, _ = said("--help")
    assert code == 0
    for command in ("sweep", "init", "validate", "schema", "results", "show", "recommend", "dashboard", "doctor"):
        assert command in out
        assert "Example" in said(command, "--help")[1]
    heavy = "import sys, varcas.cli; print([m for m in ('ray','optuna','locust','vllm','duckdb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_budget_is_refused_before_anything_is_read() -> None:
    code, _, err = said("sweep", "nowhere.yaml", "--budget", "30")
    assert (code, err) == (2, "error: --budget: '30': has no unit: write 30s or 30m.\n")


def test_validate_says_what_sweep_says_and_equal_refusals_once(tmp_path: Path, model_dir: Path) -> None:
    path = write_experiment(tmp_path, model_dir, serve={"max_model_len": "lots"})
    code, out, err = said("validate", path)
    assert code == 2
    assert "asking vLLM" in err
    assert out.count("lots") == 1, out
    assert "refuses the baseline" in out
    assert "4 configurations of the space fail alike" in out
    swept = refused(tmp_path, "sweep", path)
    assert swept.removeprefix("error: ").partition(";")[0] in out


def test_validate_notes_what_is_not_here(tmp_path: Path, model_dir: Path) -> None:
    path = write_experiment(tmp_path, model_dir, hardware={"gpu": "B9000"}, server={"python": "/nowhere/python"})
    code, out, _ = said("validate", path)
    assert code == 0
    for words in ("server.python: /nowhere/python: not on this machine", "B9000", "Did you mean B", "no weights"):
        assert words in out, out


def test_doctor_looks_for_weights(tmp_path: Path, model_dir: Path) -> None:
    code, out, _ = said("doctor", write_experiment(tmp_path, model_dir), "--json")
    model = next(check for check in json.loads(out)["checks"] if check["name"] == "model")
    assert (code, model["status"]) == (1, "missing")
    assert "load_format: dummy" in model["fix"]


def test_validate_checks_the_sampler(tmp_path: Path, model_dir: Path) -> None:
    code, out, err = said("validate", write_experiment(tmp_path, model_dir, study={"sampler": "tpee"}), "--json")
    assert (code, out) == (2, "")
    assert "Did you mean tpe?" in err


def test_init_of_a_directory_without_weights_writes_random_ones(model_dir: Path) -> None:
    assert "load_format: dummy" in said("init", model_dir)[1]


def test_the_package_lists_what_it_offers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import varcas; print(dir(varcas))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert all(f"'{name}'" in done.stdout for name in ("sweep", "load_experiment", "Results"))


def stored(directory: Path, *rows: TrialRow) -> Path:
    with Store(directory / "results") as store:
        for found in rows:
            store.append(found)
        store.save_study("t", {"fingerprint": {}, "experiment": json.loads(experiment().model_dump_json())})
    return directory / "results"


def test_a_report_is_two_files_and_pictures(tmp_path: Path) -> None:
    results = stored(tmp_path, row(None, 100), row(8, 130))
    code, out, err = said("report", "t", "--results", results, "--json")
    assert code == 0, err
    paths = [Path(path) for path in json.loads(out)]
    assert [path.name for path in paths[:2]] == ["report.html", "report.md"]
    assert all(path.is_file() for path in paths)
    assert paths[0].parent == results / "studies" / "t"
    code, _, err = said("report", "u", "--results", results)
    assert code == 2
    assert "study 'u': not in" in err


def test_an_export_is_the_file_alone_on_stdout(tmp_path: Path) -> None:
    results = stored(tmp_path, row(None, 100, number=0), row(8, 130, number=1), failed(4, number=2))
    place = ("t", "--results", results)
    code, out, err = said("export", *place, "--json")
    assert code == 0, err
    assert json.loads(out)["flags"] == {"dtype": "half", "max_num_seqs": 8}
    code, out, err = said("export", *place, "--format", "k8s", "-o", tmp_path)
    assert (code, out) == (0, "")
    assert err.endswith(f"{tmp_path / 'kubernetes_optimized.yaml'}\n")
    code, out, err = said("export", *place, "--trial", "2", "--port", "9000")
    assert code == 0
    assert "--max-num-seqs 4" in out
    assert "it is failed (out_of_memory)" in err
    code, out, err = said("export", *place, "--format", "helm")
    assert (code, out) == (2, "")
    assert err.startswith("error: --format: 'helm': unknown.")


def test_nothing_to_deploy_exits_3(tmp_path: Path) -> None:
    code, out, err = said("export", "t", "--results", stored(tmp_path, failed(None), failed(8)))
    assert (code, out) == (3, "")
    assert "nothing to deploy" in err
