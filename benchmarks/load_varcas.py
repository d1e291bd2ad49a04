"""varcas's client as a program: `python benchmarks/load_varcas.py PLAN OUT --port N [--clients 1]`.

PLAN and OUT are what `load_clients.py` writes and reads: JSON; in OUT, a line of it, then every token's moment as
float64. The server's key is taken from OPENAI_API_KEY. Imports no more than a caller of `Load` needs: start-up is
measured too.
"""

from __future__ import annotations

import argparse
import json
import os
from array import array
from pathlib import Path
from typing import Any

from varcas.records import LoadResult, Prompted, ScheduledRequest
from varcas.workload.driver import Load
from varcas.workload.wire import Target

PROMPT_TOKENS = 16
DRAIN_S = 60.0


def main() -> None:
    """Runs one load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="truth")
    parser.add_argument("--clients", type=int, default=1)
    args = parser.parse_args()
    plan = json.loads(args.plan.read_text())
    with Load.start(args.out.with_suffix(".log"), args.out.parent / "varcas", args.clients) as load:
        result = load.run(
            Target("127.0.0.1", args.port, args.model, os.environ.get("OPENAI_API_KEY")),
            _requests(plan),
            duration_s=plan["at_s"][-1] + 0.1,
            max_drain_s=DRAIN_S,
            cache_salt=None,
            sampling={},
            endpoint="chat",
            stall_timeout_s=30.0,
            cancelled=lambda: False,
            alive=lambda: True,
        )
    _write(result, args.out)


def _requests(plan: dict[str, Any]) -> list[Prompted]:
    return [
        Prompted(ScheduledRequest(index, at_s, PROMPT_TOKENS, plan["output_tokens"], index, index), prompt)
        for index, (at_s, prompt) in enumerate(zip(plan["at_s"], plan["prompts"], strict=True))
    ]


def _write(result: LoadResult, path: Path) -> None:
    rows, times_s = [], array("d")
    for record in result.records:
        sent_s = record.sent_s or 0.0
        rows.append([record.index, record.scheduled_s, record.sent_s, record.output_tokens, record.error, len(times_s)])
        times_s.extend(sent_s + offset_s for offset_s in record.token_offsets_s)
    head = {
        "t0_s": result.t0_monotonic_s,
        "rows": rows,
        "kernel_stamped_frac": result.kernel_stamped_frac,
        "client_cpu_frac": result.client_cpu_frac,
    }
    with path.open("wb") as file:
        file.write(json.dumps(head).encode() + b"\n")
        times_s.tofile(file)


if __name__ == "__main__":
    main()
