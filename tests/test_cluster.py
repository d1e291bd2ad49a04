"""cluster.yaml against Ray's own schema and filler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return loaded


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_ray_would_refuse_a_broken_one(cluster: dict[str, Any]) -> None:
    cluster["max_wrokers"] = 3
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(cluster))


def test_workers_are_t4s_with_one_gpu_each(cluster: dict[str, Any]) -> None:
    worker = cluster["available_node_types"]["t4"]
    assert worker["resources"]["GPU"] == 1
    assert worker["resources"]["accelerator_type:T4"] == 1
    assert worker["node_config"]["guestAccelerators"][0]["acceleratorType"] == "nvidia-tesla-t4"


def test_ray_is_started_with_token_authentication(cluster: dict[str, Any]) -> None:
    for command in (cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
