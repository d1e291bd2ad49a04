"""The report as people open it: in a real browser, wide, on a phone, in the dark, on paper, by keyboard, scriptless."""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from markdown_it import MarkdownIt

from tests import rows
from tests.browsing import chromium, opened, violations
from tests.studies import experiment, write_study
from varcas.digest import digest
from varcas.errors import InputError
from varcas.experiment import load_experiment, parse_experiment
from varcas.page import experiment_yaml, figure, gather, markdown, write_report
from varcas.results import Results
from varcas.store import Store

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NUM_TRIALS = 1000
MOST_BYTES = 5_000_000
OPENS_MS = 2000
MOST_CPU_S = 15.0
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'></style>`|{{7*7}}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("big"), NUM_TRIALS)


@dataclass(frozen=True)
class Written:
    html: Path
    markdown: Path
    plots: list[Path]
    cpu_s: float


@pytest.fixture(scope="module")
def written(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    began_s = time.process_time()
    html, text, *plots = write_report(Results(results), None, tmp_path_factory.mktemp("report"))
    return Written(html, text, plots, time.process_time() - began_s)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose every text is hostile, and simulated."""
    directory = tmp_path_factory.mktemp("evil")
    of = experiment(model=json.dumps(EVIL), serve=json.dumps({"dtype": EVIL}))
    path = write_study(directory, 40, of, simulated=True, host=EVIL, driver_version=EVIL, engine_version=EVIL,
                       warnings=[EVIL], gpu_name=EVIL)  # fmt: skip
    return write_report(Results(path), None, directory / "report")[0]


# what is on it


def test_a_thousand_trials_are_one_small_file(written: Written) -> None:
    assert written.html.stat().st_size < MOST_BYTES
    text = written.html.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:,)""", text), "nothing is fetched"
    assert 'http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;;' in text


def test_the_recommendation_comes_first_and_every_part_is_there(written: Written) -> None:
    text = written.html.read_text()
    words = ["<h1>", "95 % interval", "Deploy these flags", "max_num_seqs = 128"]
    parts = ["confirmation", "progression", "trade-off", "trials", "importance", "batch-size", "latency", "time",
             "roofline", "failures", "pruned", "method", "reproduce"]  # fmt: skip
    places = [text.index(found) for found in [*words, *(f'id="{part}"' for part in parts), "experiment.yaml"]]
    assert places == sorted(places)
    for found in ("CUDA out of memory", "cache_type_without_units", "Resolved settings", "varcas sweep", "DEPLOY"):
        assert found in text, found


def test_it_is_written_in_seconds(written: Written) -> None:
    assert written.cpu_s < MOST_CPU_S
    assert {"confirmation.svg", "latency.svg", "roofline.svg"} <= {path.name for path in written.plots}
    assert all(path.read_text().startswith("<svg") for path in written.plots)


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = Results(write_study(tmp_path, 2))
    with pytest.raises(InputError, match="--output"):
        write_report(results, None, tmp_path / "file")


# in a browser


def test_it_opens_fast_quietly_and_alone(browser: Browser, written: Written) -> None:
    with opened(browser, written.html.as_uri()) as seen:
        loaded_ms = seen.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        painted_ms = seen.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0")
        assert max(loaded_ms, painted_ms) < OPENS_MS
        assert seen.complaints == []
        assert seen.requests == [written.html.as_uri()]


def test_every_figure_has_its_numbers_as_a_table(browser: Browser, written: Written) -> None:
    with opened(browser, written.html.as_uri()) as seen:
        figures = seen.page.locator("figure")
        assert figures.count() >= 8
        for one in figures.all():
            assert one.locator("svg").count() >= 1
            assert len(one.locator("[role=img]").first.get_attribute("aria-label") or "") > 20
            assert one.locator("table tbody tr").count() >= 1


@pytest.mark.parametrize(("scheme", "where"), [("light", "desk"), ("dark", "phone")])
def test_screen_readers_and_contrast(browser: Browser, small: Path, scheme: str, where: str) -> None:
    with opened(browser, small.as_uri(), color_scheme=scheme, **(PHONE if where == "phone" else {})) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert violations(seen.page) == []


def test_a_phone_scrolls_one_way(browser: Browser, written: Written) -> None:
    with opened(browser, written.html.as_uri(), **PHONE) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert seen.page.locator(".plot.narrow svg").first.is_visible()
        assert not seen.page.locator(".plot.wide.has-narrow").first.is_visible()
        sizes = seen.page.evaluate(
            "[...document.querySelectorAll('.narrow svg')].map(s => s.getBoundingClientRect().width / s.dataset.width)"
        )
        assert min(sizes) > 0.85, "text in figures is as large as it was drawn"


def test_keyboard(browser: Browser, written: Written) -> None:
    with opened(browser, written.html.as_uri()) as seen:
        page = seen.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.locator("section:has(#trials) > details > summary").press("Enter")
        head = page.locator("section:has(#trials) > details table th button", has_text="output_tokens_per_s")
        head.press("Enter")
        head.press("Enter")
        assert page.locator("section:has(#trials) th[aria-sort=descending]").count() == 1
        first, second = (
            float(
                page.locator("section:has(#trials) > details table tbody tr").nth(i).locator("td").nth(3).inner_text()
            )
            for i in (0, 1)
        )
        assert first >= second
        page.locator("section:has(#trials) .filter").last.fill("max_num_seqs=128")
        shown = page.locator("section:has(#trials) > details table tbody tr:visible")
        assert 0 < shown.count() < NUM_TRIALS / 4
        assert all("max_num_seqs=128" in text for text in shown.all_inner_texts())


def test_a_mark_says_what_it_is_and_leads_to_its_trial(browser: Browser, written: Written) -> None:
    with opened(browser, written.html.as_uri(), viewport={"width": 1200, "height": 900}) as seen:
        mark = seen.page.locator("section:has(#trade-off) .wide svg [aria-label^='trial ']").last
        mark.scroll_into_view_if_needed()
        mark.hover(force=True)
        label = mark.get_attribute("aria-label") or ""
        assert seen.page.locator("#tip").inner_text() == label
        mark.click(force=True)
        number = label.split(":")[0].removeprefix("trial ")
        assert seen.page.url.endswith(f"#t{number}")
        assert seen.page.locator(f"#t{number}").is_visible()


def test_without_scripts_nothing_is_missing(browser: Browser, written: Written) -> None:
    with opened(browser, written.html.as_uri(), java_script_enabled=False) as seen:
        assert seen.page.locator("h1").inner_text().endswith(".")
        assert seen.page.locator("figure svg").first.is_visible()
        assert seen.page.locator("table tbody tr").count() > NUM_TRIALS
        assert seen.page.locator("button, input").count() == 0


def test_it_prints(browser: Browser, small: Path) -> None:
    with opened(browser, small.as_uri(), color_scheme="dark") as seen:
        seen.page.emulate_media(media="print", color_scheme="dark")
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not seen.page.locator("nav").is_visible()
        assert len(seen.page.pdf(format="A4")) > 10_000


# strangers' text


def test_hostile_text_stays_text(browser: Browser, small: Path) -> None:
    with opened(browser, small.as_uri()) as seen:
        assert seen.complaints == []
        assert seen.requests == [small.as_uri()]
        assert seen.page.locator("script").count() == 1
        assert seen.page.locator("img").count() == 0
        assert EVIL in (seen.page.locator("body").text_content() or "")
        assert "49" not in seen.page.locator(".from").inner_text()
        harm = seen.page.evaluate("[...document.querySelectorAll('*')].filter(e => [...e.attributes].some("
                                  "a => a.name.startsWith('on') || /javascript:/i.test(a.value))).length")  # fmt: skip
        assert harm == 0


def test_hostile_text_stays_text_in_markdown(small: Path) -> None:
    text = small.with_name("report.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    assert [token.content for token in [*tokens, *inline] if token.type.startswith("html")] == []
    assert [token for token in inline if token.type in ("image", "link_open")] == []
    columns = [0]
    for token in tokens:
        columns = [*columns, 0] if token.type == "tr_open" else columns
        columns[-1] += token.type in ("td_open", "th_open")
    assert min(columns[1:]) >= 2, "no cell has broken a table"


def test_what_was_simulated_says_so_everywhere(small: Path) -> None:
    text = small.read_text()
    assert 'class="banner"' in text
    for part in re.findall(r"<(?:caption|figcaption|title)>(.*?)</", text):
        assert part.endswith("(SIMULATED)"), part
    for alt in re.findall(r'role="img" aria-label="(.*?)"', text):
        assert alt.endswith("(SIMULATED)"), alt
    assert text.count("SIMULATED: no server was measured") >= text.count("<svg") - text.count("only-wide")
    assert "(SIMULATED)" in small.with_name("report.md").read_text().splitlines()[0]


def test_no_password_is_on_the_page(tmp_path: Path) -> None:
    of = experiment(study="{trials: 4, storage: 'postgresql://me:hunter2@db/optuna'}")
    evidence = gather(Results(write_study(tmp_path, 4, of)), None)
    sections = digest(evidence)
    assert "postgresql://[redacted]@db/optuna" in markdown(evidence, sections)
    assert "hunter2" not in repr(sections)


# phases


@pytest.fixture
def journey(tmp_path: Path) -> Results:
    """Two phases: the first finds more sequences, the second nothing better, and one flag that fails."""
    of = rows.experiment()
    with Store(tmp_path / "results") as store:
        for number, phase in enumerate(("easy", "spec")):
            e = of.model_copy(update={"name": f"j.{phase}"})
            began = datetime.datetime(2026, 11, 24, number, tzinfo=datetime.UTC)
            told: dict[str, Any] = {"study": e.name, "started_at": began}
            better = 130.0 if phase == "easy" else 90.0
            made = [
                rows.row(None, 100.0, **told),
                rows.row(8, better, **told),
                rows.failed(4, "kv_cache_too_small", **told),
            ]
            if phase == "easy":
                made += [*rows.confirm(None, 100.0, 101.0, 99.0, **told), *rows.confirm(8, 120.0, 121.0, 119.0, **told)]
            for found in made:
                store.append(found)
            store.save_study(e.name, {"fingerprint": {}, "experiment": json.loads(e.model_dump_json())})
    return Results(tmp_path / "results")


def test_a_study_in_phases_has_a_table_of_them_and_a_script_each(journey: Results, tmp_path: Path) -> None:
    assert journey.phases("j") == ["j.easy", "j.spec"]
    assert journey.phases("j.easy") == []
    paths = write_report(journey, "j", tmp_path / "report")
    scripts = {path.name: path.read_text() for path in paths if path.suffix == ".sh"}
    assert set(scripts) == {"start_vllm.sh", "start_vllm_easy.sh", "start_vllm_spec.sh", "start_vllm_optimized.sh"}
    assert "--max-num-seqs 8" in scripts["start_vllm_optimized.sh"]
    assert "--max-num-seqs" not in scripts["start_vllm.sh"]
    text = (tmp_path / "report" / "report.md").read_text()
    easy, spec = (
        next(line for line in text.splitlines() if line.startswith(f"| {name} |")) for name in ("easy", "spec")
    )
    assert "max_num_seqs = 8" in easy
    assert "+20.0%" in easy
    assert "| better |" in easy
    assert "| nothing |" in spec
    assert "| baseline best |" in spec
    assert "max_num_seqs=4: kv_cache_too_small: words" in spec
    found = journey.deployment("j")
    assert found is not None
    assert found.study == "j.easy", "the last phase that beat what it began from"


# pieces


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_experiment_on_the_page_is_the_one_that_was_run(path: Path) -> None:
    e = load_experiment(path)
    assert parse_experiment(experiment_yaml(e)).model_dump() == e.model_dump()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        (98765.4, "98,765"),
        (6.5e13, "6.5e+13"),
        ("a", "a"),
    ],
)
def test_cells_are_readable(value: Any, text: str) -> None:
    assert figure(value) == text
