"""Pictures of `varcas roofline` (roofline, memory, feasible region) and `varcas batch-size`. The door to Altair.

Made to be read in black and white: shapes, dashes, greys that differ in lightness, and words beside what they mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import altair as alt
import vl_convert

from varcas.batch_size import BatchSizeCurve
from varcas.batch_size import Point as CurvePoint
from varcas.errors import InputError
from varcas.gpus import GIB
from varcas.limits_answer import Cell, GpuRoofline, MeasuredPoint, MemoryOf, Point, Roofline

Rows = list[dict[str, Any]]
WIDTH, HEIGHT = 720, 460
PNG_SCALE = 2.0
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
FONT = "DejaVu Sans, Liberation Sans, Arial, sans-serif"
ABOVE = 2.2
"""Room above the roof, as a factor."""
LETTER, LINE = 6.8, 13.0
"""Width of a letter and height of a line of a label, in pixels."""


def draw(answer: Roofline, directory: Path) -> list[Path]:
    """Writes every picture of every GPU as SVG, PNG and self-contained HTML, and returns the files.

    Raises:
        InputError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [
            path
            for gpu in answer.gpus
            for name, chart in pictures(answer, gpu).items()
            for path in save(chart, directory / f"{name}-{re.sub('[^A-Za-z0-9.-]+', '-', gpu.gpu)}")
        ]
    except OSError as error:
        raise InputError(f"--plots: {directory}: cannot be written ({error}). Give another directory.") from error


def pictures(answer: Roofline, gpu: GpuRoofline) -> dict[str, alt.TopLevelMixin]:
    """The charts of one GPU by name."""
    return {
        "roofline": roofline_chart(answer, gpu),
        "memory": memory_chart(answer, gpu),
        "region": region_chart(answer, gpu),
    }


MADE: dict[str, Callable[[dict[str, Any]], str | bytes]] = {
    ".svg": lambda spec: vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE),
    ".png": lambda spec: vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=PNG_SCALE),
    ".html": lambda spec: vl_convert.vegalite_to_html(spec, vl_version=VEGA_LITE, bundle=True),
}
"""Suffix to what makes the file; HTML needs no network."""


def save(chart: alt.TopLevelMixin, path: Path) -> list[Path]:
    """Writes PATH.svg, PATH.png and PATH.html."""
    files = [path.with_name(path.name + suffix) for suffix in MADE]
    for file in files:
        _write(chart, file)
    return files


def draw_curve(curve: BatchSizeCurve, file: Path) -> Path:
    """Writes the picture of `varcas batch-size`; the file's suffix says as what.

    Raises:
        InputError: another suffix, or it cannot be written.
    """
    if file.suffix not in MADE:
        raise InputError(f"--plot: {file}: its suffix says no format. Allowed: {', '.join(MADE)}.")
    try:
        _write(curve_chart(curve), file)
    except OSError as error:
        raise InputError(f"--plot: {file}: cannot be written ({error}). Give another file.") from error
    return file


def _write(chart: alt.TopLevelMixin, file: Path) -> None:
    content = MADE[file.suffix](chart.to_dict())
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def _finished(chart: Any, title: str, *lines: str) -> Any:
    """With its title, and plain type throughout."""
    shown = alt.TitleParams(title, subtitle=list(lines), anchor="start", fontSize=15, subtitleFontSize=11, offset=12)
    axis = {"labelFontSize": 11, "titleFontSize": 12, "labelColor": "black", "titleColor": "black"}
    return (
        chart.properties(title=shown)
        .configure(font=FONT, background="white", padding=14)
        .configure_view(stroke="black", strokeWidth=0.6)
        .configure_axis(**axis)
        .configure_legend(labelFontSize=11, titleFontSize=11)
    )


def _chart(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.Data(values=rows))  # type: ignore[no-untyped-call]


def _about(answer: Roofline, gpu: GpuRoofline) -> str:
    several = f" x {gpu.gpus_per_server}" if gpu.gpus_per_server > 1 else ""
    return f"{answer.model.name} on {gpu.gpu}{several}"


# ---- the roofline


def roofline_chart(answer: Roofline, gpu: GpuRoofline) -> Any:
    """Log-log: attainable FLOP/s over intensity, decode by batch, prefill by prompt, what was measured below."""
    points = _decode_rows(gpu) + _prefill_rows(gpu)
    low = min(row["intensity"] for row in points) / 2
    high = max(max(row["intensity"] for row in points), gpu.ridge) * 2
    tall = gpu.peak_flops
    measured = [_measured_row(point) for point in gpu.measurements]
    floor = min([low * gpu.memory_bytes_per_s, *(row["flops_per_s"] / 1.5 for row in measured)])
    x = alt.X("intensity:Q", title="arithmetic intensity, FLOP/byte", axis=_log_axis(),
              scale=alt.Scale(type="log", domain=[low, high], nice=False))  # fmt: skip
    y = alt.Y("flops_per_s:Q", title="FLOP/s", axis=_log_axis(),
              scale=alt.Scale(type="log", domain=[floor, tall * ABOVE], nice=False))  # fmt: skip
    _thin(measured + points, _Frame(low, high, floor, tall * ABOVE))
    layers = [*_roof(gpu, low, high, floor, x, y), _marks(points, x, y), *_labels(points + measured, x, y)]
    if measured:
        layers.append(_measured_marks(measured, x, y))
    chart = alt.layer(*layers).properties(width=WIDTH, height=HEIGHT).interactive()
    kind = "estimates: the CPU was probed" if gpu.measured else "bounds at datasheet peaks"
    lines = [f"Line and points: {kind}; hollow triangles: estimate (16-bit weights and units, nothing fused)."]
    return _finished(chart, f"Roofline: {_about(answer, gpu)}", *lines, _measured_words(gpu))


def _measured_words(gpu: GpuRoofline) -> str:
    if not gpu.measurements:
        return "Measured: nothing yet of this model on this GPU."
    faked = sum(point.simulated for point in gpu.measurements)
    some = f", {faked} of them SIMULATED (empty)" if faked else ""
    return f"Stars: measured, {len(gpu.measurements)} points{some}; numbers: mean batch, of a prefill prompt tokens."


def _log_axis() -> alt.Axis:
    ticks = [digit * 10.0**power for power in range(-3, 17) for digit in (1, 2, 5)]
    return alt.Axis(grid=True, gridColor="#e4e4e4", format="~s", values=ticks, labelOverlap=True)


def _decode_rows(gpu: GpuRoofline) -> Rows:
    contexts = sorted({point.tokens for point in gpu.decode})
    rows: Rows = []
    for index, context in enumerate(contexts):
        series = f"decode, {context:,} tokens cached: batch"
        same = sorted((p for p in gpu.decode if p.tokens == context), key=lambda point: point.batch)
        rows += _rows(gpu, same, series, "above" if index % 2 == 0 else "below", lambda point: f"{point.batch}")
    return rows


def _prefill_rows(gpu: GpuRoofline) -> Rows:
    def words(point: Point) -> str:
        return f"{point.tokens:,}"

    least = _rows(gpu, gpu.prefill, "prefill, weights as stored: prompt tokens", "above", words)
    return least + _rows(gpu, gpu.prefill_unfused, "prefill, unfused (estimate): prompt tokens", "below", words)


def _rows(gpu: GpuRoofline, points: Sequence[Point], series: str, side: str, words: Callable[[Point], str]) -> Rows:
    """Points as data."""
    rows: Rows = []
    for point in points:
        attained = point.flops / point.seconds  # with classes of other units a little off the line
        rows.append(
            {
                "series": series,
                "intensity": point.intensity,
                "flops_per_s": attained,
                "label": words(point),
                "side": side,
                "batch": point.batch,
                "tokens": point.tokens,
                "utilisation": point.utilisation,
                "ms": point.seconds * 1e3,
                "bound": point.bound,
            }
        )
    return rows


Side = Literal["above", "below", "right"]
SHIFT: dict[Side, tuple[int, int, Literal["left", "right"]]] = {
    "above": (-8, -10, "right"),
    "below": (9, 12, "left"),
    "right": (9, 0, "left"),
}
"""Where a label stands by its point: pixels right and down, and which of its ends is there."""


_Box = tuple[float, float, float, float]
"""Left, right, upper and lower end, in pixels."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plot's corners, to know where labels would overlap."""

    low: float
    high: float
    floor: float
    top: float

    def at(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Of a row's point, from the plot's upper left corner."""
        x = math.log(row["intensity"] / self.low) / math.log(self.high / self.low) * WIDTH
        return x, math.log(self.top / row["flops_per_s"]) / math.log(self.top / self.floor) * HEIGHT

    def mark(self, row: Mapping[str, Any]) -> _Box:
        """Of a row's point."""
        x, y = self.at(row)
        return x - 5, x + 5, y - 5, y + 5

    def box(self, row: Mapping[str, Any]) -> _Box:
        """Of a row's label."""
        (right, down, end), (x, y) = SHIFT[row["side"]], self.at(row)
        width = LETTER * len(row["label"])
        left = x + right - (width if end == "right" else 0)
        return left, left + width, y + down - LINE / 2, y + down + LINE / 2


def _thin(rows: Rows, frame: _Frame) -> None:
    """Takes away labels that would lie on a point or an earlier one; of a series the last point's comes first."""
    kept = [frame.mark(row) for row in rows]
    for row in reversed(rows):
        box = frame.box(row)
        if any(_overlap(box, other) for other in kept):
            row["label"] = ""
        elif row["label"]:
            kept.append(box)


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def _measured_row(point: MeasuredPoint) -> dict[str, Any]:
    alone = point.kind == "prefill"
    return {
        "series": "measured (SIMULATED)" if point.simulated else "measured",
        "intensity": point.intensity,
        "flops_per_s": point.flops_per_s,
        "label": f"{point.prefill_tokens:.0f}" if alone else f"{point.batch:.2g}",
        "what": f"{point.kind} of {point.study} {point.number}",
        "efficiency": point.efficiency,
        "side": "right",
    }


def _roof(gpu: GpuRoofline, low: float, high: float, floor: float, x: alt.X, y: alt.Y) -> list[Any]:
    """The two roofs, named along the line, and the ridge."""
    tall, slope = gpu.peak_flops, gpu.memory_bytes_per_s
    corner = {"intensity": gpu.ridge, "flops_per_s": tall}
    start = {"intensity": max(low, floor / slope), "flops_per_s": max(low, floor / slope) * slope}
    line = [start, corner, {"intensity": high, "flops_per_s": tall}]
    ridge = [{"intensity": gpu.ridge, "flops_per_s": floor}, corner]
    names = [
        {
            "intensity": high / 1.1,
            "flops_per_s": tall * 1.45,
            "label": f"compute: {tall / 1e12:.4g} TFLOP/s {gpu.units}",
        },
        {"intensity": gpu.ridge * 1.08, "flops_per_s": floor * 1.2, "label": f"ridge: {gpu.ridge:.3g} FLOP/byte"},
        {"intensity": floor / slope * 1.45, "flops_per_s": floor * 1.2, "label": f"memory: {slope / 1e9:.4g} GB/s"},
    ]
    sides: tuple[Literal["left", "right"], ...] = ("right", "left", "left")
    text = [
        _chart([name]).mark_text(align=align, fontSize=12).encode(x=x, y=y, text="label:N")
        for name, align in zip(names, sides, strict=True)
    ]
    roof = _chart(line).mark_line(color="black", strokeWidth=2.2).encode(x=x, y=y)
    dashed = _chart(ridge).mark_line(color="black", strokeDash=[3, 4], strokeWidth=1)
    return [roof, dashed.encode(x=x, y=y), *text]


SHAPES = ("circle", "square", "cross", "diamond")


def _marks(rows: Rows, x: alt.X, y: alt.Y) -> Any:
    series = list(dict.fromkeys(row["series"] for row in rows))
    decode = [name for name in series if name.startswith("decode")]
    shapes = [SHAPES[decode.index(name) % 4] if name in decode else "triangle-up" for name in series]
    fills = ["white" if "estimate" in name or decode[1:2] == [name] else "black" for name in series]
    legend = alt.Legend(title=None, orient="bottom", direction="vertical", labelLimit=480, symbolSize=90)
    return (
        _chart(rows)
        .mark_point(size=75, stroke="black", strokeWidth=1.3, opacity=1)
        .encode(
            x=x,
            y=y,
            shape=alt.Shape("series:N", scale=alt.Scale(domain=series, range=shapes), legend=legend),
            fill=alt.Fill("series:N", scale=alt.Scale(domain=series, range=fills), legend=legend),
            tooltip=_tips("series:N", "batch:Q", "tokens:Q", "intensity:Q", "utilisation:Q", "ms:Q", "bound:N"),
        )
    )


def _tips(*fields: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(field, format=".3~g") if field.endswith(":Q") else alt.Tooltip(field) for field in fields]


def _labels(rows: Rows, x: alt.X, y: alt.Y) -> list[Any]:
    """Numbers beside the points, away from the roof on their own side."""
    return [
        _chart([row for row in rows if row["side"] == side and row["label"]])
        .mark_text(fontSize=11, dx=right, dy=down, align=end)
        .encode(x=x, y=y, text="label:N")
        for side, (right, down, end) in SHIFT.items()
        if any(row["side"] == side and row["label"] for row in rows)
    ]


def _measured_marks(rows: Rows, x: alt.X, y: alt.Y) -> Any:
    """Stars, empty where simulated."""
    base = _chart(rows).encode(x=x, y=y)
    star = "M0,-1L0.23,-0.32L0.95,-0.31L0.37,0.12L0.59,0.81L0,0.4L-0.59,0.81L-0.37,0.12L-0.95,-0.31L-0.23,-0.32Z"
    fill = alt.condition("datum.series == 'measured'", alt.value("black"), alt.value("white"))
    return base.mark_point(shape=star, size=130, stroke="black", strokeWidth=1.2, opacity=1).encode(
        fill=fill, tooltip=_tips("what:N", "series:N", "intensity:Q", "flops_per_s:Q", "efficiency:Q")
    )


# ---- memory

PARTS = ("weights", "activations or logits", "graphs", "overhead", "KV cache", "not asked for")
GREYS = ("#4d4d4d", "#8c8c8c", "#b0b0b0", "#c8c8c8", "#efefef", "#ffffff")


def memory_chart(answer: Roofline, gpu: GpuRoofline) -> Any:
    """A bar a configuration: where one GPU's memory goes."""
    rows = [row for of in gpu.memory_of for row in _memory_rows(of)]
    bars = _chart(rows)
    order = [f"{of.label}" for of in gpu.memory_of]
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=260, labelFontSize=12, ticks=False))
    total = gpu.memory.total / GIB
    end = max(total, *(row["end"] for row in rows))
    x = alt.X("start:Q", title="GiB of one GPU", scale=alt.Scale(domain=[0, end], nice=False))
    legend = alt.Legend(title=None, orient="bottom", symbolType="square", symbolStrokeWidth=1, columns=6)
    fill = alt.Fill("part:N", scale=alt.Scale(domain=list(PARTS), range=list(GREYS)), legend=legend)
    block = bars.mark_bar(stroke="black", strokeWidth=0.8, height=24).encode(
        y=y, x=x, x2="end:Q", fill=fill, tooltip=_tips("label:N", "part:N", "gib:Q", "words:N")
    )
    inside = (
        bars.transform_filter("datum.words != ''")
        .mark_text(fontSize=11)
        .encode(
            y=y,
            x=alt.X("middle:Q"),
            text="words:N",
            color=alt.condition("datum.part == 'weights'", alt.value("white"), alt.value("black")),
        )
    )
    there = _chart([{"total": total}]).encode(x="total:Q")
    mark = [there.mark_rule(strokeWidth=3, color="black")] if end > total * 1.001 else []
    chart = alt.layer(block, inside, *mark).properties(width=WIDTH, height=alt.Step(40))
    lines = (
        "Weights: exact. All else: estimates, and so the KV tokens that vLLM will report.",
        "Each bar below the first changes one flag of the baseline."
        + (f" Thick line: all there is, {total:.2f} GiB." if mark else ""),
    )
    return _finished(chart, f"Memory: {_about(answer, gpu)}", *lines)


def _memory_rows(of: MemoryOf) -> Rows:
    stack, at = of.memory, 0.0
    rows: Rows = []
    sizes = (
        stack.weights,
        max(stack.activations, stack.logits),
        stack.graphs,
        stack.overhead,
        max(stack.kv_cache, 0),
        stack.rest,
    )
    whole = max(stack.total, sum(sizes)) / GIB
    for part, size in zip(PARTS, sizes, strict=True):
        gib = size / GIB
        wanted = (_memory_words(of, part, gib), f"{gib:.2f}", "")
        words = next(text for text in wanted if gib / whole * WIDTH > LETTER * len(text) or not text)
        rows.append(
            {
                "label": of.label,
                "part": part,
                "gib": gib,
                "start": at,
                "end": at + gib,
                "middle": at + gib / 2,
                "words": words,
            }
        )
        at += gib
    return rows


def _memory_words(of: MemoryOf, part: str, gib: float) -> str:
    stack = of.memory
    if part == "weights":
        left = "" if stack.kv_cache >= 0 else f": {stack.verdict}"
        return f"weights {gib:.2f}{left}"
    if part != "KV cache":
        return f"{gib:.2f}"
    if of.refused is not None:
        return f"refused: {of.refused}"
    starts = "" if stack.verdict == "fits" else f" ({stack.verdict})"
    return f"KV cache {gib:.2f}: {stack.kv_tokens:,} tokens{starts}"


# ---- the feasible region

VERDICTS = {
    "holds": ("all sequences have room at full length", "#ffffff"),
    "waits": ("starts; at full length only so many have room, others wait", "#d9d9d9"),
    "too small": ("does not start: KV cache too small", "#969696"),
    "refused": ("refused by a hard rule", "#404040"),
    "not told": ("not told: a flag is set that the estimates leave out", "#f4f4f4"),
}


def region_chart(answer: Roofline, gpu: GpuRoofline) -> Any:
    """`max_num_seqs` x `max_model_len`: where a server starts, and how many full sequences it holds."""
    rows = [_region_row(cell) for cell in gpu.region]
    names = [words for words, _ in VERDICTS.values()]
    lengths = sorted({cell.max_model_len for cell in gpu.region}, reverse=True)
    legend = alt.Legend(title=None, orient="bottom", direction="vertical", labelLimit=480, symbolStrokeWidth=1)
    cells = _chart(rows).encode(
        x=alt.X("max_num_seqs:O", axis=alt.Axis(labelAngle=0), sort="ascending"),
        y=alt.Y("max_model_len:O", sort=lengths, axis=alt.Axis(format=",d")),
    )
    boxes = cells.mark_rect(stroke="black", strokeWidth=0.6).encode(
        fill=alt.Fill(
            "meaning:N",
            scale=alt.Scale(domain=names, range=[grey for _, grey in VERDICTS.values()]),
            legend=legend,
        ),
        tooltip=_tips("max_num_seqs:Q", "max_model_len:Q", "meaning:N", "sequences:Q"),
    )
    words = cells.mark_text(fontSize=11).encode(
        text="words:N", color=alt.condition("datum.verdict == 'refused'", alt.value("white"), alt.value("black"))
    )
    frame = cells.transform_filter(
        f"datum.max_num_seqs == {gpu.memory.flags['max_num_seqs']} && "
        f"datum.max_model_len == {gpu.memory.flags['max_model_len']}"
    ).mark_rect(stroke="black", strokeWidth=3.5, fillOpacity=0)
    chart = alt.layer(boxes, words, frame).properties(width=alt.Step(64), height=alt.Step(34))
    lines = (
        "Estimates, but for what a rule refuses (bounds and vLLM's own refusals).",
        "Numbers: sequences of full length that the KV cache holds. Thick frame: the baseline.",
    )
    return _finished(chart, f"Feasible region: {_about(answer, gpu)}", *lines)


def _region_row(cell: Cell) -> dict[str, Any]:
    words = {
        "not told": "?",
        "holds": "all",
        "waits": f"{cell.sequences:.3g}",
        "too small": "no start",
        "refused": "refused",
    }
    return {
        "max_num_seqs": cell.max_num_seqs,
        "max_model_len": cell.max_model_len,
        "verdict": cell.verdict,
        "meaning": VERDICTS[cell.verdict][0],
        "sequences": cell.sequences,
        "words": words[cell.verdict],
    }


# ---- batch size


def curve_chart(curve: BatchSizeCurve) -> Any:
    """Tokens per second and time per token over the swept limit, with intervals; knee and pick are named."""
    rows = [_curve_row(curve, point) for point in curve.points if point.output_tokens_per_s is not None]
    x = alt.X("value:Q", title=curve.flag, scale=alt.Scale(type="log", base=2, nice=False),
              axis=alt.Axis(values=[row["value"] for row in rows], format="d"))  # fmt: skip
    upper = _curve_panel(rows, x, "tokens_per_s:Q", "output tokens/s")
    whiskers = _chart(rows).mark_rule().encode(x=x, y=alt.Y("lo:Q"), y2=alt.Y2("hi:Q"))
    words = _chart([row for row in rows if row["words"]]).mark_text(dx=-8, dy=-8, align="right", fontSize=11).encode(
        x=x, y=alt.Y("tokens_per_s:Q"), text="words:N"
    )  # fmt: skip
    lower = _curve_panel([row for row in rows if row["tpot_ms"] is not None], x, "tpot_ms:Q", "mean TPOT, ms")
    both = alt.vconcat(
        alt.layer(upper, whiskers, words).properties(width=WIDTH, height=HEIGHT // 2),
        lower.properties(width=WIDTH, height=HEIGHT // 3),
    )
    live = "One server, its limit changed while it ran" if _is_live(curve) else "A fresh server each"
    lines = [f"Bars: 95 % interval within the start. {live}. Open: the SLO is missed."]
    return _finished(both, f"{curve.flag}: {curve.model} on {curve.gpu or 'cpu'}", *lines)


def _is_live(curve: BatchSizeCurve) -> bool:
    return any(point.measured_live for point in curve.points)


def _curve_panel(rows: Rows, x: alt.X, field: str, title: str) -> Any:
    y = alt.Y(field, title=title, scale=alt.Scale(zero=True))
    line = _chart(rows).mark_line(color="#555555").encode(x=x, y=y)
    marks = _chart(rows).mark_point(size=70, color="black").encode(
        x=x, y=y, tooltip=_tips("value:Q", "tokens_per_s:Q", "tpot_ms:Q", "words:N"),
        fill=alt.Fill("slo:N", scale=alt.Scale(domain=["met", "missed"], range=["black", "white"]), legend=None),
    )  # fmt: skip
    return alt.layer(line, marks)


def _curve_row(curve: BatchSizeCurve, point: CurvePoint) -> dict[str, Any]:
    named = [name for name, value in (("knee", curve.knee), ("pick", curve.pick)) if value == point.value]
    middle = point.output_tokens_per_s
    return {
        "value": point.value,
        "tokens_per_s": middle,
        "lo": middle if point.output_tokens_per_s_lo is None else point.output_tokens_per_s_lo,
        "hi": middle if point.output_tokens_per_s_hi is None else point.output_tokens_per_s_hi,
        "tpot_ms": point.tpot_mean_ms,
        "slo": "missed" if point.slo_met is False else "met",
        "words": ", ".join(named),
    }
