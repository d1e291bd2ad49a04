"""How exact varcas's load is, beside `vllm bench serve` and GuideLLM: `make bench-load`.

    python benchmarks/load_client.py [--quick] [--guidellm PATH] [--json PATH] [--rates 50,100,200] [--seconds 20]

Each cell starts `truth_server.py` anew on a core of its own, gives the client the same Poisson arrivals (GuideLLM draws
its own) of 64 tokens each, 20 ms apart, and compares what the client says with when the chunks left the server. Prints
one Markdown table, the knee of each client, and each bound of issue 5, met or missed; exits 1 when varcas misses one.
A cell that fails says why in its row, and the rest goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import load_truth
from load_clients import CLIENTS, TOKENS, Tools, environment, poisson_plan
from load_process import Usage, run_watched

HERE = Path(__file__).resolve().parent
STATE = struct.Struct("5q")
EVENTS = TOKENS + 3
"""Server-sent events of an answer: the role, the tokens, usage, `[DONE]`."""
STARTUP_TIMEOUT_S = 150.0
SERVER_TIMEOUT_S = 20.0
MODES = ("step", "free")
KNEE_LAG_MS, KNEE_TTFT_MS = 10.0, 1.0
SERVER_FULL_MS = 20.0
"""A whole step: a server that is later than this cannot tell a client's limit from its own."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One client at one rate."""

    client: str
    mode: str
    rate_rps: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a cell.

    Attributes:
        cell: what was run.
        cores: that the client had.
        figures: None if it failed.
        load_us_per_event: CPU time from the first request's arrival to the last answer's end, an event.
        total_us_per_event: CPU time of all of the client's processes, an event.
        load_cores: cores that it kept busy under load.
        peak_rss_mb: largest sum over its processes.
        wall_s: of the client.
        error: why it failed.
    """

    cell: Cell
    cores: int
    figures: load_truth.Figures | None = None
    load_us_per_event: float = math.nan
    total_us_per_event: float = math.nan
    load_cores: float = math.nan
    peak_rss_mb: float = math.nan
    wall_s: float = math.nan
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores are whose: the server's is the last one, and is shared only where there are but two."""

    ours: tuple[int, ...]

    @property
    def server(self) -> list[int]:
        """The truth's."""
        return [self.ours[-1]]

    def of_client(self, processes: int) -> list[int]:
        """One for each of its processes, as far as there are cores."""
        return list(self.ours[:processes])


@contextmanager
def truth_server(cell: Cell, cores: Cores, folder: Path) -> Iterator[int]:
    """Runs the scripted server; gives its port, and leaves `truth.bin` and `state` in the folder."""
    argv = [sys.executable, "-S", str(HERE / "truth_server.py"), "--mode", cell.mode, "--tokens", str(TOKENS)]
    argv += ["--stamps", str(folder / "truth.bin"), "--state", str(folder / "state")]
    server = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores.server),
    )
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.send_signal(signal.SIGTERM)
        server.wait(SERVER_TIMEOUT_S)
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


def run_cell(cell: Cell, cores: Cores, tools: Tools, folder: Path) -> Row:
    """Runs one cell; whatever fails in it is its row's error."""
    client = CLIENTS[cell.client]
    mine = cores.of_client(client.processes)
    try:
        folder.mkdir(parents=True)
        plan = poisson_plan(cell.rate_rps, cell.seconds)
        with truth_server(cell, cores, folder) as port:
            argv, env = client.command(plan, port, folder, tools)
            timeout_s = cell.seconds * 2 + STARTUP_TIMEOUT_S
            usage = run_watched(argv, environment(env), mine, folder / "client.log", timeout_s)
        found = load_truth.figures(
            load_truth.read(folder / "truth.bin"), client.read(plan, folder), len(plan.at_s), TOKENS
        )
        return _row(cell, len(mine), found, usage, folder)
    except Exception as error:
        (folder / "error.log").write_text(traceback.format_exc())
        return Row(cell, len(mine), error=f"{type(error).__name__}: {error}")


def _row(cell: Cell, cores: int, found: load_truth.Figures, usage: Usage, folder: Path) -> Row:
    arrived, _, _, first_ns, last_ns = STATE.unpack((folder / "state").read_bytes())
    if not arrived:
        raise ChildProcessError("it sent nothing")
    events = arrived * EVENTS
    load_cpu_s = usage.cpu_between_s(first_ns / 1e9, last_ns / 1e9)
    return Row(
        cell,
        cores,
        found,
        load_us_per_event=load_cpu_s / events * 1e6,
        total_us_per_event=usage.cpu_s / events * 1e6,
        load_cores=load_cpu_s / (last_ns - first_ns) * 1e9,
        peak_rss_mb=usage.peak_rss_bytes / 1e6,
        wall_s=usage.wall_s,
    )


HEAD = (
    "client", "mode", "req/s", "cores", "TTFT error p50 / p99 ms", "token error p99 ms", "send lag p50 / p99 ms",
    "lost / doubled / wrong", "CPU us an event: under load; with start-up", "RSS MB", "server late p99; unsure p99 ms",
)  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: Row) -> str:
    cell, found = row.cell, row.figures
    first = [CLIENTS[cell.client].name, cell.mode, f"{cell.rate_rps:g}", str(row.cores)]
    if found is None:
        return f"| {' | '.join(first)} | failed: {(row.error or '').replace('|', '/')} |" + " |" * 6
    undue = f" ({found.without_due} without a due moment)" if found.without_due else ""
    cells = [
        f"{_ms(found.ttft_error_p50_ms)} / {_ms(found.ttft_error_p99_ms)}",
        _ms(found.token_error_p99_ms),
        f"{_ms(found.send_lag_p50_ms)} / {_ms(found.send_lag_p99_ms)}{undue}",
        f"{found.lost} / {found.doubled} / {found.wrong}",
        f"{row.load_us_per_event:.0f}; {row.total_us_per_event:.0f}",
        f"{row.peak_rss_mb:,.0f}",
        f"{_ms(found.server_late_p99_ms)}; {_ms(found.truth_unsure_p99_ms)}",
    ]
    return f"| {' | '.join([*first, *cells])} |"


def _ms(value: float) -> str:
    """Two significant digits or more."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


@dataclass(frozen=True, slots=True)
class Bound:
    """One demand of issue 5 on one cell; `met` is None when there is nothing to compare with."""

    name: str
    where: str
    value: float
    limit: float

    @property
    def met(self) -> bool | None:
        """NaN on either side is no measurement."""
        return None if math.isnan(self.value) or math.isnan(self.limit) else self.value <= self.limit

    def __str__(self) -> str:
        """As a Markdown row."""
        said = {True: "met", False: "**missed**", None: "not measured"}[self.met]
        return f"| {self.name} | {self.where} | {self.value:.3f} | {self.limit:.3f} | {said} |"


def bounds(rows: Sequence[Row]) -> list[Bound]:
    """What issue 5 demands of varcas's one process, at 50 to 200 requests/s."""
    found = {(row.cell.client, row.cell.mode, row.cell.rate_rps): row for row in rows}
    out: list[Bound] = []
    for (client, mode, rate_rps), row in found.items():
        if client != "varcas" or rate_rps > 200:
            continue
        where = f"{mode}, {rate_rps:g}/s"
        other = found.get(("vllm", mode, rate_rps), Row(row.cell, 1))
        out += [*_exactness(row, where), *_cost(row, other, where)]
    return out


def _exactness(row: Row, where: str) -> list[Bound]:
    seen = row.figures
    if seen is None:
        return [Bound("a measurement", where, 1.0, 0.0)]
    wrong = float(seen.lost + seen.doubled + seen.wrong)
    out = [
        Bound("TTFT error p99, ms", where, seen.ttft_error_p99_ms, 0.05),
        Bound("token error p99, ms", where, seen.token_error_p99_ms, 0.05),
        Bound("lost, doubled or wrong", where, wrong, 0.0),
    ]
    return [*out, Bound("send lag p99, ms", where, seen.send_lag_p99_ms, 1.0)]


def _cost(row: Row, other: Row, where: str) -> list[Bound]:
    share = 1 / 3 if row.cell.rate_rps <= 100 else 1 / 2
    return [
        Bound("CPU under load, us an event, at most `vllm bench`'s", where, row.load_us_per_event,
              other.load_us_per_event),
        Bound(f"CPU with start-up, us an event, at most {share:.2f} of `vllm bench`'s", where,
              row.total_us_per_event, share * other.total_us_per_event),
        Bound("memory, MB, at most a quarter of `vllm bench`'s", where, row.peak_rss_mb, other.peak_rss_mb / 4),
    ]  # fmt: skip


def markdown_bounds(found: Sequence[Bound]) -> str:
    """The bounds as a table."""
    return "\n".join(["| bound | cell | varcas | limit | |", "|---|---|--:|--:|---|", *map(str, found)])


@dataclass(frozen=True, slots=True)
class Knee:
    """The highest rate that a client kept, and the lowest that it did not; NaN where none was found.

    Attributes:
        client: which.
        kept_rps: the highest rate below.
        left_rps: the lowest that it did not keep.
        busy_cores: CPU time a second at the higher one of the two.
        why: it did not keep it.
    """

    client: str
    kept_rps: float
    left_rps: float
    busy_cores: float
    why: str


def keeps(row: Row) -> str:
    """Why a client did not keep its schedule; nothing if it did."""
    seen = row.figures
    if seen is None:
        return row.error or "failed"
    reasons = []
    if seen.send_lag_p99_ms > KNEE_LAG_MS:
        reasons.append(f"send lag p99 {_ms(seen.send_lag_p99_ms)} ms")
    if seen.ttft_error_p99_ms > KNEE_TTFT_MS:
        reasons.append(f"TTFT error p99 {_ms(seen.ttft_error_p99_ms)} ms")
    if seen.lost + seen.doubled + seen.wrong:
        reasons.append(f"{seen.lost} lost, {seen.doubled} doubled, {seen.wrong} wrong")
    return ", ".join(reasons)


def server_is_full(row: Row) -> bool:
    """The scripted server was so late that a higher rate would say nothing of the client."""
    return row.figures is not None and row.figures.server_late_p99_ms > SERVER_FULL_MS


def knee(client: str, rows: Sequence[Row]) -> Knee:
    """From all of a client's rows in step."""
    mine = [row for row in rows if row.cell.client == client and row.cell.mode == "step"]
    left = sorted((row for row in mine if keeps(row)), key=lambda row: row.cell.rate_rps)
    lowest_left = left[0].cell.rate_rps if left else math.inf
    kept = sorted((row for row in mine if row.cell.rate_rps < lowest_left), key=lambda row: row.cell.rate_rps)
    why = keeps(left[0]) if left else "not found: it kept all rates tried"
    if not left and kept and server_is_full(kept[-1]):
        why = "not found: the scripted server's own limit"
    return Knee(
        client,
        kept[-1].cell.rate_rps if kept else math.nan,
        lowest_left if left else math.nan,
        (left[:1] or kept[-1:] or [Row(Cell(client, "step", math.nan, 0), 0)])[0].load_cores,
        why,
    )


def next_probe(client: str, rows: Sequence[Row]) -> float | None:
    """Which rate to try next to find the knee: half as much again, or half; None once it lies between two."""
    found = knee(client, rows)
    if math.isnan(found.left_rps):
        done = math.isnan(found.kept_rps) or "server" in found.why
        return None if done else round(found.kept_rps * 1.5)
    if math.isnan(found.kept_rps):
        return found.left_rps / 2 if found.left_rps > 5 else None
    return round(math.sqrt(found.kept_rps * found.left_rps)) if found.left_rps > 1.6 * found.kept_rps else None


def markdown_knees(found: Sequence[Knee]) -> str:
    """The knees as a table."""
    lines = []
    for one in found:
        rates = [f"{rate:g}" if math.isfinite(rate) else "-" for rate in (one.kept_rps, one.left_rps)]
        lines.append(f"| {CLIENTS[one.client].name} | {' | '.join(rates)} | {one.busy_cores:.2f} | {one.why} |")
    head = ["| client, in step | kept, req/s | left, req/s | busy cores | by |", "|---|--:|--:|--:|---|"]
    return "\n".join([*head, *lines])


def machine() -> str:
    """Where this is run."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    return f"{os.cpu_count()} cores of {name}, Linux {platform.release()}, Python {sys.version.split()[0]}"


class Bench:
    """All cells of one call, one after the other.

    Attributes:
        rows: so far.
    """

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.rows: list[Row] = []
        self._args, self._work = args, work
        self._cores = Cores(tuple(sorted(os.sched_getaffinity(0))))
        self._tools = Tools(args.guidellm, args.tokenizer)
        self._deadline_s = time.monotonic() + args.minutes * 60
        os.sched_setaffinity(0, self._cores.server)

    def run(self, client: str, mode: str, rate_rps: float, seconds: float) -> None:
        """Runs a cell, unless time is up."""
        cell = Cell(client, mode, rate_rps, seconds)
        if client == "guidellm" and not self._args.guidellm.is_file():
            row = Row(cell, 0, error=f"not installed: {self._args.guidellm} (make .bench/guidellm)")
        elif time.monotonic() > self._deadline_s:
            row = Row(cell, 0, error=f"left out: {self._args.minutes:g} minutes are over")
        else:
            row = run_cell(cell, self._cores, self._tools, self._work / f"{len(self.rows):02d}-{client}-{mode}")
        self.rows.append(row)
        print(_line(row), file=sys.stderr, flush=True)
        self.save()

    def find_knee(self, client: str, probes: int, seconds: float) -> None:
        """Tries rates in step until the knee lies between two."""
        for _ in range(probes):
            rate_rps = next_probe(client, [row for row in self.rows if row.error is None])
            if rate_rps is None:
                return
            self.run(client, "step", rate_rps, seconds)
            if self.rows[-1].error is not None:  # nothing learnt: the next probe would be the same
                return

    def save(self) -> None:
        """Writes what there is: a call that is ended half-way has its rows."""
        found = {
            "machine": machine(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "rows": [row.as_dict() for row in self.rows],
            "bounds": [asdict(one) | {"met": one.met} for one in bounds(self.rows)],
        }
        self._args.json.parent.mkdir(parents=True, exist_ok=True)
        self._args.json.write_text(json.dumps(found, indent=1))


def run_all(bench: Bench, args: argparse.Namespace) -> list[Knee]:
    """Every cell, then the knees."""
    for rate_rps in args.rates:
        for mode in args.modes:
            for client in args.clients:
                if client != "varcas2" or rate_rps >= 200:
                    bench.run(client, mode, rate_rps, args.seconds)
    for client in args.clients:
        bench.find_knee(client, args.probes, args.probe_seconds)
    return [knee(client, bench.rows) for client in args.clients]


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few short cells, in some 3 minutes; no knee")
    parser.add_argument("--rates", type=lambda text: [float(one) for one in text.split(",")])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--clients", type=lambda text: text.split(","), default=list(CLIENTS))
    parser.add_argument("--seconds", type=float, help="of each cell's load (20; quick: 6)")
    parser.add_argument("--probes", type=int, help="most rates tried to find a client's knee (6; quick: 0)")
    parser.add_argument("--probe-seconds", type=float, default=8.0)
    parser.add_argument("--minutes", type=float, default=20.0, help="after these no cell is begun")
    parser.add_argument("--guidellm", type=Path, default=HERE.parent / ".bench" / "guidellm" / "bin" / "guidellm")
    parser.add_argument("--tokenizer", type=Path, default=HERE.parent / "models" / "tiny-llama")
    parser.add_argument("--json", type=Path, default=HERE.parent / ".bench" / "load.json")
    parser.add_argument("--keep", type=Path, help="keep each cell's files in this directory")
    args = parser.parse_args()
    args.rates = args.rates or ([200.0] if args.quick else [50.0, 100.0, 200.0])
    args.seconds = args.seconds or (6.0 if args.quick else 20.0)
    args.probes = args.probes if args.probes is not None else 0 if args.quick else 6
    if unknown := set(args.clients) - set(CLIENTS):
        parser.error(f"--clients: {', '.join(sorted(unknown))}: unknown; known: {', '.join(CLIENTS)}")
    return args


def exit_code(found: Sequence[Bound], *, is_partial: bool) -> int:
    """1 when a bound is missed, or was not measured by a run that was to measure all."""
    return 1 if any(one.met is False or (one.met is None and not is_partial) for one in found) else 0


def main() -> int:
    """Prints the tables; 1 when varcas misses a bound, and in a full run also when one was not measured."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    work = Path(tempfile.mkdtemp(prefix="bench-load-")) if args.keep is None else args.keep
    try:
        bench = Bench(args, work)
        knees = run_all(bench, args)
    finally:
        if args.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    found = bounds(bench.rows)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{machine()}; {today}; `{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`\n")
    print(markdown(bench.rows), markdown_knees(knees), markdown_bounds(found), sep="\n\n")
    return exit_code(found, is_partial=args.quick or set(args.clients) != set(CLIENTS))


if __name__ == "__main__":
    sys.exit(main())
