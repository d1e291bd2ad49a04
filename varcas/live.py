"""What a person sees while a sweep runs: a table on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from varcas.experiment import Workload
from varcas.measurement import Progress as LoadProgress
from varcas.records import LATENCIES, STATISTICS, TrialRow
from varcas.sweeper import Event, Plan

SHOWN_ROWS = 15
TOLD_EVERY_S = 5.0


def duration(seconds: float) -> str:
    """`95 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan_text(plan: Plan) -> str:
    """The plan in one line: starts, seconds each, what is kept for confirmation."""
    space = "a continuous space" if plan.space_size is None else f"a space of {plan.space_size}"
    parts = [
        f"{plan.study}: up to {plan.search_starts} server starts over {space}",
        f"about {plan.start_s:.0f} s to start and {plan.load_s:.0f} s of load each, {plan.width} at a time",
        f"then {plan.confirm_starts} fresh starts to confirm" if plan.confirm_starts else "no confirmation starts",
        f"at most {duration(plan.budget_s)}" if plan.budget_s else f"about {duration(plan.total_s)} in all",
    ]
    done = f"; {plan.search_done} already in the store" if plan.search_done else ""
    return "; ".join(parts) + done


def cell(value: float | None, digits: int = 1) -> str:
    """A number for a table, `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def proposal_text(row: TrialRow) -> str:
    """What a row sets: the search's parameters, or `baseline`."""
    if row.purpose == "baseline":
        return "baseline"
    if row.purpose == "load":
        return row.profile if row.rate_rps is None else f"{row.profile} at {row.rate_rps:g}/s"
    params = json.loads(row.params_json) or json.loads(row.config_json)
    text = " ".join(f"{name}={_short(value)}" for name, value in params.items())
    return f"confirm {row.arm}: {text}" if row.purpose == "confirm" else text


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def verdict_text(row: TrialRow) -> str:
    """One word on a row: `ok`, `slo missed`, the failure kind, `not valid`."""
    if row.state != "complete":
        return row.reason_rule or row.failure_kind or row.state
    if row.valid is False:
        return "not valid: " + "; ".join(row.invalid_reasons)
    marks = ["slo missed" if row.slo_met is False else "ok", *(["saturated"] if row.saturated else [])]
    return ", ".join(marks)


def trials_table(rows: Iterable[TrialRow], title: str | None = None) -> Table:
    """Rows as people compare them."""
    table = Table(title=title, box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("configuration", overflow="fold")
    for name in ("tok/s", "req/s", "TTFT p50 ms", "TPOT mean ms", "start s"):
        table.add_column(name, justify="right")
    table.add_column("result", overflow="fold")
    for row in rows:
        style = "red" if row.state in ("failed", "infeasible") else "yellow" if row.valid is False else None
        table.add_row(
            str(row.number),
            Text(proposal_text(row)),
            cell(row.output_tokens_per_s),
            cell(row.request_rate_rps, 2),
            cell(row.ttft_p50_ms, 0),
            cell(row.tpot_mean_ms),
            cell(row.server_start_s, 0),
            Text(verdict_text(row)),
            style=style,
        )
    return table


def row_line(row: TrialRow) -> str:
    """A row as one plain line."""
    head = f"trial {row.number}: {proposal_text(row)}: {verdict_text(row)}"
    if row.state != "complete":
        return f"{head}: {row.failure_detail}"
    return (
        f"{head}: {cell(row.output_tokens_per_s)} tok/s, TTFT p50 {cell(row.ttft_p50_ms, 0)} ms, "
        f"TPOT mean {cell(row.tpot_mean_ms)} ms (start {cell(row.server_start_s, 0)} s, "
        f"overhead {cell(row.overhead_s, 2)} s)"
    )


def load_text(row: TrialRow) -> str:
    """One measurement in words and a table of latencies."""
    n = f"{row.num_requests} requests came due: {row.num_completed} answered"
    lines = [
        f"{row.model} at {row.endpoint_url}: {row.state}",
        f"{row.failure_kind}: {row.failure_detail}" if row.failure_kind else "",
        f"{n}, {row.num_failed} failed, {row.num_unfinished} unfinished" if row.num_requests is not None else "",
    ]
    if row.output_tokens_per_s is not None:
        lines += [
            f"{row.output_tokens_per_s:.1f} tok/s out (95 % {cell(row.output_tokens_per_s_lo)} to "
            f"{cell(row.output_tokens_per_s_hi)}), {cell(row.prompt_tokens_per_s)} tok/s in, "
            f"{cell(row.request_rate_rps, 2)} requests/s, goodput {cell(row.goodput_rps, 2)} requests/s",
            "",
            *_latency_lines(row),
            "",
            f"client: sent {cell(row.send_lag_p99_ms, 2)} ms late at p99, {row.client_cpu_frac or 0:.0%} of a core",
        ]
    if row.saturated:
        lines.append(
            "saturated: the server fell behind; latency says how long the test ran; it sustains "
            f"{cell(row.sustainable_rps, 2)} requests/s"
        )
    if row.valid is False:
        lines.append(f"not to be believed: {'; '.join(row.invalid_reasons)}")
    lines += [f"warning: {warning}" for warning in row.warnings]
    for key, excess in row.constraints.items():
        lines.append(f"SLO {key}: {'met' if excess <= 0 else 'missed'} ({excess:+.0%} of the limit)")
    return "\n".join(line for i, line in enumerate(lines) if line or i > 2)


def _latency_lines(row: TrialRow) -> list[str]:
    """A table of latencies in ms; `-` where too few observations lie beyond a percentile."""
    head = "".join(f"{name:>10}" for name in STATISTICS)
    body = [
        f"{name.upper():<8}" + "".join(f"{cell(getattr(row, f'{name}_{stat}_ms')):>10}" for stat in STATISTICS)
        for name in LATENCIES
    ]
    return [f"{'ms':<8}{head}", *body]


class Progress:
    """Shows a sweep's events; call it with each one."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._rows: list[TrialRow] = []
        self._status = "starting"
        self._live = (
            Live(self._view(), console=self._console, refresh_per_second=2) if self._console.is_terminal else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Takes one event in."""
        text = plan_text(event.plan) if event.plan else row_line(event.row) if event.row else event.text
        if event.row:
            self._rows.append(event.row)
        if self._live is None:
            print(text, file=sys.stderr, flush=True)
            return
        if event.plan:
            self._live.console.print(Text(text))
        elif not event.row:
            self._status = text
        self._live.update(self._view())

    def _view(self) -> Group:
        hidden = max(0, len(self._rows) - SHOWN_ROWS)
        note = [Text(f"... {hidden} earlier trials (varcas results)", style="dim")] if hidden else []
        return Group(*note, trials_table(self._rows[-SHOWN_ROWS:]), Text(self._status, style="dim"))


class Watch:
    """Shows how far a load is: one line that changes on a terminal, one every few seconds elsewhere."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._console = Console(file=sys.stderr)
        self._stream, self._began_s, self._told_s = "", 0.0, -math.inf
        self._live = Live(Text(), console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        print(f"loading with {self._workload.described} for {self._workload.duration_s:g} s", file=sys.stderr)
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: LoadProgress) -> None:
        """Takes the latest in."""
        now_s = time.monotonic()
        if progress.stream != self._stream:
            self._stream, self._began_s, self._told_s = progress.stream, now_s, -math.inf
        text = self._text(progress, now_s - self._began_s)
        if self._live:
            self._live.update(Text(text))
        elif now_s - self._told_s >= TOLD_EVERY_S:
            self._told_s = now_s
            print(text, file=sys.stderr, flush=True)

    def _text(self, progress: LoadProgress, passed_s: float) -> str:
        whole_s = self._workload.warmup_s if progress.stream == "warmup" else self._workload.duration_s
        stage = "draining" if passed_s > whole_s else f"{passed_s:.0f} of {whole_s:g} s"
        flight = progress.sent - progress.done
        return f"{progress.stream} {stage}: {progress.sent} sent, {progress.done} answered, {flight} in flight"
