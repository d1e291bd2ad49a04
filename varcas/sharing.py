"""Proposals that differ in live limits alone, measured in turn on one server: the plan of such a start."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from varcas.early_stop import StopRules
from varcas.engine.node import Checked
from varcas.experiment import Workload
from varcas.inner import Limits, at_most, live_problem, live_start
from varcas.space import ServingConfig
from varcas.study import Proposal
from varcas.trial import Listed, Step, cold_step

LEAST_RIDES, MOST_RIDES = 2, 8
"""Further measurements on a server: as many as take the time of a start, but at least and at most so many."""

Check = Callable[[ServingConfig], Checked]


@dataclass(frozen=True, slots=True)
class Shared:
    """One start for several proposals.

    Attributes:
        config: to start with: the largest limits.
        checked: vLLM's word on it.
        plan: a discarded first load, then a measurement for each proposal.
        proposals: by the content hash of what each is once deployed.
    """

    config: ServingConfig
    checked: Checked
    plan: Listed
    proposals: Mapping[str, Proposal]


def num_rides(start_s: float, load_s: float) -> int:
    """Measurements beside the first that a start is worth."""
    return min(MOST_RIDES, max(LEAST_RIDES, round(start_s / load_s)))


def shared(
    proposals: Sequence[Proposal],
    live: Collection[str],
    flag_names: Collection[str],
    check: Check,
    workload: Workload,
    stop_rules: StopRules | None,
) -> Shared | None:
    """Plans a start for proposals whose parameters differ in live flags alone; None where the first cannot share one.

    What vLLM refuses as a fresh server is left out: nothing is measured that could not be deployed.

    Args:
        proposals: the one that is to be measured anyhow goes first.
        live: flags that a running server takes.
        flag_names: that its vLLM has.
        check: vLLM's word on a configuration.
        workload: of each measurement.
        stop_rules: of each.
    """
    first = proposals[0].config
    flags = [flag for flag in live if flag in proposals[0].params]
    if not flags or live_problem(first.flags, flag_names, flags) is not None:
        return None
    values = {flag: sorted({_limit(one, flag) for one in proposals}) for flag in flags}
    most = check(at_most(first, values))
    if not most.ok:
        return None
    start = live_start(first, values, flag_names, most.resolved)
    limits = [Limits(**{flag: _limit(one, flag) for flag in flags}) for one in proposals]
    named = [(one, limit, start.at(limit)) for one, limit in zip(proposals, limits, strict=True)]
    taken = [entry for entry in named if check(entry[2]).ok]
    if len(taken) < 2 or taken[0][0] is not proposals[0]:
        return None
    steps = [Step(config, workload, limit, stop_rules=stop_rules) for _, limit, config in taken]
    plan = Listed((cold_step(start.config, workload), *steps))
    return Shared(start.config, most, plan, {config.hash: one for one, _, config in taken})


def _limit(proposal: Proposal, flag: str) -> int:
    value = proposal.params[flag]
    assert isinstance(value, int)  # `inner.split` found nothing else
    return value
