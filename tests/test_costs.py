from __future__ import annotations

from tests.rows import row
from varcas.costs import COMPILE_S, StartCosts, compile_key


def test_what_shapes_no_graph_shares_them() -> None:
    base = {"max_num_seqs": 8, "dtype": "half"}
    assert compile_key({**base, "enable_prefix_caching": True}) == compile_key({**base, "enable_prefix_caching": False})
    assert compile_key(base) != compile_key({**base, "max_num_seqs": 16})
    assert compile_key({**base, "something_new": 1}) != compile_key(base)
    assert compile_key({**base, "enforce_eager": True}) is None


def test_a_new_shape_costs_its_compilation_once() -> None:
    rows = [row(8, server_start_s=90.0, compile_s=40.0, compile_cache_hit=False)]
    costs = StartCosts.of(rows, start_s=1.0, load_s=10.0)
    assert costs.start_s == 50.0
    assert costs.fresh_s({"dtype": "half", "max_num_seqs": 8}) == 60.0
    assert costs.fresh_s({"dtype": "half", "max_num_seqs": 8, "enable_prefix_caching": False}) == 60.0
    assert costs.fresh_s({"dtype": "half", "max_num_seqs": 16}) == 100.0


def test_before_anything_was_seen_the_plan_s_guess_holds() -> None:
    costs = StartCosts.of([], start_s=60.0, load_s=10.0)
    assert costs.fresh_s({"max_num_seqs": 8}) == 70.0 + COMPILE_S
    assert costs.fresh_s({"max_num_seqs": 8, "enforce_eager": True}) == 70.0
