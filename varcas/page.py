"""`varcas report`: a study as one HTML page that needs nothing else, and as Markdown.

Model names, flags and log lines are strangers' text: Jinja2 escapes all of it, and the page's own policy lets no script
run but the one that it holds, and nothing be fetched.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import html
import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup

from varcas import __version__
from varcas.digest import Cell, Code, Evidence, Section, Step, Table, advice, changes, confidence, digest, facts, wanted
from varcas.engine.failures import redact
from varcas.errors import InputError
from varcas.experiment import Experiment
from varcas.export import export, file_name, recommended, write_file
from varcas.limits import roofline_report
from varcas.limits_answer import Roofline
from varcas.plots import Drawn, dark_shades, draw
from varcas.records import TrialRow
from varcas.report import Recommendation
from varcas.results import Results

HTML_NAME, MARKDOWN_NAME, PLOTS = "report.html", "report.md", "plots"
NUMBER_OF_WORDS = {True: "yes", False: "no"}


def write_report(opened: Results, study: str | None = None, directory: Path | None = None) -> list[Path]:
    """Writes `report.html`, `report.md` and `plots/` of a study, and returns the files, these two first.

    Args:
        opened: the results that hold it.
        study: its name; None is the only one there. Of an experiment with phases the page is of the phase that decides,
            with a table of all, and the start script of each stands beside it.
        directory: where to; None: beside the study's start scripts.

    Raises:
        InputError: no such study, or a directory that cannot be written.
    """
    name = opened.experiment(study).name
    whole = study if study and opened.phases(study) else None
    to = directory or opened.directory_of(whole or name)
    with _writing(to):
        (to / PLOTS).mkdir(parents=True, exist_ok=True)
    texts = _texts(gather(opened, name))
    with _writing(to):
        for file, text in texts.items():
            (to / file).write_text(text, encoding="utf-8")
    scripts = opened.phase_deployments(whole) if whole else []
    for made in scripts:
        write_file(export(made, "sh"), to / file_name("sh", made.role), "sh")
    return [to / file for file in (*texts, *(file_name("sh", made.role) for made in scripts))]


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--output: {directory}: cannot be written ({error.strerror}). Give another directory."
        ) from error


def _texts(evidence: Evidence) -> dict[str, str]:
    """Every file of the report by its name."""
    sections = digest(evidence)
    drawings = _drawings(sections, evidence.answer.simulated)
    texts = {HTML_NAME: page(evidence, sections, drawings), MARKDOWN_NAME: markdown(evidence, sections)}
    return texts | {f"{PLOTS}/{name}.svg": drawn.plain for name, drawn in drawings.items()}


def gather(opened: Results, study: str | None) -> Evidence:
    """All that a report is made of."""
    experiment = opened.experiment(study)
    rows, answer = opened.trials(experiment.name), opened.recommend(experiment.name)
    shown = wanted(rows, experiment, answer)
    roofline, why = _roofline(experiment, rows, opened.path)
    return Evidence(
        experiment=experiment,
        rows=rows,
        answer=answer,
        requests={row.trial_id: opened.requests(row) for row in shown},
        samples={row.trial_id: opened.samples(row) for row in shown},
        roofline=roofline,
        no_roofline=why,
        codes=_codes(experiment, rows, opened.path),
        steps=_steps(opened, experiment.name),
    )


def _steps(opened: Results, name: str) -> tuple[Step, ...]:
    """The phases that a study is one of."""
    whole = name.rpartition(".")[0]
    return tuple(
        Step(phase.removeprefix(f"{whole}."), answer, _deployed(opened, phase, answer))
        for phase in (opened.phases(whole) if whole else ())
        for answer in (opened.recommend(phase),)
    )


def _deployed(opened: Results, phase: str, answer: Recommendation) -> TrialRow | None:
    return Evidence(opened.experiment(phase), opened.trials(phase), answer).deployed


def _roofline(experiment: Experiment, rows: Sequence[TrialRow], path: Path) -> tuple[Roofline | None, str]:
    """The roofline of the GPU that was measured, or why there is none."""
    hosts = sorted({row.host for row in rows if row.host})
    on_cpu = experiment.hardware.gpu == "cpu" or (
        experiment.hardware.gpu == "auto" and not any(r.gpu_name for r in rows)
    )
    if on_cpu and hosts != [socket.gethostname()]:
        return None, f"The CPU of {', '.join(hosts) or 'the host'} cannot be probed from here: no roofline."
    versions = {row.engine_version for row in rows if row.engine_version}
    try:
        version = versions.pop() if len(versions) == 1 else None
        names = ("cpu",) if on_cpu else ()
        return roofline_report(experiment, names, results=path, engine_version=_release(version)), ""
    except InputError as error:
        return None, f"No roofline: {error}"


def _release(version: str | None) -> str | None:
    """`0.32.0` of `0.32.0+cpu`, None of what is no version."""
    found = re.match(r"\d+(\.\d+)+", version or "")
    return found[0] if found else None


def _codes(experiment: Experiment, rows: Sequence[TrialRow], path: Path) -> tuple[Code, ...]:
    name = experiment.name
    commands = [
        "varcas sweep experiment.yaml    # the file below; measures only what these results lack",
        f"varcas recommend {name} --results {path}",
        f"varcas show 0 {name} --results {path}    # any trial's number",
        f"varcas export {name} --results {path} --format compose    # or sh, k8s, systemd, vllm-yaml, json",
    ]
    found = recommended(rows, experiment)
    script = [Code("The start script of what is recommended", export(found, "sh"))] if found else []
    codes = [Code("Commands", "\n".join(commands)), Code("experiment.yaml", experiment_yaml(experiment)), *script]
    return tuple(Code(code.title, redact(code.text)) for code in codes)


def experiment_yaml(experiment: Experiment) -> str:
    """An experiment as a file: what differs from the defaults."""
    kept = json.loads(experiment.model_dump_json(exclude_defaults=True))
    text: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)
    return text


# ---- HTML


def page(evidence: Evidence, sections: Sequence[Section], drawings: Mapping[str, Drawn]) -> str:
    """The whole page; `drawings` are its figures by name."""
    answer = evidence.answer
    shades = ";".join(f"{name}:{colour}" for name, colour in dark_shades().items())
    css, js = _file("report.css").replace("DARK", shades), _file("report.js")
    return _template().render(
        answer=answer,
        sections=sections,
        drawings={name: _marked_up(drawn) for name, drawn in drawings.items()},
        facts=facts(answer),
        changes=changes(answer),
        start=Code("The command", redact(answer.command or "")),
        headline=answer.headline[:1].upper() + answer.headline[1:],
        verdict=answer.verdict.replace("_", " "),
        advice=advice(answer),
        confidence=confidence(answer),
        mark=" (SIMULATED)" if answer.simulated else "",
        css=Markup(css),  # noqa: S704
        js=Markup(js),  # noqa: S704
        policy=_policy(css, js),
        version=__version__,
        now=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("varcas"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["figure"] = figure
    environment.globals["name_of"] = name_of
    return environment.get_template("report.html.j2")


def _file(name: str) -> str:
    return resources.files("varcas").joinpath("templates", name).read_text(encoding="utf-8")


def _drawings(sections: Sequence[Section], simulated: bool) -> dict[str, Drawn]:
    """Each figure by the name that `name_of` gives it; Vega has escaped the texts in it."""
    return {
        name_of(section, index): draw(shown, f"f{name_of(section, index)}", simulated=simulated)
        for section in sections
        for index, shown in enumerate(section.figures)
    }


def name_of(section: Section, index: int) -> str:
    """Of a section's figure: `latency`, `roofline-2`."""
    return section.key if index == 0 else f"{section.key}-{index + 1}"


def _marked_up(drawn: Drawn) -> dict[str, Markup | None]:
    narrow = None if drawn.narrow is None else Markup(drawn.narrow)  # noqa: S704
    return {"wide": Markup(drawn.wide), "narrow": narrow}  # noqa: S704


def _policy(css: str, js: str) -> str:
    """What the page may do: its own style and script, nothing else, nothing from anywhere."""

    def digest_of(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest_of(css)}'; script-src 'sha256-{digest_of(js)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def figure(found: Cell) -> str:
    """A cell as people read it: 4 digits of a fraction, thousands with commas."""
    if found is None:
        return "–"
    if isinstance(found, bool):
        return NUMBER_OF_WORDS[found]
    if isinstance(found, str):
        return found
    if isinstance(found, int):
        return f"{found:,}"
    return f"{found:,.0f}" if abs(found) >= 1000 and abs(found) < 1e9 else f"{found:.4g}"


# ---- Markdown


def markdown(evidence: Evidence, sections: Sequence[Section]) -> str:
    """The same in Markdown: tables in place of figures."""
    answer = evidence.answer
    mark = " (SIMULATED)" if answer.simulated else ""
    lines = [f"# {_escaped(answer.study)}: {answer.verdict.replace('_', ' ')}{mark}", ""]
    lines += ["**SIMULATED: no server was measured for these numbers.**", ""] if answer.simulated else []
    lines += [f"**{_escaped(answer.headline[:1].upper() + answer.headline[1:])}.**", ""]
    lines += [f"{advice(answer)} {confidence(answer)}", ""]
    lines += [
        f"{_escaped(answer.model)} on {_escaped(answer.gpu or 'CPU')}, vLLM {_escaped(answer.engine_version or '?')}.",
        "",
    ]
    lines += ["Change against the baseline:", "", *(f"- {_escaped(change)}" for change in changes(answer)), ""]
    lines += _table_lines(facts(answer), mark)
    lines += _code_lines(Code("The command", redact(answer.command))) if answer.command else []
    lines += [f"- Warning: {_escaped(warning)}" for warning in answer.warnings]
    for section in sections:
        lines += ["", f"## {section.title}", "", *(_escaped(words) + "\n" for words in section.words)]
        for table in (*(shown.table for shown in section.figures), *section.tables, *section.folded):
            lines += _table_lines(table, mark)
        for code in section.codes:
            lines += _code_lines(code)
    lines += ["", f"Written by varcas {__version__}."]
    return "\n".join(lines) + "\n"


def _table_lines(table: Table, mark: str) -> list[str]:
    head = "| " + " | ".join(map(_escaped, table.columns)) + " |"
    rule = "|" + "---|" * len(table.columns)
    rows = ["| " + " | ".join(_escaped(figure(found)) for found in row) + " |" for row in table.rows]
    note = [_escaped(table.note), ""] if table.note else []
    return [f"**{_escaped(table.title)}{mark}**", "", head, rule, *rows, "", *note]


def _code_lines(code: Code) -> list[str]:
    """A block whose fence is longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`+", code.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["", f"**{_escaped(code.title)}**", "", fence, code.text.rstrip("\n"), fence, ""]


def _escaped(text: str) -> str:
    """Text that stays text in Markdown, on one line."""
    plain = " ".join(html.escape(text, quote=False).splitlines())
    return re.sub(r"([\\`*\[\]|~#!])", r"\\\1", plain)
