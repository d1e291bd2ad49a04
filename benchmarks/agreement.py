"""Whether varcas and `vllm bench serve` agree about a real vLLM: `python benchmarks/agreement.py [--quick]`.

Starts vLLM's CPU build on a tiny model with dummy weights, and sends it the same prompts at the same moments from one
and the other in turn (A B B A ...), several times. Prints, for each figure, both means over the repeats, their ratio
with its 95 % interval (Welch's t on logarithms), and whether they agree: a ratio within 3 %, and an interval that
reaches no further than 3 % from it. They differ where the ratio is further off and the interval does not hold 1; all
else is not told: more or longer repeats are needed. Exits 1 where they differ, and without `--quick` where it is not
told. Our figures are those of `varcas.metrics.summarise`, theirs are computed here from their requests' own times.

The client has the last core and the server all others: vLLM's processes spin, and a client among them reads its chunks
late. `--share-cores` leaves that out, to see what it does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from load_client import machine
from load_clients import Plan, environment, poisson_plan, read_varcas, read_vllm, varcas_load, vllm_bench
from load_process import run_watched
from load_truth import Claim, Claims
from scipy import stats

from varcas.engine.vllm import VllmServer
from varcas.metrics import summarise
from varcas.records import LoadResult, RequestRecord

ROOT = Path(__file__).resolve().parents[1]
ARGV = ["--model", "ignored", "--load-format", "dummy", "--max-model-len", "1024", "--max-num-seqs", "32"]
ARGV += ["--enforce-eager", "--block-size", "32", "--no-enable-prefix-caching"]
SERVER_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
BOUND = 0.03
TIMEOUT_S = 300.0
READY_S = 250.0
COMPARED = {
    "TTFT from the send, mean, ms": "the same; theirs ends at the role's chunk, microseconds before the token",
    "TTFT from the send, median, ms": "ours by nearest rank, theirs between the two in the middle",
    "TPOT, mean, ms": "the same: (last token - first) / (tokens - 1)",
    "E2E from the send, mean, ms": "the same: last token - send",
    "output tokens/s, their way": "tokens of good requests / (start to the last token), the drain included",
    "output tokens/s, our way": "tokens that came within the window / its length",
}
"""Figure to how the two define it."""
COLUMNS = (
    "ttft_sent_mean_ms", "ttft_sent_p50_ms", "tpot_mean_ms", "e2e_sent_mean_ms", "output_tokens_per_s_drained",
    "output_tokens_per_s",
)  # fmt: skip
"""Of `summarise`, in the order of `COMPARED`."""


@dataclass(frozen=True, slots=True)
class Run:
    """One load by one of them: what its requests' own times give, and its own report where it makes one."""

    figures: Mapping[str, float]
    reported: Mapping[str, float]
    send_lag_mean_ms: float
    num_ok: int


def our_figures(said: Claims, plan: Plan) -> Run:
    """What `summarise` makes of our requests."""
    start_s, lags_ms = _start_and_lags(said, plan)
    window_s = len(plan.at_s) / plan.rate_rps
    records = tuple(_record(claim, start_s, plan) for claim in said.claims)
    last_s = max(record.last_token_s or 0.0 for record in records)
    found = summarise(LoadResult(records, start_s, window_s, last_s - window_s, 0.0), {})
    values = {name: float(found[column]) for name, column in zip(COMPARED, COLUMNS, strict=True)}
    return Run(values, {}, float(np.mean(lags_ms)), int(found["num_completed"]))


def _record(claim: Claim, start_s: float, plan: Plan) -> RequestRecord:
    times_s = [float(one) for one in np.asarray(claim.times_s)]
    last_s = times_s[-1] - start_s
    return RequestRecord(
        index=claim.key,
        scheduled_s=plan.at_s[claim.key],
        sent_s=claim.sent_s - start_s,
        first_token_s=claim.first_s - start_s,
        last_token_s=last_s,
        end_s=last_s,
        scheduled_prompt_tokens=0,
        scheduled_output_tokens=plan.output_tokens,
        prompt_tokens=None,
        output_tokens=claim.num_tokens,
        token_offsets_s=tuple(one - claim.sent_s for one in times_s),
        token_counts=(1,) * len(times_s),
        finish_reason=None,
        error=None if claim.ok else "failed",
        http_status=None,
        conversation=claim.key,
        turn=0,
    )


def their_figures(said: Claims, plan: Plan) -> Run:
    """The same from what another client says of its requests, by formulas of its own."""
    good = [claim for claim in said.claims if claim.ok]
    times = [np.asarray(claim.times_s) for claim in good]
    start_s, lags_ms = _start_and_lags(said, plan)
    last_s = np.array([float(one[-1]) for one in times])
    first_s, sent_s = np.array([claim.first_s for claim in good]), np.array([claim.sent_s for claim in good])
    ttft, e2e = (first_s - sent_s) * 1e3, last_s - sent_s
    tpot = (last_s - first_s) / (np.array([claim.num_tokens for claim in good]) - 1)
    every = np.concatenate(times) - start_s
    window_s = len(plan.at_s) / plan.rate_rps
    values = (
        float(ttft.mean()),
        float(np.median(ttft)),
        float(tpot.mean() * 1e3),
        float(e2e.mean() * 1e3),
        sum(claim.num_tokens for claim in good) / float(every.max()),
        float((every < window_s).sum()) / window_s,
    )
    return Run(dict(zip(COMPARED, values, strict=True)), {}, float(np.mean(lags_ms)), len(good))


def _start_and_lags(said: Claims, plan: Plan) -> tuple[float, list[float]]:
    """The window's start, and how late each request was sent; of an unknown start, the latest that explains all."""
    since_s = {claim.key: claim.sent_s - plan.at_s[claim.key] for claim in said.claims}
    if said.due_from_first_s is None:
        due_s = {claim.key: claim.due_s for claim in said.claims if claim.due_s is not None}
        start_s = next(moment_s - plan.at_s[key] for key, moment_s in due_s.items())
    else:
        start_s = min(since_s.values())
    return start_s, [(one - start_s) * 1e3 for one in since_s.values()]


def run_varcas(server: VllmServer, plan: Plan, folder: Path, tokenizer: Path, cores: Sequence[int]) -> Run:
    """One load by varcas."""
    argv = varcas_load(plan, server.port, server.model_id, folder)
    run_watched(argv, environment({"OPENAI_API_KEY": server.api_key}), cores, folder / "log", TIMEOUT_S)
    return our_figures(read_varcas(plan, folder), plan)


def run_vllm(server: VllmServer, plan: Plan, folder: Path, tokenizer: Path, cores: Sequence[int]) -> Run:
    """One load by `vllm bench serve`."""
    argv = vllm_bench(plan, server.port, server.model_id, tokenizer, folder)
    env = environment({"OPENAI_API_KEY": server.api_key, "HF_HUB_OFFLINE": "1"})
    run_watched(argv, env, cores, folder / "log", TIMEOUT_S)
    found = their_figures(read_vllm(plan, folder), plan)
    report = json.loads((folder / "out.json").read_text())
    names = ("mean_ttft_ms", "median_ttft_ms", "mean_tpot_ms", "output_throughput", "duration")
    return Run(found.figures, {name: report[name] for name in names}, found.send_lag_mean_ms, found.num_ok)


TOOLS: dict[str, Callable[[VllmServer, Plan, Path, Path, Sequence[int]], Run]] = {
    "varcas": run_varcas,
    "vllm bench serve": run_vllm,
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of both; `ratio` is ours over theirs, with its 95 % interval."""

    name: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["agrees", "differs", "not told"]:
        """Whether the ratio is within the bound of 1, and known well enough to say so."""
        is_near = abs(self.ratio - 1) <= BOUND
        if not is_near and not self.low <= 1 <= self.high:
            return "differs"
        is_known = self.high - self.ratio <= BOUND and self.ratio - self.low <= BOUND
        return "agrees" if is_near and is_known else "not told"


def compare(name: str, ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Ratio of geometric means, with Welch's interval on logarithms."""
    a, b = np.log(ours), np.log(theirs)
    difference = float(a.mean() - b.mean())
    half = math.inf
    if len(a) > 1 and len(b) > 1:
        variances = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        both = sum(variances)
        half = 0.0
        if both > 0:
            freedom = both**2 / (variances[0] ** 2 / (len(a) - 1) + variances[1] ** 2 / (len(b) - 1))
            half = float(stats.t.ppf(0.975, freedom) * math.sqrt(both))
    edges = math.exp(difference - half), math.exp(difference + half)
    return Comparison(name, math.exp(a.mean()), math.exp(b.mean()), math.exp(difference), *edges)


def measure(args: argparse.Namespace, work: Path) -> dict[str, list[Run]]:
    """Runs both in turn against one server."""
    plan = poisson_plan(args.rate, args.seconds, args.tokens, args.words)
    cores = sorted(os.sched_getaffinity(0))
    if not args.share_cores:
        os.sched_setaffinity(0, cores[:-1] or cores)  # the server's, which inherits them
        cores = cores[-1:]
    runs: dict[str, list[Run]] = {name: [] for name in TOOLS}
    with VllmServer.start(ARGV, env=SERVER_ENV, model_path=str(args.tokenizer), log=work / "server.log") as server:
        server.wait_ready(READY_S)
        for number in range(-1, args.repeats):  # the first warms up, and is not counted
            order = list(TOOLS) if number % 2 else list(reversed(TOOLS))
            for name in order if number >= 0 else ["varcas"]:
                folder = work / f"{number}-{name.split()[0]}"
                folder.mkdir()
                run = TOOLS[name](server, plan, folder, args.tokenizer, cores)
                values = ", ".join(f"{value:.2f}" for value in run.figures.values())
                lag = f"{run.num_ok} good, lag {run.send_lag_mean_ms:.2f} ms"
                print(f"{name} {number}: {lag}, {values}", file=sys.stderr, flush=True)
                if number >= 0:
                    runs[name].append(run)
    return runs


def markdown(found: Sequence[Comparison]) -> str:
    """The table."""
    lines = [
        "| figure | varcas | `vllm bench serve` | ratio (95 %) | | definitions |",
        "|---|--:|--:|--:|---|---|",
    ]
    for one in found:
        verdict = "**differs**" if one.verdict == "differs" else one.verdict
        ratio = f"{one.ratio:.3f} ({one.low:.3f}-{one.high:.3f})"
        lines.append(f"| {one.name} | {one.ours:.2f} | {one.theirs:.2f} | {ratio} | {verdict} | {COMPARED[one.name]} |")
    return "\n".join(lines)


def main() -> int:
    """Prints the table; 1 when they differ, or when that is not told though it was to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 repeats of 10 s")
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--words", type=int, default=100, help="of each prompt")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "tiny-llama")
    parser.add_argument("--share-cores", action="store_true", help="client and server on all cores")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    args.seconds = args.seconds or (10.0 if args.quick else 25.0)
    args.repeats = args.repeats or (2 if args.quick else 5)
    with tempfile.TemporaryDirectory(prefix="bench-agree-") as work:
        runs = measure(args, Path(work))
    ours, theirs = runs["varcas"], runs["vllm bench serve"]
    found = [compare(name, *([run.figures[name] for run in arm] for arm in (ours, theirs))) for name in COMPARED]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{machine()}; {now}; {args.repeats} repeats of {args.seconds:g} s at {args.rate:g} requests/s\n")
    print(markdown(found))
    lags = [f"{name} {np.mean([one.send_lag_mean_ms for one in all_runs]):.2f}" for name, all_runs in runs.items()]
    print(f"\nMean send lag, ms: {'; '.join(lags)}")
    reported = {name: float(np.mean([one.reported[name] for one in theirs])) for name in theirs[0].reported}
    print("`vllm bench serve` itself reports " + ", ".join(f"{name} {value:.2f}" for name, value in reported.items()))
    if args.json:
        args.json.write_text(json.dumps({name: [one.figures for one in all_runs] for name, all_runs in runs.items()}))
    verdicts = {one.verdict for one in found}
    return 1 if "differs" in verdicts or ("not told" in verdicts and not args.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
