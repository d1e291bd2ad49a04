"""Schedules and prompts of every kind, hashed: `python -m tests.workload.goldens` prints the digests.

They are made with a server that counts a token a word, over a real socket. It is run by the tests, and by hand on other
machines and Pythons (NumPy, pydantic, PyYAML and pyarrow are all it needs).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from varcas.experiment import Arrival, Workload
from varcas.workload.profiles import PROFILES
from varcas.workload.prompts import fit_prompts
from varcas.workload.schedule import schedule
from varcas.workload.wire import Target

DATA = Path(__file__).parent / "data"
SHORT = {"profile": "chat-short", "seed": 7}
KINDS: dict[str, Workload] = {
    **{name: Workload(profile=name, rate_rps=4, seed=7) for name in PROFILES},
    "mixture": Workload(profile={"chat-short": 3, "rag": 1, "multi-turn": 1}, rate_rps=4, seed=7),
    "shared documents": Workload(
        profile="rag", rate_rps=4, seed=7, shared_prefix_tokens=1500, shared_prefixes=3, turns=2, think_s=1
    ),
    "constant": Workload(**SHORT, rate_rps=3, arrival="constant"),
    "gamma": Workload(**SHORT, rate_rps=4, arrival=Arrival(kind="gamma", burstiness=0.3)),
    "gamma, even": Workload(**SHORT, rate_rps=4, arrival=Arrival(kind="gamma", burstiness=4)),
    "ramp": Workload(**SHORT, rate_rps=1, arrival=Arrival(kind="ramp", to_rps=9)),
    "steps": Workload(**SHORT, arrival=Arrival(kind="steps", steps=[(0, 2), (10, 0), (20, 9)])),
    "closed": Workload(profile="multi-turn", seed=7, think_s=2, arrival=Arrival(kind="closed", users=3), duration_s=30),
    "azure": Workload(data=str(DATA / "azure.csv"), arrival="trace", seed=7, duration_s=10),
    "mooncake": Workload(data=str(DATA / "mooncake.jsonl"), arrival="trace", rate_rps=0.3, seed=7, duration_s=20),
    "sharegpt": Workload(data=str(DATA / "sharegpt.json"), rate_rps=1, seed=7),
    "plain": Workload(data=str(DATA / "plain.csv"), rate_rps=2, seed=7),
    "own": Workload(data=str(DATA / "own.jsonl"), rate_rps=1, seed=7),
}
GOLDENS = {
    "chat-short": "8e2222a0809d81b7",
    "chat-medium": "9a262008edc3f424",
    "chat-long": "12d98ac091d5aae6",
    "multi-turn": "86be56a1dbfc75f7",
    "shared-prefix": "4c000cbb05f3b603",
    "rag": "c953b840f8661aa9",
    "code": "bb05db1af1ea22c4",
    "mixture": "590e8a47f5a8725d",
    "shared documents": "b7c5013fc6296508",
    "constant": "814d6363df1eb44e",
    "gamma": "b0048c8ac657ab19",
    "gamma, even": "1ddb8128f78e7f5e",
    "ramp": "19ffda550cb70ac1",
    "steps": "0057ede0fcf49bb5",
    "closed": "e810be047044d82b",
    "azure": "347aa99fb85c1221",
    "mooncake": "24f83e5b0563d991",
    "sharegpt": "2240914e975b6b9d",
    "plain": "7d5df118b9f65d5c",
    "own": "aa16f693d11e299d",
}


class Words(BaseHTTPRequestHandler):
    """Counts a token a word, and five for the template."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        texts = [message["content"] for message in body["messages"]] if "messages" in body else [body["prompt"]]
        count = sum(len(text.split()) for text in texts) + 5 * ("messages" in body)
        data = json.dumps({"count": count, "max_model_len": 16384, "tokens": []}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


def digests(kinds: dict[str, Workload]) -> dict[str, str]:
    """A hash of each kind's requests and their words."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Words) as server, tempfile.TemporaryDirectory() as cache:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        target = Target("127.0.0.1", server.server_address[1], "words")
        try:
            return {name: digest(workload, target, Path(cache)) for name, workload in kinds.items()}
        finally:
            server.shutdown()
            thread.join()


def digest(workload: Workload, target: Target, cache: Path) -> str:
    """A hash of everything that is sent, and when."""
    requests = schedule(workload, start_s=0, duration_s=30, max_len=16384, stream="measure")
    assert len(requests) >= 5
    fitted = fit_prompts(target, requests, endpoint="chat", cache_dir=cache)
    text = json.dumps([[dataclasses.astuple(one.request), one.text, one.system] for one in fitted])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    print(json.dumps(digests(KINDS), indent=4))
