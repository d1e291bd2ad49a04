"""The figures of a report, as SVG that follows the page: its colours in light and dark, wide and narrow.

Greys and one accent; shapes and dashes tell apart what colour tells apart. Each mark carries a description, which the
page shows when it is pointed at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from varcas.digest import Figure
from varcas.export import SIMULATED
from varcas.pictures import FONT, VEGA_LITE, roofline_chart

Rows = Sequence[dict[str, Any]]
WIDE, NARROW = 760, 310
"""Widths in pixels; the page shows the one that fits."""
NARROW_AXES = 4
INK, FAINT, GRID, ACCENT = "#1a1a1a", "#9a9a9a", "#e4e4e4", "#0b62a4"
ROLES = ["baseline", "recommended", "winner"]
SHORT_LABEL = 90


@dataclass(frozen=True, slots=True)
class Drawn:
    """One figure as SVG.

    Attributes:
        wide: for the page.
        narrow: for a phone; None where there is but one.
        plain: for a file of its own, on white.
    """

    wide: str
    narrow: str | None
    plain: str


def draw(figure: Figure, name: str, *, simulated: bool = False) -> Drawn:
    """Draws a figure.

    Args:
        figure: what to draw.
        name: makes the ids within the SVG unique on its page.
        simulated: some of its numbers were not measured.
    """
    wide = _svg(figure, WIDE, simulated)
    narrow = None if figure.kind in FIXED else themed(_svg(figure, NARROW, simulated), f"{name}n")
    return Drawn(themed(wide, name), narrow, _on_white(wide))


def _svg(figure: Figure, width: int, simulated: bool) -> str:
    held = Held()
    chart = CHARTS[figure.kind](figure.data, width, held)
    if simulated and chart.title is alt.Undefined:
        chart = chart.properties(title=SIMULATED)
    spec = chart.to_dict(validate=False)
    spec["datasets"] = spec.get("datasets", {}) | held.datasets
    drawn: str = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    return drawn


def _on_white(svg: str) -> str:
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)


# ---- the page's colours

_COLOUR = re.compile(r'(fill|stroke)="(#[0-9a-fA-F]{6}|#[0-9a-fA-F]{3}|black|white|rgb\([^)]*\))"')
_LONG = re.compile(r"-?\d+\.\d{3,}")
_GEOMETRY = re.compile(r'(?<= )(d|transform|x|y|x1|y1|x2|y2|width|height)="([^"]*)"')


def themed(svg: str, name: str) -> str:
    """An SVG as the page holds it: greys as variables, ids of its own, no size but its shape, short numbers."""
    svg = _COLOUR.sub(_variable, svg)
    svg = re.sub(r'(\bid="|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r' style="[^"]*"', "", svg)  # the page's policy allows no styles but its own
    svg = _GEOMETRY.sub(lambda m: f'{m[1]}="{_LONG.sub(lambda n: f"{float(n[0]):.2f}", m[2])}"', svg)
    width = re.search(r'<svg[^>]* width="([\d.]+)"', svg)
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+" height="[\d.]+"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg data-width="{float(width[1]):.0f}"' if width else "<svg", 1)


def _variable(found: re.Match[str]) -> str:
    red, green, blue = _rgb(found[2])
    if found[2].lower() == ACCENT:
        return f'{found[1]}="var(--accent,{ACCENT})"'
    if max(red, green, blue) - min(red, green, blue) > 8:
        return found[0]
    return f'{found[1]}="var(--g{shade(red)},#{red:02x}{green:02x}{blue:02x})"'


def _rgb(colour: str) -> tuple[int, int, int]:
    if colour in ("black", "white"):
        return (0, 0, 0) if colour == "black" else (255, 255, 255)
    if colour.startswith("rgb"):
        red, green, blue = (int(float(part)) for part in re.findall(r"[\d.]+", colour)[:3])
        return red, green, blue
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)


def shade(level: int) -> int:
    """A grey's name: its lightness in steps of 4 %."""
    return round(level / 255 * 25) * 4


def dark_shades() -> dict[str, str]:
    """Variable of each grey to its colour on a dark page: black on white becomes light on dark."""
    shades = {f"--g{name}": f"hsl(210 6% {90 - 0.81 * name:.0f}%)" for name in range(0, 97, 4)}
    return shades | {"--g100": "var(--paper)"}


# ---- charts


class Held:
    """The data of one figure, beside its charts: Altair copies what stands within them at every step."""

    def __init__(self) -> None:
        self.datasets: dict[str, list[dict[str, Any]]] = {}

    def chart(self, rows: Rows) -> alt.Chart:
        """A chart of these rows."""
        name = f"d{len(self.datasets)}"
        self.datasets[name] = list(rows)
        return alt.Chart(alt.NamedData(name=name))


def _finished(chart: Any) -> Any:
    axis = {"labelFontSize": 11, "titleFontSize": 12, "labelColor": INK, "titleColor": INK, "titleFontWeight": "normal",
            "gridColor": GRID, "domainColor": FAINT, "tickColor": FAINT}  # fmt: skip
    return (
        chart.configure(font=FONT, background="transparent", padding=4)
        .configure_view(stroke=None)
        .configure_axis(**axis)
        .configure_legend(labelFontSize=11, titleFontSize=11, labelColor=INK, titleColor=INK, orient="bottom")
        .configure_header(labelFontSize=12, labelColor=INK, title=None, labelAnchor="start")
        .configure_title(fontSize=12, color=INK, anchor="start")
    )


def starts(data: tuple[Rows, str], width: int, held: Held) -> Any:
    """One mark a fresh start, one thick line at each arm's mean."""
    rows, metric = data
    base = held.chart([row | {"label": f"{row['arm']}, start {row['start']}: {row['value']:.4g}"} for row in rows])
    x = alt.X("value:Q", title=metric, scale=alt.Scale(zero=False, padding=20))
    y = alt.Y("arm:N", title=None, sort=["baseline", "winner"])
    fill = alt.condition("datum.arm == 'winner'", alt.value(ACCENT), alt.value("#ffffff"))
    marks = base.mark_point(size=90, stroke=INK, opacity=1, strokeWidth=1.2)
    means = base.mark_tick(thickness=3, size=34, color=INK).encode(
        x=alt.X("mean(value):Q", title=metric, scale=alt.Scale(zero=False, padding=20)), y=y
    )
    layers = alt.layer(marks.encode(x=x, y=y, fill=fill, description="label:N"), means)
    return _finished(layers.properties(width=width - 70, height=110))


def history(data: tuple[Rows, str], width: int, held: Held) -> Any:
    """The objective of each trial, and the best so far as a line of steps."""
    rows, metric = data
    x = alt.X("trial:Q", title="trial", axis=alt.Axis(format="d", tickMinStep=1))
    y = alt.Y("value:Q", title=metric)
    base = held.chart([row for row in rows if row["value"] is not None])
    looks = {"ok": ("circle", FAINT), "saturated": ("circle", "#ffffff"), "misses the SLO": ("cross", FAINT)}
    names = [name for name in looks if any(row["outcome"] == name for row in rows)]
    shape = alt.Shape("outcome:N", title=None, scale=alt.Scale(domain=names, range=[looks[name][0] for name in names]))
    fill = alt.Fill("outcome:N", title=None, scale=alt.Scale(domain=names, range=[looks[name][1] for name in names]))
    marks = base.mark_point(size=34, stroke=INK, strokeWidth=0.7, opacity=1)
    step = held.chart([row for row in rows if row["best"] is not None]).mark_line(
        interpolate="step-after", color=ACCENT, strokeWidth=2
    )
    layers = alt.layer(
        step.encode(x=x, y=alt.Y("best:Q", title=metric)),
        marks.encode(x=x, y=y, shape=shape, fill=fill, description="label:N"),
    )
    return _finished(layers.properties(width=width - 60, height=220))


def front(data: tuple[Rows, str, str], width: int, held: Held) -> Any:
    """Configurations by two metrics; what nothing beats is joined."""
    rows, x_name, y_name = data
    x = alt.X("x:Q", title=x_name, scale=alt.Scale(zero=False, nice=True))
    y = alt.Y("y:Q", title=y_name, scale=alt.Scale(zero=False, nice=True))
    others = [row for row in rows if not row["role"]]
    named = [row for row in rows if row["role"]]
    tones = [row | {"tone": "#ffffff" if row["saturated"] else INK if row["front"] else FAINT} for row in others]
    marks = (
        held.chart(tones)
        .mark_circle(size=40, stroke=INK, strokeWidth=0.6, opacity=1)
        .encode(x=x, y=y, fill=alt.Fill("tone:N", scale=None), description="label:N")
    )
    line = held.chart([row for row in rows if row["front"]]).mark_line(color=INK, strokeWidth=1.2, strokeDash=[4, 3])
    roles = held.chart(named).encode(x=x, y=y)
    domain = [role for role in ROLES if any(row["role"] == role for row in named)]
    shapes = {"baseline": "square", "recommended": "diamond", "winner": "triangle-up"}
    shape = alt.Shape(
        "role:N", title=None, legend=None, scale=alt.Scale(domain=domain, range=[shapes[d] for d in domain])
    )
    stars = roles.mark_point(size=150, stroke=INK, filled=True, opacity=1, strokeWidth=1.2).encode(
        shape=shape,
        fill=alt.condition("datum.role == 'recommended'", alt.value(ACCENT), alt.value("#ffffff")),
        description="label:N",
    )
    words = roles.mark_text(dy=-13, fontSize=11, color=INK).encode(text="role:N")
    layers = alt.layer(line.encode(x=x, y=y), marks, stars, words)
    return _finished(layers.properties(width=width - 60, height=max(240, width // 2)))


def parallel(data: tuple[Rows, Rows, list[str]], width: int, held: Held) -> Any:
    """A line a configuration over the flags and the objective."""
    lines, ticks, axes = data
    metric = axes[-1]
    shown = axes if width == WIDE else [*axes[:-1][:NARROW_AXES], metric]
    points = [row for row in lines if row["axis"] in shown]
    texts = [row for row in ticks if row["axis"] in shown]
    many = sum(row["axis"] == metric for row in lines)
    axis = alt.Axis(labelAngle=-25, labelLimit=150, domain=False, ticks=False)
    x = alt.X("axis:N", sort=shown, title=None, axis=axis, scale=alt.Scale(type="point", padding=0.3))
    y = alt.Y("at:Q", title=None, axis=None, scale=alt.Scale(domain=[0, 1]))
    room = (width - 40) / max(len(shown), 1)

    def strokes(rows: Rows, **mark: Any) -> Any:
        return held.chart(rows).mark_line(**mark).encode(x=x, y=y, detail="trial:N", description="label:N")

    rules = held.chart([{"axis": axis} for axis in shown]).mark_rule(color=FAINT).encode(x=x)
    plain = strokes([r for r in points if not r["role"]], strokeWidth=1, opacity=max(0.12, min(0.8, 40 / max(many, 1))))
    shade_of = alt.Color("best:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=["#c8c8c8", INK]))
    base = strokes([r for r in points if r["role"] == "baseline"], strokeWidth=2.2, color=INK, strokeDash=[6, 3])
    best = strokes([r for r in points if r["role"] not in ("", "baseline")], strokeWidth=3, color=ACCENT)
    labels = held.chart(texts).encode(x=x, y=y, text="text:N")
    halo = labels.mark_text(fontSize=10, align="left", dx=4, limit=room - 6, stroke="#ffffff", strokeWidth=3)
    words = labels.mark_text(fontSize=10, align="left", dx=4, limit=room - 6, color=INK)
    layers = alt.layer(rules, plain.encode(color=shade_of), base, best, halo, words)
    return _finished(layers.properties(width=width - 20, height=280))


def importance(data: Rows, width: int, held: Held) -> Any:
    """A bar a flag."""
    rows = [row | {"words": f"{row['share']:.0%}"} for row in data]
    base = held.chart(rows).encode(
        y=alt.Y("flag:N", sort=None, title=None, axis=alt.Axis(labelLimit=width // 2, ticks=False)),
        x=alt.X("share:Q", title="share of the variance", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
    )
    bars = base.mark_bar(color=FAINT, stroke=INK, strokeWidth=0.6).encode(description="words:N")
    return _finished(alt.layer(bars, base.mark_text(align="left", dx=4, color=INK).encode(text="words:N")).properties(
        width=width - min(220, width // 2), height=alt.Step(24)))  # fmt: skip


def batch(data: Rows, width: int, held: Held) -> Any:
    """A panel a metric over `max_num_seqs`, by doublings."""
    seqs = [row["max_num_seqs"] for row in data]
    panels, span = [], [min(seqs), max(seqs)]
    for name in dict.fromkeys(row["metric"] for row in data):
        base = held.chart([row for row in data if row["metric"] == name]).encode(
            x=alt.X(
                "max_num_seqs:Q",
                scale=alt.Scale(type="log", base=2, domain=span, nice=False),
                axis=alt.Axis(format="d"),
            ),
            y=alt.Y("value:Q", title=name),
        )
        points = base.mark_point(filled=True, size=60, color=ACCENT, opacity=1).encode(description="label:N")
        panels.append(
            alt.layer(base.mark_line(color=INK, strokeWidth=1.4), points).properties(width=width - 70, height=130)
        )
    return _finished(alt.vconcat(*panels))


def cdf(data: Rows, width: int, held: Held) -> Any:
    """A panel a latency: the share of requests that waited at most so long."""
    arms = list(dict.fromkeys(row["arm"] for row in data))
    colours = [INK if arm == "baseline" else ACCENT for arm in arms]
    dashes = [[6, 3] if arm == "baseline" else [1, 0] if arm == arms[-1] else [2, 2] for arm in arms]
    panels = []
    for name in dict.fromkeys(row["latency"] for row in data):
        base = held.chart([row for row in data if row["latency"] == name])
        line = base.mark_line(interpolate="step-after", strokeWidth=1.8).encode(
            x=alt.X("ms:Q", title=f"{name}, ms", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~s")),
            y=alt.Y("share:Q", title="share", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", tickCount=5)),
            color=alt.Color("arm:N", title=None, scale=alt.Scale(domain=arms, range=colours)),
            strokeDash=alt.StrokeDash("arm:N", title=None, scale=alt.Scale(domain=arms, range=dashes)),
        )
        panels.append(line.properties(width=width - 70, height=140))
    return _finished(alt.vconcat(*panels))


def over_time(data: tuple[Rows, float | None], width: int, held: Held) -> Any:
    """A panel a quantity; the window stands between two dashed lines."""
    rows, end_s = data
    span = [min(row["t_s"] for row in rows), max(row["t_s"] for row in rows)]
    edges = [{"t_s": at} for at in (0.0, end_s) if at is not None and span[0] <= at <= span[1]]
    panels = []
    for name in dict.fromkeys(row["panel"] for row in rows):
        mine = [row for row in rows if row["panel"] == name]
        series = list(dict.fromkeys(row["series"] for row in mine))
        dash = alt.StrokeDash(
            "series:N", title=None, legend=alt.Legend() if len(series) > 1 else None,
            scale=alt.Scale(domain=series, range=[[1, 0], [3, 2]][: len(series)]),
        )  # fmt: skip
        x = alt.X("t_s:Q", title="seconds", scale=alt.Scale(domain=span, nice=False))
        line = held.chart(mine).mark_line(color=INK, strokeWidth=1.3).encode(
            x=x, y=alt.Y("value:Q", title=name, axis=alt.Axis(tickCount=4)), strokeDash=dash
        )  # fmt: skip
        window = held.chart(edges).mark_rule(color=FAINT, strokeDash=[4, 3]).encode(x=x)
        panels.append(alt.layer(line, window).properties(width=width - 70, height=90))
    return _finished(alt.vconcat(*panels).resolve_scale(strokeDash="independent"))


def roofline(data: Any, width: int, held: Held) -> Any:
    """The roofline with what was measured, as `varcas roofline` draws it."""
    return roofline_chart(*data)


CHARTS: dict[str, Callable[[Any, int, Held], Any]] = {
    "starts": starts,
    "history": history,
    "front": front,
    "parallel": parallel,
    "importance": importance,
    "batch": batch,
    "cdf": cdf,
    "time": over_time,
    "roofline": roofline,
}
"""Chart by a figure's kind: a function of its data, a width in pixels, and what holds the data."""
FIXED = frozenset({"roofline"})
"""Kinds that have one width."""
