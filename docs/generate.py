"""Writes the reference pages from the code: `make docs`. With --check, fails when one is out of date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from varcas.cli import app
from varcas.engine.failures import FAILURES
from varcas.experiment import (
    OBJECTIVES,
    Arrival,
    Choices,
    Experiment,
    Hardware,
    Objective,
    Range,
    Server,
    Study,
    Workload,
)
from varcas.gpus import GIB, catalogue
from varcas.metrics import split_key
from varcas.records import LATENCY_METRICS, RequestRecord, Sample, TrialRow
from varcas.rules import LOOSE, RULES
from varcas.store import SCHEMAS

DOCS = Path(__file__).parent
HEAD = "<!-- written by docs/generate.py: edit the code, then `make docs` -->\n\n"


def cli_page() -> Iterator[str]:
    """Every command's help as the terminal shows it."""
    yield "# Command line\n"
    yield "Exit codes: 0 done; 1 the work failed; 2 bad input; 3 done, but no configuration meets the SLO or runs;"
    yield "130 interrupted, everything measured is kept.\n"
    root: Any = typer.main.get_command(app)
    for name, command in _commands(root):
        yield f"## varcas {name}\n"
        yield (command.help or "").replace("\b", "").strip() + "\n"
        yield "| argument or option | what it is |\n|---|---|"
        for parameter in command.params:
            yield f"| `{_usage(parameter)}` | {_help(parameter)} |"
        yield ""


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return ", ".join(parameter.opts)


def _help(parameter: Any) -> str:
    text = str(getattr(parameter, "help", "") or "").replace("|", "\\|")
    default = parameter.default
    shown = default not in (None, False, [], ()) and not callable(default) and "Sentinel" not in repr(default)
    return f"{text} (default: {default})" if shown and "default" not in text else text


def experiment_page() -> Iterator[str]:
    """Keys of the experiment file."""
    yield "# The experiment file\n"
    yield "`varcas schema` prints the JSON Schema, `varcas init` writes a commented file.\n"
    models: list[tuple[str, type[BaseModel]]] = [
        ("top level", Experiment),
        ("hardware", Hardware),
        ("server", Server),
        ("space: choices", Choices),
        ("space: range", Range),
        ("workload", Workload),
        ("workload: arrival", Arrival),
        ("objective", Objective),
        ("study", Study),
    ]
    for title, model in models:
        yield f"## {title}\n"
        yield (model.__doc__ or "").strip() + "\n"
        yield "| key | default | what it is |\n|---|---|---|"
        for name, field in model.model_fields.items():
            yield f"| `{name}` | {_default(field)} | {(field.description or '').replace('|', chr(92) + '|')} |"
        yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{value}`" if value not in (None, "") else ""


def store_page() -> Iterator[str]:
    """Columns of the three datasets."""
    yield "# The result store\n"
    yield "`results/trials/`, `results/requests/`, `results/samples/`: Parquet datasets that pyarrow, DuckDB and polars"
    yield "read as they stand. Columns are only ever added. [measurement.md](measurement.md) defines the metrics.\n"
    yield "## trials\n\nOne row per measurement.\n\n| column | type | what it is |\n|---|---|---|"
    for name, field in TrialRow.model_fields.items():
        yield f"| `{name}` | {SCHEMAS['trials'].field(name).type} | {field.description or ''} |"
    for dataset, record in (("requests", RequestRecord), ("samples", Sample)):
        yield f"\n## {dataset}\n\n{(record.__doc__ or '').strip().splitlines()[0]}\n\n| column | type |\n|---|---|"
        for column in SCHEMAS[dataset]:
            yield f"| `{column.name}` | {column.type} |"


def failures_page() -> Iterator[str]:
    """The failure kinds."""
    yield "# Failure kinds\n"
    yield "Each is told from the server's own words and exit status. *Retried* ones are never held against the"
    yield "configuration.\n"
    yield "| kind | retried | what to do |\n|---|---|---|"
    for failure in FAILURES:
        yield f"| `{failure.kind}` | {'yes' if failure.retry else 'no'} | {failure.hint} |"


def metrics_page() -> Iterator[str]:
    """What each metric is, its unit and what it may be used for."""
    yield "# Metrics\n"
    yield "Columns of `trials` that hold a measured figure. [measurement.md](measurement.md) has each one's clock,"
    yield "window and formula; *objective* says which way is better where it can be one,"
    yield "*SLO* that it can have a limit.\n"
    yield "| metric | unit | objective | SLO | what it is |\n|---|---|---|---|---|"
    for name, field in TrialRow.model_fields.items():
        if field.annotation in (float | None, int | None) and (unit := _unit(name)):
            way, limit = OBJECTIVES.get(name, ""), "yes" if name in LATENCY_METRICS else ""
            yield f"| `{name}` | {unit} | {way} | {limit} | {field.description or _latency(name)} |"


UNITS = {
    "_per_s": "1/s", "_rps": "requests/s", "_ms": "ms", "_frac": "share, 0 to 1", "_j": "J", "_w": "W", "_mhz": "MHz",
    "_c": "°C", "_bytes": "bytes", "_s": "s", "_tokens": "tokens", "usd_per_m_output_tokens": "USD per million",
}  # fmt: skip
"""End of a column's name to its unit; the longest that fits."""


def _unit(name: str) -> str | None:
    found = [end for end in UNITS if name.endswith(end)]
    return UNITS[max(found, key=len)] if found else None


def _latency(name: str) -> str:
    latency, statistic = split_key(name)
    return f"{statistic.replace('p99_9', 'p99.9')} of {latency}"


def rules_page() -> Iterator[str]:
    """The roofline's rules."""
    yield "# Rules\n"
    yield "Why a configuration cannot work, known before it is started. *Hard* rules keep it from being started"
    yield "(`study.prune`), *soft* ones only warn. *Versions* are those of vLLM that a rule holds for, *evidence*"
    yield "where a real refusal was seen. [roofline.md](roofline.md) has the formulas; a rule that a measurement"
    yield "contradicts is switched off for its study.\n"
    yield "| rule | kind | versions | looks at | evidence | source |\n|---|---|---|---|---|---|"
    for rule in RULES:
        own = [f"`{flag}`" for flag in rule.reads if flag not in LOOSE]
        silent = ", silent where a flag is set that changes what is reckoned" if len(own) < len(rule.reads) else ""
        reads = ", ".join(own) + silent
        source = rule.source.replace("|", "\\|")
        yield f"| `{rule.name}` | {rule.kind} | {rule.versions or 'any'} | {reads} | {rule.evidence} | {source} |"


def gpus_page() -> Iterator[str]:
    """The GPU catalogue."""
    yield "# GPUs\n"
    yield "`varcas/gpus.toml`, as `varcas gpus` shows it: datasheets' dense peaks, never a prediction. Figures in"
    yield "italics were confirmed by no second source. [Your own GPU](own_gpu.md) says how to add one.\n"
    yield "| GPU | Ray's type | compute capability | memory, GiB | bandwidth, GB/s | fp16 TFLOPS | power, W | source |"
    yield "|---|---|---|---|---|---|---|---|"
    for gpu in catalogue().values():
        capability = f"{gpu.compute_capability / 10:g}" if gpu.compute_capability else "–"
        figures = {
            "memory_gib": f"{gpu.memory_bytes / GIB:g}",
            "memory_gb_per_s": f"{gpu.memory_bytes_per_s / 1e9:g}",
            "tflops": f"{gpu.peak_flops('fp16') / 1e12:g}",
            "power_w": "–" if gpu.power_w is None else f"{gpu.power_w:g}",
        }
        shown = [f"*{text}*" if name in gpu.unverified else text for name, text in figures.items()]
        yield f"| {gpu.name} | {gpu.ray or '–'} | {capability} | {' | '.join(shown)} | <{gpu.source}> |"


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "cli.md": cli_page,
    "experiment.md": experiment_page,
    "store.md": store_page,
    "failures.md": failures_page,
    "metrics.md": metrics_page,
    "rules.md": rules_page,
    "gpus.md": gpus_page,
}


def main() -> int:
    """Writes or checks every page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        text, path = HEAD + "\n".join(page()).rstrip() + "\n", DOCS / name
        if check and (not path.exists() or path.read_text() != text):
            stale.append(name)
        elif not check:
            path.write_text(text)
    if stale:
        print(f"out of date: {', '.join(stale)}: run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
