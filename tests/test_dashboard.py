"""The dashboard in a real browser: named objectives, constraints, notes and artifacts are there to be seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browsing import chromium, opened
from tests.rows import experiment, failed, row
from varcas.study import Beside, dashboard_server


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "1.log").write_text("torch.OutOfMemoryError")
    (tmp_path / "report.html").write_text("<h1>the report</h1>")
    evil = "<img src=x onerror=alert(1)>"
    rows = [
        row(None, 100.5, number=0, ttft_p95_ms=400.0, constraints={"ttft_p95_ms": -0.2}),
        failed(8, number=1, log_path=str(tmp_path / "1.log"), failure_detail=f"CUDA out of memory {evil}",
               failure_hint=f"take less {evil}"),
        row(4, 130.25, number=2, ttft_p95_ms=900.0, constraints={"ttft_p95_ms": 0.8}, slo_met=False),
    ]  # fmt: skip
    beside = Beside("**better**: deploy it", (tmp_path / "report.html",))
    of = experiment(slo="{ttft_p95_ms: 500}")
    with dashboard_server(of, lambda: rows, 0, lambda: beside) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_people_see_what_came_of_it(address: str) -> None:
    with chromium() as browser, opened(browser, f"{address}/dashboard/studies/0") as seen:
        page = seen.page
        page.get_by_text("output_tokens_per_s").first.wait_for()
        page.get_by_text("report.html").first.wait_for()
        page.wait_for_function("document.querySelector('.js-plotly-plot')?.data?.length > 1")
        shown = page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].flatMap(p => p.data.map(t => t.name))")
        assert any("Infeasible" in (name or "") for name in shown), shown
        page.goto(f"{address}/dashboard/studies/0/note")
        page.get_by_text("better").first.wait_for()
        page.goto(f"{address}/dashboard/studies/0/trials?numbers=1")
        page.get_by_text("CUDA out of memory").first.wait_for()
        page.get_by_text("take less").first.wait_for()
        page.get_by_text("1.log").first.wait_for()
        assert page.locator("img[src=x]").count() == 0
        page.goto(f"{address}/dashboard/studies/0/trials?numbers=2")
        page.get_by_text("ttft_p95_ms is 900, the limit 500").first.wait_for()
        assert [words for words in seen.complaints if words.startswith(("error", "dialog"))] == []
        assert [url for url in seen.requests if not url.startswith((address, "data:", "blob:"))] == []
