"""`StepClock` is `StepTimes.seconds` of plain numbers: the same law, held to the vectorised one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varcas import gpus
from varcas.known import find_model
from varcas.memory import Serve
from varcas.steptime import Efficiency, StepClock, StepTimes

SERVE = Serve(dtype="float16", max_model_len=2048, max_num_batched_tokens=2048, max_num_seqs=256)
TIMES = {
    (name, kernel): StepTimes.of(find_model(hub).model, gpus.gpu("T4"), serve, kernel)
    for name, hub, serve, kernel in (
        ("awq", "TheBloke/Llama-2-7B-AWQ", SERVE, "awq-4 float16 eager"),
        ("awq", "TheBloke/Llama-2-7B-AWQ", SERVE, "awq-plain float16 eager"),
        ("windows", "google/gemma-2-2b", replace(SERVE, dtype="bfloat16"), "none bfloat16 graphs"),
        ("experts", "mistralai/Mixtral-8x7B-v0.1", replace(SERVE, tensor_parallel_size=2), "none float16 graphs tp2"),
    )
}  # fmt: skip

EFFICIENCIES = st.builds(
    Efficiency,
    st.floats(1e-4, 0.1), st.floats(1e-6, 1e-3), st.floats(0.1, 1), st.floats(0.1, 1), st.floats(0.1, 1),
    st.floats(1e-4, 0.1), overlaps=st.booleans(), adds=st.booleans(),
)  # fmt: skip


@pytest.mark.parametrize("key", TIMES, ids=str)
@given(
    efficiency=EFFICIENCIES,
    batch=st.integers(0, 256),
    context=st.floats(0, 2047),
    prefill=st.integers(0, 1792),
    cached=st.floats(0, 1000),
    prompts=st.integers(1, 8),
)
def test_one_number_at_a_time_is_the_same_law(
    key: tuple[str, str], efficiency: Efficiency, batch: int, context: float, prefill: int, cached: float, prompts: int
) -> None:
    step = (batch, context, prefill, cached, prompts)
    times = TIMES[key]
    wanted = float(times.seconds(efficiency, *step))
    assert StepClock(times, efficiency).seconds(*step) == pytest.approx(wanted, rel=1e-9)


def test_more_rows_than_the_tables_have_are_no_step() -> None:
    clock = StepClock(next(iter(TIMES.values())), Efficiency(1e-3, 1e-5, 0.7, 0.5, 0.5, 1e-2))
    with pytest.raises(IndexError):
        clock.seconds(256, 100.0, 2048)
