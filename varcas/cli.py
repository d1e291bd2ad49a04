"""The command line: parse, call one function, print. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import BaseModel

from varcas import __version__
from varcas.budget import Budget, parse_budget, parse_duration
from varcas.errors import EXIT_INTERRUPTED, EXIT_NO_ANSWER, InputError, VarcasError
from varcas.experiment import Experiment, Study, load_experiment, parse_value, workload_of

if TYPE_CHECKING:
    from varcas.limits_answer import Roofline

app = typer.Typer(
    name="varcas",
    help="Finds the best way to serve a language model on the GPUs you have: real vLLM configurations, measured "
    "under your chat traffic.\n\nExit codes: 0 done, 1 the work failed, 2 bad input, 3 no configuration meets the SLO "
    "or runs, 130 interrupted. An error leaves stdout empty, with `--json` too.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

models_app = typer.Typer(help="What is known of a model from its files.", no_args_is_help=True)
app.add_typer(models_app, name="models")

ExperimentArg = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="experiment file (YAML)")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout; words and errors on stderr")]
ResultsOpt = Annotated[
    Path | None, typer.Option("--results", help="results directory [default: the experiment's, or results/]")
]
StudyArg = Annotated[
    str | None,
    typer.Argument(metavar="[STUDY|EXPERIMENT]", help="study name or experiment file [default: the only study]"),
]


class Engine(StrEnum):
    """What serves."""

    vllm = "vllm"
    simulated = "simulated"


class Format(StrEnum):
    """How rows are printed."""

    table = "table"
    json = "json"
    csv = "csv"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"varcas {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Root options."""


@app.command()
def sweep(
    experiment: ExperimentArg,
    address: Annotated[
        str | None, typer.Option(help="of a Ray cluster [default: a local Ray, or the Ray job's]")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="to spend, confirmation included: wall time (30m, 2h), GPU hours (2gpuh), money (5usd)"),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="server starts of the search, in place of the file's")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=0, help="confirmation starts an arm, in place of the file's")
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="what serves, in place of the file's: `simulated` starts nothing")
    ] = None,
    no_warm_start: Annotated[
        bool, typer.Option("--no-warm-start", help="leave out what other studies in the store measured")
    ] = False,
    results: ResultsOpt = None,
    as_json: Json = False,
) -> None:
    """Searches the experiment's space on real servers and prints what to deploy. Run it again to resume.

    Example: `varcas sweep experiments/quickstart.yaml --budget 30m`
    """
    limits = None if budget is None else parse_budget(budget)
    warm_start = False if no_warm_start else None
    loaded = _with(
        load_experiment(experiment),
        results=results,
        engine=engine,
        trials=trials,
        repeats=repeats,
        warm_start=warm_start,
    )
    place = [str(experiment), *(["--engine", engine.value] if engine else [])]
    place += ["--results", str(results)] if results else []
    _sweep(loaded, place, address=address, budget=limits, trials=trials, as_json=as_json)


@app.command()
def simulate(
    experiment: Annotated[Path | None, typer.Argument(metavar="[EXPERIMENT]", help="experiment file (YAML)")] = None,
    validate: Annotated[
        Path | None, typer.Option(metavar="STORE", help="hold it against the real measurements of a results directory")
    ] = None,
    folds: Annotated[
        int, typer.Option(min=2, help="with --validate: parts of the configurations, each predicted from the others")
    ] = 2,
    trials: Annotated[int | None, typer.Option(min=1, help="starts of the search, in place of the file's")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=0, help="confirmation starts an arm, in place of the file's")
    ] = None,
    results: ResultsOpt = None,
    as_json: Json = False,
) -> None:
    """The same as `sweep` on simulated servers, in seconds: nothing is started, and every figure says so.

    Example: `varcas simulate experiments/llama2_7b_awq_t4.yaml --results results/simulated`
    """
    if (experiment is None) == (validate is None):
        raise InputError(
            "EXPERIMENT, --validate: give one of them: an experiment to simulate, or a store to compare with."
        )
    if validate is not None:
        from varcas.truth import validate as run_validate
        from varcas.truth import validation_text

        answer = run_validate(validate, folds=folds)
        _print(answer, as_json, validation_text(answer))
        return
    assert experiment is not None
    engine = Engine.simulated
    loaded = _with(load_experiment(experiment), results=results, trials=trials, repeats=repeats, engine=engine)
    place = [str(experiment), "--engine", engine.value, *(["--results", str(results)] if results else [])]
    _sweep(loaded, place, address=None, budget=None, trials=trials, as_json=as_json)


def _sweep(
    loaded: Experiment,
    place: list[str],
    *,
    address: str | None,
    budget: Budget | None,
    trials: int | None,
    as_json: bool,
) -> None:
    """Runs an experiment, in phases or not, and prints its answer."""
    from varcas.journey import journey_text, run_phases
    from varcas.live import Progress
    from varcas.metrics import MIN_STARTS
    from varcas.report import Recommendation, as_text
    from varcas.sweeper import sweep as run_sweep

    stopping = threading.Event()
    with _signals(stopping), Progress() as progress:
        run = run_phases if loaded.phases else run_sweep
        try:
            answer = run(loaded, address=address, budget=budget, on_event=progress, stopping=stopping)
        except KeyboardInterrupt:
            _interrupted(loaded)
    options = [("--address", address), ("--trials", trials), ("--repeats", max(MIN_STARTS, loaded.study.repeats))]
    confirm = _command("sweep", *place, *(word for name, given in options if given for word in (name, str(given))))
    _write_report(loaded)
    text = as_text(answer, confirm) if isinstance(answer, Recommendation) else journey_text(answer)
    _print(answer, as_json, text)
    looks = [_command(*words, *_looked_at(loaded, place)) for words in (["results"], ["show", "N"], ["dashboard"])]
    print("\n  ".join([f"results: {loaded.results}", *looks]), file=sys.stderr)
    if not answer.has_answer:
        raise typer.Exit(EXIT_NO_ANSWER)


def _looked_at(loaded: Experiment, place: list[str]) -> list[str]:
    """Arguments that name what was run to the commands that look at it: of several phases the last."""
    if not loaded.phases:
        return [place[0], *(["--results", loaded.results] if "--results" in place else [])]
    return [f"{loaded.name}.{loaded.phases[-1].name}", "--results", loaded.results]


@app.command("batch-size")
def batch_size(
    experiment: ExperimentArg,
    values: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="to measure [default: the space's, else powers of two]")
    ] = None,
    flag: Annotated[str, typer.Option(help="max_num_seqs or max_num_batched_tokens")] = "max_num_seqs",
    fresh: Annotated[bool, typer.Option("--fresh", help="a server of its own for each value")] = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="start the pick afresh, `study.repeats` times")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw the curve: .svg, .png or .html")] = None,
    address: Annotated[str | None, typer.Option(help="of a Ray cluster [default: a local Ray]")] = None,
    results: ResultsOpt = None,
    as_json: Json = False,
) -> None:
    """Measures the baseline with each batch size, on one server where its vLLM allows it; knee, pick and plot.

    What is measured already is not measured again.

    Example: `varcas batch-size experiments/quickstart.yaml --values 1,2,4,8 --json`
    """
    from varcas.batch_size import batch_size_search
    from varcas.live import Progress, curve_text

    loaded = _with(load_experiment(experiment), results=results, trials=None, repeats=None)
    stopping = threading.Event()
    with _signals(stopping), Progress() as progress:
        try:
            answer = batch_size_search(
                loaded,
                _numbers("--values", values),
                flag=flag,
                fresh=fresh,
                confirm=confirm,
                address=address,
                on_event=progress,
                stopping=stopping,
            )
        except KeyboardInterrupt:
            _interrupted(loaded)
    if plot is not None:
        from varcas.pictures import draw_curve

        print(draw_curve(answer, plot), file=sys.stderr)
    _print(answer, as_json, curve_text(answer))
    if answer.pick is None:
        raise typer.Exit(EXIT_NO_ANSWER)


@app.command()
def capacity(
    experiment: ExperimentArg,
    budget: Annotated[str | None, typer.Option(help="for the start and the loads: 5m, 900s")] = None,
    precision: Annotated[
        float, typer.Option(min=0.005, max=0.5, help="how far apart the rates that hold and miss may be in the end")
    ] = 0.04,
    address: Annotated[str | None, typer.Option(help="of a Ray cluster [default: a local Ray]")] = None,
    results: ResultsOpt = None,
    as_json: Json = False,
) -> None:
    """Finds the highest request rate at which the baseline meets the SLO, from one server start.

    Example: `varcas capacity experiments/llama2_7b_awq_t4_slo.yaml --budget 10m`
    """
    from varcas.capacity import find_capacity
    from varcas.live import Progress, capacity_text

    budget_s = None if budget is None else parse_duration(budget)
    loaded = _with(load_experiment(experiment), results=results, trials=None, repeats=None)
    stopping = threading.Event()
    with _signals(stopping), Progress() as progress:
        try:
            answer = find_capacity(
                loaded, budget_s=budget_s, precision=precision, address=address, on_event=progress, stopping=stopping
            )
        except KeyboardInterrupt:
            _interrupted(loaded)
    _print(answer, as_json, capacity_text(answer))
    if answer.capacity_rps is None:
        raise typer.Exit(EXIT_NO_ANSWER)


@app.command()
def load(
    url: Annotated[str, typer.Argument(metavar="URL", help="of an OpenAI-compatible endpoint, e.g. http://host:8000")],
    rate: Annotated[float | None, typer.Option(min=0.001, help="requests per second; open loop")] = None,
    users: Annotated[int | None, typer.Option(min=1, help="users in a closed loop, in place of --rate")] = None,
    profile: Annotated[str, typer.Option(help="a built-in workload (docs/workloads.md)")] = "chat-medium",
    data: Annotated[Path | None, typer.Option(help="your own requests, in place of --profile")] = None,
    arrival: Annotated[
        str | None, typer.Option(help="poisson, constant, trace, or as in the file: '{kind: gamma, burstiness: 0.5}'")
    ] = None,
    duration: Annotated[str, typer.Option(help="the measured window: 60s, 5m")] = "60s",
    warmup: Annotated[str, typer.Option(help="load before the window")] = "5s",
    drain: Annotated[str, typer.Option(help="wait for the last answers, at most")] = "30s",
    seed: Annotated[int, typer.Option(min=0, help="of arrivals, lengths and words")] = 0,
    model: Annotated[str | None, typer.Option(help="as the endpoint calls it [default: its only one]")] = None,
    endpoint: Annotated[str, typer.Option(help="chat, completions, or auto")] = "auto",
    slo: Annotated[list[str] | None, typer.Option(help="upper limit, e.g. ttft_p95_ms=500; may be repeated")] = None,
    clients: Annotated[int, typer.Option(min=1, help="load processes; one was measured up to 200 requests/s")] = 1,
    name: Annotated[str | None, typer.Option(help="study that the row belongs to [default: after the host]")] = None,
    results: Annotated[Path, typer.Option(help="results directory")] = Path("results"),
    as_json: Json = False,
) -> None:
    """Measures an endpoint that runs already. The API key is taken from VARCAS_API_KEY or OPENAI_API_KEY.

    A measurement that is not to be believed is printed and kept, and exits 1.

    Example: `varcas load http://127.0.0.1:8000 --profile chat-medium --rate 20 --json`
    """
    from varcas.endpoint import measure
    from varcas.live import Watch, load_text

    if rate is None and users is None and arrival is None:
        raise InputError("--rate: missing: requests per second, e.g. --rate 20; or --users 32 for a closed loop.")
    given: dict[str, Any] = {
        "profile": profile,
        "data": str(data) if data else None,
        "rate_rps": rate,
        "duration_s": parse_duration(duration, "--duration"),
        "warmup_s": parse_duration(warmup, "--warmup"),
        "max_drain_s": parse_duration(drain, "--drain"),
        "seed": seed,
        "endpoint": endpoint,
    }
    if users is not None:
        given["arrival"] = {"kind": "closed", "users": users}
    elif arrival is not None:
        given["arrival"] = parse_value(arrival)
    workload, stopping = workload_of(given, "varcas load"), threading.Event()
    with _signals(stopping), Watch(workload) as watch:
        try:
            row = measure(
                url,
                workload,
                model=model,
                name=name,
                slo=_slo(slo or []),
                results=results,
                clients=clients,
                on_progress=watch,
                stopping=stopping,
            )
        except KeyboardInterrupt:
            print(f"interrupted; what was measured is in {results}", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    _print(row, as_json, load_text(row))
    if row.valid is False:
        print(f"not to be believed: {'; '.join(row.invalid_reasons)}", file=sys.stderr)
    if row.state == "failed" or row.valid is False:
        raise typer.Exit(VarcasError.exit_code)
    if row.slo_met is False:
        raise typer.Exit(EXIT_NO_ANSWER)


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="hub id, or local directory with config.json")],
    rate: Annotated[float, typer.Option(min=0.001, help="requests per second expected")] = 2.0,
    slo: Annotated[list[str] | None, typer.Option(help="upper limit, e.g. ttft_p95_ms=500; may be repeated")] = None,
    gpu: Annotated[str, typer.Option(help="GPU type, `cpu`, or `auto` for what is here")] = "auto",
    profile: Annotated[str, typer.Option(help="chat-short, chat-medium or chat-long")] = "chat-medium",
    name: Annotated[str | None, typer.Option(help="of the experiment [default: from model and GPU]")] = None,
) -> None:
    """Writes a commented experiment file for this GPU, model and vLLM version to stdout.

    Example: `varcas init TheBloke/Llama-2-7B-AWQ --rate 20 --slo ttft_p95_ms=500 > my.yaml`
    """
    from varcas.starter import starter_file

    print(starter_file(model, rate_rps=rate, slo=_slo(slo or []), gpu=gpu, profile=profile, name=name))


@app.command()
def validate(experiment: ExperimentArg, as_json: Json = False) -> None:
    """Checks an experiment, and asks the installed vLLM about its flags and configurations. Starts no server.

    Example: `varcas validate experiments/quickstart.yaml`
    """
    from varcas.journey import opening
    from varcas.validate import Validated, validated_text
    from varcas.validate import validate as run_validate

    answer: Validated = run_validate(opening(load_experiment(experiment)), lambda text: print(text, file=sys.stderr))
    _print(answer, as_json, validated_text(answer))
    if not answer.baseline_ok:
        raise typer.Exit(InputError.exit_code)
    if answer.nothing_left is not None:
        raise typer.Exit(EXIT_NO_ANSWER)


@app.command()
def schema() -> None:
    """Prints the JSON Schema of an experiment file, for editors.

    Example: `varcas schema > experiment.schema.json`
    """
    print(json.dumps(Experiment.model_json_schema(), indent=2))


@app.command()
def results(
    study: StudyArg = None,
    results: ResultsOpt = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="every column as CSV")] = False,
    sql: Annotated[str | None, typer.Option(help="DuckDB SQL over the views trials, requests, samples")] = None,
    sort: Annotated[str | None, typer.Option(help="column to sort by, `-column` for largest first")] = None,
    invalid: Annotated[bool, typer.Option("--invalid", help="only measurements that are not to be believed")] = False,
    effects: Annotated[
        bool, typer.Option("--effects", help="what each flag does to the objective, and which act together")
    ] = False,
) -> None:
    """Shows the trials of a study.

    Example: `varcas results --sql "select number, output_tokens_per_s from trials order by 2 desc"`
    """
    from varcas.effects import effects_text
    from varcas.live import has_dash, trials_table
    from varcas.report import DASH_NOTE
    from varcas.results import Results

    if as_json and as_csv:
        raise InputError("--json, --csv: give one of them.")
    out = Format.json if as_json else Format.csv if as_csv else Format.table
    opened = Results(_results_path(study, results))
    if sql:
        _print_table(opened.sql(sql), out)
        return
    if effects:
        found = opened.effects(_study_name(study))
        _print(found, as_json, effects_text(found))
        return
    rows = opened.trials(_study_name(study), sort=sort)
    rows = [row for row in rows if row.valid is False] if invalid else rows
    if out is Format.table:
        _rich(trials_table(rows))
        if any(has_dash(row) for row in rows):
            print(DASH_NOTE, file=sys.stderr)
        return
    dumped = [row.model_dump(mode="json") for row in rows]
    print(json.dumps(dumped, indent=2) if out is Format.json else _csv(dumped), end="" if out is Format.csv else "\n")


@app.command()
def compare(
    study_a: Annotated[str, typer.Argument(metavar="STUDY_A", help="study name or experiment file: before")],
    study_b: Annotated[str, typer.Argument(metavar="STUDY_B", help="study name or experiment file: after")],
    results: ResultsOpt = None,
    results_b: Annotated[
        Path | None, typer.Option("--results-b", help="results directory of STUDY_B [default: that of STUDY_A]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Shows what changed from one study to another, per metric, with intervals over starts. Starts nothing.

    Exits 1 when a metric is worse with the whole of its interval.

    Example: `varcas compare before-upgrade after-upgrade --json`
    """
    from varcas.compare import compare_studies, comparison_text
    from varcas.results import Results

    first = _results_path(study_a, results)
    second = results_b or (_results_path(study_b, results) if _is_file(study_b) else first)
    before, after = Results(first).trials(_study_name(study_a)), Results(second).trials(_study_name(study_b))
    answer = compare_studies(before, after)
    _print(answer, as_json, comparison_text(answer))
    if answer.regressed:
        raise typer.Exit(VarcasError.exit_code)


@app.command()
def show(
    number: Annotated[int, typer.Argument(metavar="N", help="number of the trial, as `varcas results` shows it")],
    study: StudyArg = None,
    results: ResultsOpt = None,
    as_json: Json = False,
) -> None:
    """Shows one trial: what it measured, or why it failed, with the log line, a hint and the command to reproduce it.

    Example: `varcas show 7`
    """
    from varcas.results import Results, trial_text

    opened = Results(_results_path(study, results))
    row = opened.trial(number, _study_name(study))
    _print(row, as_json, trial_text(row, opened.experiment(row.study).slo if row.constraints else {}))


@app.command()
def recommend(study: StudyArg = None, results: ResultsOpt = None, as_json: Json = False) -> None:
    """Prints what to deploy from what the store holds. Starts nothing.

    Example: `varcas recommend --json`
    """
    from varcas.metrics import MIN_STARTS
    from varcas.report import as_text
    from varcas.results import Results

    answer = Results(_results_path(study, results)).recommend(_study_name(study))
    file = study if study and _is_file(study) else "EXPERIMENT"
    again = _command("sweep", file, *(["--results", str(results)] if results else []), "--repeats", str(MIN_STARTS))
    _print(answer, as_json, as_text(answer, again))
    if not answer.has_answer:
        raise typer.Exit(EXIT_NO_ANSWER)


@app.command()
def report(
    study: StudyArg = None,
    results: ResultsOpt = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="directory [default: studies/STUDY in results]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes a study as one HTML page that needs nothing else, and as Markdown. Starts nothing.

    Example: `varcas report experiments/quickstart.yaml -o report/`
    """
    from varcas.page import write_report
    from varcas.results import Results

    paths = write_report(Results(_results_path(study, results)), _study_name(study), output)
    shown = [str(path) for path in paths if as_json or path.suffix != ".svg"]
    print(json.dumps(shown) if as_json else "\n".join(shown))


@app.command()
def export(
    study: StudyArg = None,
    form: Annotated[
        str,
        typer.Option("--format", "-f", help="sh, compose, k8s, systemd, vllm-yaml (for `vllm serve --config`) or json"),
    ] = "sh",
    trial: Annotated[int | None, typer.Option(help="this trial's configuration [default: what is recommended]")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="file, or directory to write it to [default: stdout]")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="to serve on")] = 8000,
    image: Annotated[str | None, typer.Option(help="container image [default: vLLM's of the measured version]")] = None,
    results: ResultsOpt = None,
    as_json: Annotated[bool, typer.Option("--json", help="the same as --format json")] = False,
) -> None:
    """Writes what to deploy as a start script, Compose, Kubernetes, systemd, vLLM's own config file, or JSON.

    No secret is in it: VLLM_API_KEY and HF_TOKEN come from the environment of whoever starts it.

    Example: `varcas export experiments/quickstart.yaml --format compose -o compose.yaml`
    """
    from varcas.export import Options, file_name, write_file
    from varcas.export import export as export_text
    from varcas.results import Results

    form = "json" if as_json else form
    found = Results(_results_path(study, results)).deployment(_study_name(study), trial)
    if found is None:
        print("nothing to deploy: no configuration meets the SLO or runs; `varcas recommend` says why", file=sys.stderr)
        raise typer.Exit(EXIT_NO_ANSWER)
    text = export_text(found, form, Options(port=port, image=image))
    for notice in found.notices:
        print(notice, file=sys.stderr)
    if output is None:
        print(text, end="")
        return
    path = output / file_name(form, found.role) if output.is_dir() else output
    write_file(text, path, form)
    print(path, file=sys.stderr)


@app.command()
def dashboard(
    study: StudyArg = None,
    results: ResultsOpt = None,
    port: Annotated[int, typer.Option(help="to listen on, loopback only")] = 8080,
) -> None:
    """Opens optuna-dashboard on the rows of a study, new ones included; failures and SLO misses show as such.

    Example: `varcas dashboard experiments/quickstart.yaml`
    """
    from varcas.results import Results

    _require_free(port)
    opened = Results(_results_path(study, results))
    _write_report(opened.experiment(_study_name(study)), opened.path)
    with contextlib.suppress(KeyboardInterrupt), opened.dashboard(_study_name(study), port=port) as server:
        print(f"http://127.0.0.1:{port}/ (Ctrl-C ends it)", file=sys.stderr)
        server.serve_forever()


@app.command()
def doctor(
    experiment: Annotated[Path | None, typer.Argument(help="check for this experiment's server and hardware")] = None,
    as_json: Json = False,
) -> None:
    """Says what is here (Python, vLLM, GPUs, Ray, ports, disk) and what is missing, with the fix.

    Example: `varcas doctor experiments/quickstart.yaml`
    """
    from varcas.doctor import examine, report_text

    report = examine(load_experiment(experiment) if experiment else None)
    _print(report, as_json, report_text(report))
    if not report.ok:
        raise typer.Exit(VarcasError.exit_code)


@app.command()
def gpus(
    names: Annotated[list[str] | None, typer.Argument(metavar="[GPU]...", help="keys, Ray's or NVML's names")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="measure this host's CPU too, for 2 s")] = False,
    as_json: Json = False,
) -> None:
    """Shows the GPU catalogue: peaks, memory, bandwidth, power, price, each with its source.

    Example: `varcas gpus T4 L4 --json`
    """
    from varcas.described import described_gpus, gpus_text

    answer = described_gpus(names or [], probe)
    _print(answer, as_json, gpus_text(answer))


@models_app.command("show")
def models_show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="with config.json; weights are not needed")],
    dtype: Annotated[str | None, typer.Option(help="vLLM computes in [default: the checkpoint's]")] = None,
    as_json: Json = False,
) -> None:
    """Shows a model's parameters, attention, bytes of weights as vLLM loads them, and bytes of KV cache a token.

    Example: `varcas models show models/llama-2-7b-awq --json`
    """
    from varcas.described import described_model, model_text

    answer = described_model(directory, dtype)
    _print(answer, as_json, model_text(answer))


def _listed(help_text: str) -> Any:
    return typer.Option(metavar="N,N,...", help=help_text)


GpusOpt = Annotated[
    list[str] | None,
    typer.Option(help="of the catalogue (`varcas gpus`), or `cpu`; may be repeated [default: the experiment's]"),
]
PlotsOpt = Annotated[
    Path | None, typer.Option(metavar="DIR", help="draw roofline, memory and feasible region: SVG, PNG, HTML")
]


@app.command()
def roofline(
    experiment: ExperimentArg,
    gpu: GpusOpt = None,
    plots: PlotsOpt = None,
    batches: Annotated[str | None, _listed("sequences in a decode step to show")] = None,
    contexts: Annotated[str | None, _listed("cached tokens to show [default: the workload's, the longest]")] = None,
    prompts: Annotated[str | None, _listed("prompt lengths to show [default: the workload's, the longest]")] = None,
    vllm: Annotated[
        str | None, typer.Option(metavar="VERSION", help="whose rules to ask [default: of the vLLM installed here]")
    ] = None,
    results: ResultsOpt = None,
    as_json: Json = False,
) -> None:
    """Says what fits, what cannot run and why, and what no server could beat, on each GPU. Starts nothing.

    Example: `varcas roofline experiments/llama2_7b_awq_t4.yaml --gpu T4 --gpu L4 --gpu A10G`
    """
    from varcas.journey import opening
    from varcas.limits import roofline_report
    from varcas.limits_text import roofline_text

    answer = roofline_report(
        opening(load_experiment(experiment)),
        gpu or (),
        results=results,
        engine_version=vllm,
        batches=_numbers("--batches", batches),
        contexts=_numbers("--contexts", contexts),
        prompts=_numbers("--prompts", prompts),
    )
    _drawn(answer, plots)
    _print(answer, as_json, roofline_text(answer))
    if not answer.has_answer:
        raise typer.Exit(EXIT_NO_ANSWER)


def _drawn(answer: Roofline, directory: Path | None) -> None:
    """Draws the pictures where they are asked for, and names the files on stderr."""
    if directory is None:
        return
    from varcas.pictures import draw

    for path in draw(answer, directory):
        print(path, file=sys.stderr)


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    """`1,8,40`. Raises InputError for anything but positive integers with commas between."""
    words = text.split(",") if text is not None else []
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise InputError(f"{option}: {text!r}: write positive integers with commas between, e.g. {option} 1,8,40.")
    return tuple(sorted({int(word) for word in words}))


def _write_report(experiment: Experiment, path: Path | None = None) -> None:
    """Writes a study's report; one that cannot be written costs no answer."""
    from varcas.page import write_report
    from varcas.results import Results

    try:
        page = write_report(Results(path or experiment.results), experiment.name)[0]
        print(f"report: {page}", file=sys.stderr)
    except InputError as error:
        print(f"no report: {error}", file=sys.stderr)


def _require_free(port: int) -> None:
    """Raises InputError when somebody listens on a port of ours."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return
    except (OSError, OverflowError) as error:
        raise InputError(f"--port: {port}: cannot be listened on ({error}). Give another, e.g. --port 8081.") from error


def _slo(pairs: list[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for pair in pairs:
        key, _, limit = pair.partition("=")
        try:
            limits[key.strip()] = float(limit)
        except ValueError as error:
            raise InputError(f"--slo: {pair!r}: write METRIC=LIMIT, e.g. ttft_p95_ms=500.") from error
    return limits


def _with(
    experiment: Experiment, *, results: Path | None, engine: Engine | None = None, **study_fields: int | bool | None
) -> Experiment:
    """The experiment with the command line's values over the file's."""
    study = {key: new for key, new in study_fields.items() if new is not None}
    changed: dict[str, Any] = {}
    if study:
        changed["study"] = Study.model_validate({**experiment.study.model_dump(), **study})
    if results is not None:
        changed["results"] = str(results)
    if engine is not None:
        changed["engine"] = engine.value
    return experiment.model_copy(update=changed)


def _results_path(study: str | None, results: Path | None) -> Path:
    if results is not None:
        return results
    return Path(load_experiment(study).results) if study and _is_file(study) else Path("results")


def _study_name(study: str | None) -> str | None:
    return load_experiment(study).name if study and _is_file(study) else study


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def _print(answer: BaseModel, as_json: bool, shown: Any) -> None:
    """JSON, or words as they stand, or what rich lays out."""
    if as_json or isinstance(shown, str):
        print(answer.model_dump_json(indent=2) if as_json else shown)
    else:
        _rich(shown)


def _print_table(table: Any, out: Format) -> None:
    rows: list[dict[str, Any]] = table.to_pylist()
    if out is Format.json:
        print(json.dumps(rows, indent=2, default=str))
    elif out is Format.csv:
        print(_csv(rows), end="")
    else:
        from rich.table import Table

        shown = Table(box=None, pad_edge=False, header_style="bold")
        for name in table.column_names:
            shown.add_column(name, overflow="fold")
        for row in rows:
            shown.add_row(*("" if cell is None else str(cell) for cell in row.values()))
        _rich(shown)


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [])
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v, default=str) if isinstance(v, dict | list) else v for k, v in row.items()})
    return out.getvalue()


def _rich(table: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


class _signals:  # noqa: N801
    """Ctrl-C or SIGTERM once: finish cleanly; twice: leave at once (guardians end the servers)."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stopping.is_set():
            os._exit(EXIT_INTERRUPTED)
        self._stopping.set()
        print("stopping: running servers are ended, what is measured is kept (again: leave at once)", file=sys.stderr)


def _interrupted(experiment: Experiment) -> NoReturn:
    command = _command(*sys.argv[1:])
    print(f"interrupted; everything measured is in {experiment.results}. Resume with:\n  {command}", file=sys.stderr)
    raise typer.Exit(EXIT_INTERRUPTED)


def _command(*words: str) -> str:
    """A command of varcas as it can be pasted: its script as it was called, or this Python."""
    script = sys.argv[0]
    program = [script] if Path(script).name == "varcas" else [sys.executable, "-m", "varcas"]
    return shlex.join([*program, *words])


def run(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit code; a `VarcasError` is a message, never a traceback."""
    try:
        command()
    except VarcasError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `varcas results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def main() -> None:
    """Entry point of `varcas` and `python -m varcas`."""
    sys.exit(run(lambda: app(prog_name="varcas")))
