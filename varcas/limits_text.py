"""The answer of `varcas roofline` in words and tables: short, with units, each figure called what it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from varcas.gpus import GIB
from varcas.limits_answer import BoundsAt, BreakEven, GpuRoofline, Interval, MemoryStack, Point, Roofline, RuleCount

NONE = "-"


def roofline_text(answer: Roofline) -> Group:
    """Everything of one GPU; of several what compares them, and what the rules say on each."""
    parts: list[RenderableType] = [Text("\n".join(_head(answer))), "", _comparison(answer)]
    one = len(answer.gpus) == 1
    for gpu in answer.gpus:
        parts += ["", Text(_gpu_line(gpu), style="bold"), *(_details(gpu) if one else ()), *_rules(gpu)]
    parts += ["", Text("\n".join(_foot(answer, one)), style="dim")]
    return Group(*parts)


def _head(answer: Roofline) -> Iterator[str]:
    model, workload = answer.model, answer.workload
    active = f", {model.active_parameters / 1e9:.2f} G active" if model.active_parameters < model.parameters else ""
    stored = f", {model.quantisation}" if model.quantisation else ""
    yield f"{answer.experiment}: {model.name} ({model.parameters / 1e9:.2f} G parameters{active}{stored})"
    line = workload.described
    if workload.prompt_tokens is not None and workload.output_tokens is not None:
        prompt, output = workload.prompt_tokens, workload.output_tokens
        line += f": prompts of {prompt.mean:.0f} tokens (p95 {prompt.p95:.0f}), answers of {output.mean:.0f} "
        line += f"(p95 {output.p95:.0f})"
    yield line
    if workload.asked_tokens_per_s is not None:
        yield f"the rate asks for {workload.asked_tokens_per_s:,.0f} output tokens/s"
    yield from (f"note: {note}" for note in answer.notes)


def table(columns: Iterable[str], rows: Iterable[Sequence[str]], left: int = 1, title: str | None = None) -> Table:
    """A plain table; all but the first `left` columns are numbers."""
    made = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def _comparison(answer: Roofline) -> Table:
    """A line a GPU."""
    columns = (
        "GPU", "baseline", "KV tokens ~", "TTFT p50 ms ≥", "TPOT p50 ms ≥", "tokens/s ≤", "requests/s ≤",
        "$/M tokens ≥", "J/token ~", "refused",
    )  # fmt: skip
    return table(columns, (_compared(gpu) for gpu in answer.gpus))


def _compared(gpu: GpuRoofline) -> tuple[str, ...]:
    best, latency = gpu.best, gpu.latency
    waits = (latency.ttft_p50_ms, latency.tpot_p50_ms) if latency is not None else (None, None)
    rates = (best.tokens_per_s, best.max_rate_rps, best.usd_per_m_tokens) if best is not None else (None, None, None)
    return (
        gpu.gpu,
        gpu.memory.verdict,
        f"{gpu.memory.kv_tokens:,}",
        *map(number, (*waits, *rates)),
        number(best.joules_per_token if best is not None else None),
        f"{gpu.pruned.refused:,} of {gpu.pruned.judged:,}",
    )


def number(value: float | None) -> str:
    """Three digits; whole above 100."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gpu_line(gpu: GpuRoofline) -> str:
    several = f" x {gpu.gpus_per_server}" if gpu.gpus_per_server > 1 else ""
    kind = ", probed: its bounds are estimates, too low on a busy host" if gpu.measured else ""
    price = f", {gpu.usd_per_h:.3g} $/h" if gpu.usd_per_h is not None else ""
    return (
        f"{gpu.gpu}{several}: {gpu.peak_flops / 1e12:.4g} TFLOPS {gpu.units}, {gpu.memory_bytes_per_s / 1e9:.4g} GB/s, "
        f"ridge {gpu.ridge:.3g} FLOP/byte{price}{kind}"
    )


def _details(gpu: GpuRoofline) -> Iterator[RenderableType]:
    yield from (Text(line) for line in _memory_lines(gpu.memory))
    yield ""
    yield _decode_table(gpu)
    yield Text(_compute_bound_line(gpu))
    yield ""
    yield _prefill_table(gpu)
    yield ""
    yield _class_table(gpu)
    if gpu.bounds:
        yield ""
        yield _bounds_table(gpu)
        yield from (Text(line) for line in _best_lines(gpu))
    yield from (Text(line) for line in _speculation_lines(gpu.speculation))
    yield from _measured(gpu)


def _memory_lines(stack: MemoryStack) -> Iterator[str]:
    flags = stack.flags
    yield (
        f"memory of the baseline ({flags['dtype']}, max_model_len {flags['max_model_len']}, max_num_seqs "
        f"{flags['max_num_seqs']}, max_num_batched_tokens {flags['max_num_batched_tokens']}): {stack.verdict}"
    )
    peak = "activations" if stack.activations >= stack.logits else "logits"
    parts = {
        "weights (exact)": stack.weights,
        f"{peak} ~": max(stack.activations, stack.logits),
        "graphs ~": stack.graphs,
        "overhead ~": stack.overhead,
        "KV cache ~": stack.kv_cache,
        "not asked for": stack.rest,
    }
    yield f"  {stack.total / GIB:.2f} GiB = " + " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    most = "not told" if stack.kv_tokens_at_most is None else f"{stack.kv_tokens_at_most:,}"
    yield (
        f"  KV cache: {stack.kv_tokens:,} tokens ~ (at most {most}), "
        f"{stack.kv_bytes_per_token / 1024:.4g} KiB each: {stack.full_sequences:.3g} sequences of full length"
    )


def _decode_table(gpu: GpuRoofline) -> Table:
    contexts = sorted({point.tokens for point in gpu.decode})
    columns = ["decode: batch"]
    for context in contexts:
        columns += [f"AI at {context:,}", "of peak ≤", "step ms ≥", "bound"]
    by_batch: dict[int, list[Point]] = {}
    for point in gpu.decode:
        by_batch.setdefault(point.batch, []).append(point)
    rows = [
        [str(batch), *(cell for point in sorted(points, key=lambda p: p.tokens) for cell in _cells(point))]
        for batch, points in sorted(by_batch.items())
    ]
    return table(columns, rows)


def _cells(point: Point) -> tuple[str, str, str, str]:
    return number(point.intensity), share(point.utilisation), number(point.seconds * 1e3), point.bound


def share(fraction: float) -> str:
    """`1.5 %`."""
    return f"{fraction * 100:.3g} %" if fraction < 0.9995 else "100 %"


def _compute_bound_line(gpu: GpuRoofline) -> str:
    words = [
        f"at a context of {at.context:,} "
        + ("at no batch (the KV cache's traffic forbids it)" if at.batch is None else f"from {at.batch:,} sequences on")
        for at in gpu.compute_bound
    ]
    return "decode turns compute-bound " + ", ".join(words)


def _prefill_table(gpu: GpuRoofline) -> Table:
    columns = ("prefill: prompt", "AI", "of peak ≤", "ms ≥", "bound", "AI unfused ~", "of peak ~", "ms ~", "bound ~")
    pairs = zip(gpu.prefill, gpu.prefill_unfused, strict=True)
    return table(columns, ([f"{least.tokens:,}", *_cells(least), *_cells(unfused)] for least, unfused in pairs))


def _class_table(gpu: GpuRoofline) -> Table:
    """A row an operator class, three columns a step."""
    steps = list(dict.fromkeys((part.phase, part.batch, part.tokens) for part in gpu.classes))
    columns = ["operators"]
    for phase, batch, tokens in steps:
        columns += [f"{phase} {batch} x {tokens:,}: GFLOP", "MB", "AI"]
    cells: dict[str, list[str]] = {}
    for part in gpu.classes:
        figures = (part.flops / 1e9, part.bytes / 1e6, part.intensity)
        cells.setdefault(part.operators.replace("_", " "), []).extend(map(number, figures))
    return table(columns, ([name, *row] for name, row in cells.items()))


def _bounds_table(gpu: GpuRoofline) -> Table:
    columns = ("this workload: batch", "TPOT p50 ms ≥", "tokens/s ≤", "$/M tokens ≥", "J/token ~", "")
    return table(columns, (_bound_cells(at) for at in gpu.bounds))


def _bound_cells(at: BoundsAt) -> tuple[str, ...]:
    beyond = "" if at.possible else "more than the KV cache holds"
    figures = (at.tpot_ms, at.tokens_per_s, at.usd_per_m_tokens, at.joules_per_token)
    return (number(at.batch), *map(number, figures), beyond)


def _best_lines(gpu: GpuRoofline) -> Iterator[str]:
    for best in (gpu.best, gpu.best_drafted):
        if best is not None:
            flags = " ".join(f"{name}={value}" for name, value in best.flags.items())
            yield (
                f"no configuration of the space gives more than {number(best.tokens_per_s)} tokens/s, "
                f"{number(best.max_rate_rps)} requests/s {_drafting(best.drafted > 0)} "
                f"({number(best.batch)} sequences in a step; {flags})"
            )
    if gpu.untold:
        yield f"{gpu.untold:,} configurations set flags that no bound here covers"
    for latency in (gpu.latency, gpu.latency_drafted):
        if latency is None:
            continue
        yield (
            f"alone on the GPU {_drafting(latency is gpu.latency_drafted)}: "
            f"TTFT ≥ {number(latency.ttft_p50_ms)} ms (p95 {number(latency.ttft_p95_ms)}), "
            f"TPOT ≥ {number(latency.tpot_p50_ms)} ms (p95 {number(latency.tpot_p95_ms)})"
        )
    for slo in gpu.slo:
        least = "not known" if slo.least_ms is None else f"≥ {number(slo.least_ms)} ms"
        met = slo.least_ms is None or slo.least_ms <= slo.limit_ms
        yield f"SLO {slo.key} of {slo.limit_ms:g} ms: {least}{'' if met else ': cannot be met'}"


def _drafting(drafts: bool) -> str:
    return "with every draft accepted and free, which no speculation reaches" if drafts else "without speculation"


def _speculation_lines(found: Sequence[BreakEven]) -> Iterator[str]:
    for method, drafted in dict.fromkeys((one.method, one.num_speculative_tokens) for one in found):
        same = [one for one in found if (one.method, one.num_speculative_tokens) == (method, drafted)]
        parts = [f"{'never' if one.acceptance is None else share(one.acceptance)} at {one.batch}" for one in same]
        yield f"speculation ({method}, {drafted} drafted) breaks even at an acceptance ≥ {', '.join(parts)} sequences"


def _rules(gpu: GpuRoofline) -> Iterator[RenderableType]:
    pruned = gpu.pruned
    if pruned.hard:
        yield _rule_table("refused by", pruned.hard)
    elif pruned.judged:
        yield Text(f"no hard rule refuses any of {pruned.judged:,} configurations")
    if pruned.soft:
        yield _rule_table("warned of by (estimates: nothing is refused)", pruned.soft)
    if pruned.baseline:
        yield Text(f"against the baseline, which is never refused: {pruned.baseline}")
    if pruned.nearest:
        yield Text(pruned.nearest)


def _rule_table(title: str, rules: Sequence[RuleCount]) -> Table:
    made = table((title, "configurations", "one of them: why", "source"), ())
    for column in made.columns[2:]:
        column.justify = "left"
    for rule in rules:
        made.add_row(rule.rule, f"{rule.count:,} ({share(rule.share)})", Text(rule.message), Text(rule.source))
    return made


def _measured(gpu: GpuRoofline) -> Iterator[RenderableType]:
    """What was measured of it, and what is expected of the baseline."""
    yield ""
    if not gpu.measurements:
        rows = ", ".join(f"{count} {reason}" for reason, count in gpu.left_out.items())
        why = f": of its rows {rows}" if rows else ""
        yield Text(f"measured: nothing in the results store tells of steps of this model on this GPU{why}")
    for attained in gpu.attained:
        yield Text(("SIMULATED: " if attained.simulated else "measured: ") + attained.words)
    if (expected := gpu.expected) is not None:
        beyond = f"; beyond what was measured: {', '.join(expected.beyond)}" if expected.beyond else ""
        yield Text(
            f"estimate for the baseline ({expected.basis}: {expected.source}{beyond}): "
            f"TPOT {_range(expected.tpot_ms)} ms, TTFT {_range(expected.ttft_ms)} ms, "
            f"{_range(expected.tokens_per_s)} tokens/s"
            + (": it falls behind at this rate" if expected.saturated else "")
        )


def _range(interval: Interval) -> str:
    if interval.value is None:
        return "without end"
    span = "" if interval.lo is None or interval.hi is None else f" ({number(interval.lo)} to {number(interval.hi)})"
    return f"{number(interval.value)}{span}"


def _foot(answer: Roofline, one: bool) -> Iterator[str]:
    version = f"vLLM {answer.engine_version}" if answer.engine_version else "no version"
    yield (
        f"≥ and ≤: bounds, at datasheet peaks; ~: estimates; AI: arithmetic intensity, FLOP/byte. Rules of {version}. "
        "tokens/s, $/M and J are of the best of the space, all without speculation. docs/roofline.md has every formula."
    )
    if unsure := sorted({f"{gpu.gpu}: {', '.join(gpu.unverified)}" for gpu in answer.gpus if gpu.unverified}):
        yield f"not confirmed by a second source: {'; '.join(unsure)}"
    if not one:
        yield "one GPU alone is shown in full; --json has everything"
