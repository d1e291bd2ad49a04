"""What a person sees while a sweep runs: a table on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from varcas.batch_size import BatchSizeCurve, Point
from varcas.capacity import Capacity
from varcas.experiment import Workload
from varcas.measurement import Progress as LoadProgress
from varcas.records import LATENCIES, STATISTICS, TrialRow
from varcas.report import described
from varcas.starts import Event, Plan

SHOWN_ROWS = 15
TOLD_EVERY_S = 5.0
LONGEST_REASON = 160


def duration(seconds: float) -> str:
    """`95 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan_text(plan: Plan) -> str:
    """The plan in one line: starts, seconds each, what is kept for confirmation."""
    if not plan.search_left and not plan.confirm_starts:
        return f"{plan.study}: nothing left to run; {plan.search_done} search starts are in the store"
    space = "a continuous space" if plan.space_size is None else f"a space of {plan.space_size}"
    if plan.ruled_out:
        by_rule = ", ".join(f"{rule} {count}" for rule, count in plan.ruled_out.items())
        space += f", of which the rules rule out {sum(plan.ruled_out.values())} ({by_rule})"
    parts = [
        f"{plan.study}: up to {plan.search_left} server starts over {space}",
        f"about {plan.start_s:.0f} s to start and {plan.load_s:.0f} s of load each, {plan.width} at a time",
        *([f"then at most {plan.audit_starts} of what is ruled out, to test the rules"] if plan.audit_starts else []),
        f"then {plan.confirm_starts} fresh starts to confirm" if plan.confirm_starts else "no confirmation starts",
        f"at most {duration(plan.budget_s)}" if plan.budget_s else f"about {duration(plan.total_s)} in all",
    ]
    done = f"; {plan.search_done} already in the store" if plan.search_done else ""
    return "; ".join(parts) + done


def cell(value: float | None, digits: int = 1) -> str:
    """A number for a table, `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def proposal_text(row: TrialRow) -> str:
    """What a row sets, and what for."""
    if row.purpose in ("load", "capacity"):
        return row.profile if row.rate_rps is None else f"{row.profile} at {row.rate_rps:g}/s"
    return described(row.purpose, row.arm, json.loads(row.params_json), row.config_flags)


def verdict_text(row: TrialRow) -> str:
    """A few words on a row: `ok`, `slo missed`, the failure kind, `not valid`; what was left unfinished."""
    said = _verdict_text(row)
    return f"{said}, SIMULATED" if row.simulated else said


def _verdict_text(row: TrialRow) -> str:
    if row.stopped_early:
        return "slo lost, stopped early" if row.slo_met is False else "out of reach, stopped early"
    if row.state != "complete":
        return row.reason_rule or row.failure_kind or row.state
    if row.valid is False:
        return "not valid: " + "; ".join(row.invalid_reasons)
    marks = ["slo missed" if row.slo_met is False else "ok", *(["saturated"] if row.saturated else [])]
    if row.num_unfinished:
        marks.append(f"{row.num_unfinished} of {row.num_requests} unfinished")
    return ", ".join(marks)


def has_dash(row: TrialRow) -> bool:
    """Its line in a table lacks a figure that other measurements have."""
    return row.state == "complete" and None in (row.ttft_p50_ms, row.tpot_mean_ms)


def trials_table(rows: Iterable[TrialRow], title: str | None = None) -> Table:
    """Rows as people compare them."""
    table = Table(title=title, box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("configuration", overflow="fold")
    for name in ("tok/s", "req/s", "TTFT p50 ms", "TPOT mean ms", "start s"):
        table.add_column(name, justify="right")
    table.add_column("result", overflow="fold")
    for row in rows:
        measured = row.state == "complete"
        style = "red" if row.state in ("failed", "infeasible") else "yellow" if row.valid is False else None
        table.add_row(
            str(row.number),
            Text(proposal_text(row)),
            cell(row.output_tokens_per_s if measured else None),
            cell(row.request_rate_rps if measured else None, 2),
            cell(row.ttft_p50_ms if measured else None, 0),
            cell(row.tpot_mean_ms if measured else None),
            cell(row.server_start_s or None, 0),
            Text(verdict_text(row)),
            style=style,
        )
    return table


def row_line(row: TrialRow) -> str:
    """A row as one plain line."""
    head = f"trial {row.number}: {proposal_text(row)}: {verdict_text(row)}"
    if row.state != "complete":
        return f"{head}: {reason(row.failure_detail or row.stopped_early)}"
    return (
        f"{head}: {cell(row.output_tokens_per_s)} tok/s, TTFT p50 {cell(row.ttft_p50_ms, 0)} ms, "
        f"TPOT mean {cell(row.tpot_mean_ms)} ms (start {cell(row.server_start_s, 0)} s, "
        f"overhead {cell(row.overhead_s, 2)} s)"
    )


def curve_text(curve: BatchSizeCurve) -> Group:
    """A batch-size curve as a table, and what follows from it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (curve.flag, "tok/s", "95 %", "req/s", "goodput", "TTFT p50 ms", "TTFT p95 ms", "TPOT mean ms"):
        table.add_column(name, justify="right")
    table.add_column("")
    for point in curve.points:
        lo, hi = point.output_tokens_per_s_lo, point.output_tokens_per_s_hi
        table.add_row(
            str(point.value),
            cell(point.output_tokens_per_s),
            "-" if lo is None or hi is None else f"{lo:.0f} to {hi:.0f}",
            cell(point.request_rate_rps, 2),
            cell(point.goodput_rps, 2),
            cell(point.ttft_p50_ms, 0),
            cell(point.ttft_p95_ms, 0),
            cell(point.tpot_mean_ms),
            Text(_point_words(curve, point)),
        )
    return Group(table, *(Text(line) for line in _curve_lines(curve)))


def _point_words(curve: BatchSizeCurve, point: Point) -> str:
    words = [name for name, value in (("pick", curve.pick), ("knee", curve.knee)) if value == point.value]
    words += ["SLO missed"] if point.slo_met is False else []
    words += ["saturated"] if point.saturated else []
    return ", ".join([*words, *([reason(point.failure)] if point.failure else [])])


def _curve_lines(curve: BatchSizeCurve) -> list[str]:
    live = sum(point.measured_live for point in curve.points)
    lines = [
        f"{curve.starts} server starts, {duration(curve.wall_s)}; {live} of {len(curve.points)} values measured live"
    ]
    if curve.pick is None:
        return [*lines, "nothing that was measured meets the SLO"]
    lines.append(f"knee: {curve.flag} {curve.knee} ({curve.knee_method})")
    interval = "" if curve.pick_lo is None else f" (95 % {cell(curve.pick_lo)} to {cell(curve.pick_hi)})"
    lines.append(f"pick: {curve.flag} {curve.pick}: {curve.objective} {cell(curve.pick_value)}{interval}")
    if curve.confirmed is not None:
        fresh = curve.confirmed
        span = "" if fresh.lo is None else f" (95 % {cell(fresh.lo)} to {cell(fresh.hi)})"
        lines.append(
            f"fresh starts: {len(fresh.values)}, mean {cell(fresh.mean)}{span}; live is {fresh.live_ratio:.3f} of it"
        )
    return [*lines, f"deploy: {curve.command}"]


def capacity_text(answer: Capacity) -> Group:
    """The loads of a capacity as a table, and the capacity."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("requests/s", "tok/s", "load s", *answer.slo):
        table.add_column(name, justify="right")
    table.add_column("")
    for load in answer.loads:
        excess = [cell(None if (x := load.constraints.get(key)) is None else 100 * x, 0) for key in answer.slo]
        words = [load.failure and reason(load.failure), load.stopped_early and "stopped early"]
        words += ["saturated" if load.saturated else None, "holds" if load.met else "missed"]
        figures = (f"{load.rate_rps:g}", cell(load.output_tokens_per_s), cell(load.load_s))
        table.add_row(*figures, *(f"{x} %" for x in excess), Text(", ".join(word for word in words if word)))
    if answer.capacity_rps is None:
        found = "no capacity: no rate that was tried meets the SLO"
    else:
        high = "open" if answer.capacity_rps_hi is None else f"{answer.capacity_rps_hi:.3g}"
        found = (
            f"capacity: {answer.capacity_rps:.3g} requests/s (95 % {cell(answer.capacity_rps_lo, 2)} to {high}, "
            f"this start alone), limited by {answer.limited_by or 'nothing that was tried'}"
        )
    columns = "limits: value over the limit in %, at most 0 holds"
    return Group(table, *(Text(line) for line in (columns, found, f"ended: {answer.ended}; {duration(answer.wall_s)}")))


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


def reason(detail: str | None) -> str:
    """The first sentence of a failure's detail (of a traceback's last line); `varcas show` has the whole."""
    lines = [line.strip() for line in (detail or "").splitlines() if line.strip()] or [""]
    sentence = re.split(r"\.\s+(?=[A-Z])", lines[-1], maxsplit=1)[0]
    return sentence if len(sentence) <= LONGEST_REASON else sentence[: LONGEST_REASON - 4] + " ..."


class _Shown:
    """Runs its live view, on a terminal, for as long as it is entered."""

    _live: Live | None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()


class Progress(_Shown):
    """Shows a sweep's events; call it with each one."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._rows: list[TrialRow] = []
        self._status = "starting"
        self._total = 0
        self._begun = 0
        self._places: dict[int, int] = {}  # of a trial in its phase, from 1
        self._running: dict[int, tuple[str, float]] = {}  # a trial's line, and when it began
        self._live = (
            Live(console=self._console, refresh_per_second=2, get_renderable=self._view)
            if self._console.is_terminal
            else None
        )

    def __call__(self, event: Event) -> None:
        """Takes one event in."""
        text = self._taken(event)
        if self._live is None:
            print(text, file=sys.stderr, flush=True)
            return
        if event.plan:
            self._live.console.print(Text(text))
        elif event.kind in ("note", "confirm"):
            self._status = text
        self._live.refresh()

    def _taken(self, event: Event) -> str:
        """The event's line, counted."""
        if event.plan:
            self._begin(event.plan.search_done + event.plan.search_left, event.plan.search_done)
            self._status = ""
            return plan_text(event.plan)
        if event.total is not None:
            self._begin(event.total)
        if event.row:
            self._rows.append(event.row)
            self._running.pop(event.row.number, None)
            return f"{self._counter(event.row.number)} {row_line(event.row)}"
        if event.number is None:
            return event.text
        text = f"{self._counter(event.number)} {event.text}"
        self._running[event.number] = (text, time.monotonic())
        return f"{text}: starting"

    def _begin(self, total: int, done: int = 0) -> None:
        """A phase of `total` trials begins, `done` of which an earlier run made."""
        self._total, self._begun = total, done

    def _counter(self, number: int) -> str:
        """`[3/5]`: a trial's place among those of its phase; retries come on top."""
        if number not in self._places:
            self._begun += 1
            self._places[number] = self._begun
        place = self._places[number]
        return f"[{place}/{max(place, self._total)}]"

    def _view(self) -> Group:
        hidden = max(0, len(self._rows) - SHOWN_ROWS)
        note = [Text(f"... {hidden} earlier trials (varcas results)", style="dim")] if hidden else []
        now_s = time.monotonic()
        status = [f"{text}: running for {duration(now_s - since_s)}" for text, since_s in list(self._running.values())]
        lines = [Text(line, style="dim") for line in (self._status, *status) if line]
        return Group(*note, trials_table(self._rows[-SHOWN_ROWS:]), *lines)


class Watch(_Shown):
    """Shows how far a load is: one line that changes on a terminal, one every few seconds elsewhere."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._console = Console(file=sys.stderr)
        self._stream, self._began_s, self._told_s = "", 0.0, -math.inf
        self._live = Live(Text(), console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        print(f"loading with {self._workload.described} for {self._workload.duration_s:g} s", file=sys.stderr)
        return super().__enter__()

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
        if progress.stream == "prompts":
            return "making prompts to length"
        whole_s = self._workload.warmup_s if progress.stream == "warmup" else self._workload.duration_s
        stage = "draining" if passed_s > whole_s else f"{passed_s:.0f} of {whole_s:g} s"
        flight = progress.sent - progress.done
        return f"{progress.stream} {stage}: {progress.sent} sent, {progress.done} answered, {flight} in flight"
