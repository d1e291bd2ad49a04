"""Validation: configurations are predicted from others alone, and the figures say how well."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_simulated import experiment
from varcas.calibration import Calibration, prior
from varcas.cli import app, run
from varcas.errors import InputError
from varcas.experiment import Choices, Experiment
from varcas.inprocess import InProcessPool
from varcas.simulated import Simulator
from varcas.sweeper import sweep
from varcas.truth import Validation, validate, validation_text


@dataclasses.dataclass(frozen=True, slots=True)
class TrueSimulator(Simulator):
    """A machine whose law is known and is not the prior: what stands for real servers here."""

    def engine(self, flags: Any, start: str = "") -> Any:
        """Everything takes 1.6 times what the prior says, requests 3 times."""
        made = Simulator.engine(self, flags, start)
        return dataclasses.replace(made, seconds=lambda step: 1.6 * made.seconds(step), request_s=3 * made.request_s)


def measured(results: Path, name: str, seed: int = 0) -> Experiment:
    """A store of rows that are held for real: vLLM, not simulated."""
    made = experiment(results, engine="vllm", gpu="L4")
    told: dict[str, Any] = {
        "name": name,
        "baseline": {},
        "space": {"max_num_seqs": Choices(choices=[4, 8, 16, 32, 64, 128])},
        "workload": made.workload.model_copy(update={"rate_rps": 1.5, "duration_s": 60.0, "max_drain_s": 60.0}),
        "study": made.study.model_copy(update={"trials": 7, "repeats": 0, "seed": seed, "enqueue": []}),
    }
    made = made.model_copy(update=told)
    simulator = Simulator.of(made)
    true = TrueSimulator(*(getattr(simulator, field.name) for field in dataclasses.fields(Simulator)))
    sweep(made, run=true.run, node=true.node, pool=InProcessPool)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("truth")
    measured(path, "a")
    measured(path, "b", 1)
    return path


@pytest.fixture(scope="module")
def found(store: Path) -> Validation:
    return validate(store)


def test_a_law_that_is_the_same_is_found_from_other_configurations(found: Validation) -> None:
    errors = {one.metric: one for one in found.errors}
    assert errors["output_tokens_per_s"].median < 0.05
    assert errors["tpot_mean_ms"].median < 0.07
    assert found.order.tau is not None
    assert found.order.tau > 0.8
    assert found.start_spread_frac is not None
    assert 0.001 < found.start_spread_frac < 0.06


def test_each_configuration_is_predicted_once_with_all_of_its_starts(found: Validation) -> None:
    assert len(found.predictions) == 7
    assert all(one.starts == 2 for one in found.predictions)
    assert all(one.failed is None for one in found.predictions)
    saturated = [one for one in found.predictions if one.saturated]
    assert saturated
    assert all("ttft_p50_ms" not in one.metrics for one in saturated)


def test_without_measurements_of_its_kind_it_extrapolates(store: Path, tmp_path: Path) -> None:
    """What the others do not show is said, configuration by configuration."""
    told = validate(store, folds=7)
    assert any("batch" in text for one in told.predictions for text in one.beyond)


def test_the_priors_would_have_been_wrong() -> None:
    """The test above has something to find: the prior's law is another one."""
    simulator = Simulator.of(experiment(Path("unused"), gpu="L4"))
    assert simulator.calibration == Calibration(excluded=())
    assert prior(simulator.gpu, "awq-4 float16 eager").median.overhead_s * 1.6 > 0.02


def test_the_text_and_the_command(store: Path, found: Validation, capsys: pytest.CaptureFixture[str]) -> None:
    text = validation_text(found)
    for words in ("| max_num_seqs=4 |", "median ≤ 5%", "Kendall's tau", "saturated", "part 1: "):
        assert words in text
    run(lambda: app(["simulate", "--validate", str(store), "--json"], prog_name="varcas", standalone_mode=False))
    assert json.loads(capsys.readouterr().out)["folds"] == 2


def test_simulated_rows_are_no_truth(tmp_path: Path) -> None:
    sweep(experiment(tmp_path))
    with pytest.raises(InputError, match="simulated left out"):
        validate(tmp_path)
    with pytest.raises(InputError, match="holds no results"):
        validate(tmp_path / "nowhere")
