"""The documentation site is built strictly, and is quiet in a browser."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browsing import chromium, opened

ROOT = Path(__file__).parents[1]
ZENSICAL = Path(sys.executable).with_name("zensical")
pytestmark = pytest.mark.skipif(not ZENSICAL.exists(), reason="zensical is not installed (extra dev)")


def build(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ZENSICAL), "build", "--clean", "--strict"], cwd=directory, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", directory / "docs")
    shutil.copy(ROOT / "zensical.toml", directory)
    done = build(directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_every_page_is_built_and_stands_in_the_navigation(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in (site / "site").glob("*.html")}
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert {Path(name).stem for name in leaves(nav)} == pages


def leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from leaves(entry)


def test_a_broken_link_fails(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site / "docs", tmp_path / "docs")
    shutil.copy(site / "zensical.toml", tmp_path)
    (tmp_path / "docs" / "index.md").write_text("# varcas\n\n[nowhere](nowhere.md)\n")
    assert build(tmp_path).returncode != 0


@pytest.mark.parametrize("page", ["index.html", "peers.html", "architecture.html"])
def test_pages_are_quiet_and_fetch_nothing_from_elsewhere(site: Path, page: str) -> None:
    handler = functools.partial(Quiet, directory=str(site / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, chromium() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with opened(browser, f"{address}/{page}", viewport={"width": 390, "height": 844}) as seen:
            seen.page.wait_for_load_state("networkidle")
            assert [url for url in seen.requests if not url.startswith((address, "data:", "blob:"))] == []
            assert seen.complaints == []
            assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass
