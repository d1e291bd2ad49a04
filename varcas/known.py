"""A model's `config.json` by its name: a directory's own, the hub cache's, varcas's own copy, or the hub's.

varcas's own copies (`configs/`, by hub id in `configs/index.toml`) make the roofline answer without the network. They
hold the fields that decide shapes and formats; whoever uses one says so (`Found.source`).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import tomllib
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from varcas.errors import InputError, nearest
from varcas.model import ModelSpec, describe, from_config

Origin = Literal["directory", "hub cache", "own copy", "hub"]
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Found:
    """A model, and where its `config.json` was found.

    Attributes:
        model: what it says.
        config: its raw content.
        origin: which of the four places.
        source: the place in words.
    """

    model: ModelSpec
    config: Mapping[str, Any]
    origin: Origin
    source: str


class _Copy(BaseModel):
    """One table of `configs/index.toml`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    hub: list[str] = Field(min_length=1)
    date: str = Field(pattern=r"^20\d\d-\d\d$")


@functools.cache
def copies() -> Mapping[str, tuple[str, str]]:
    """Hub id to the directory in `configs/` that stands for it, and the copy's year and month.

    Raises:
        InputError: `configs/index.toml` is not as it should be.
    """
    text = resources.files("varcas").joinpath("configs/index.toml").read_text(encoding="utf-8")
    try:
        tables = {name: _Copy.model_validate(table) for name, table in tomllib.loads(text).items()}
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise InputError(f"configs/index.toml: {error}") from error
    return {hub: (name, table.date) for name, table in tables.items() for hub in table.hub}


def find_model(name: str, revision: str | None = None) -> Found:
    """The model of a directory or a hub id. No weights are needed, and the network only where nothing else helps.

    Looks in a directory of that name, in the hub cache, among varcas's own copies, and at last asks the hub. With a
    `revision` the hub is asked before a copy is taken, which may be of another one.

    Raises:
        InputError: found nowhere, or not described here.
    """
    if (Path(name).expanduser() / "config.json").is_file():
        path = Path(name).expanduser() / "config.json"
        model = describe(path.parent)
        return Found(model, _config(name, path), "directory", str(path))
    places: list[Callable[[str, str | None], Found | None]] = [_cached, _asked, _copied]
    for place in places if revision else [_cached, _copied, _asked]:
        if (found := place(name, revision)) is not None:
            return found
    raise InputError(
        f"model: {name}: its config.json is neither in a directory of that name, in the hub cache nor among varcas's "
        f"own copies, and the hub gave none.{nearest(name, copies())} Give a directory with the model's config.json "
        "(weights are not needed)."
    )


def _copied(name: str, revision: str | None) -> Found | None:
    """A copy of varcas's own; hub ids differ in more than case."""
    hub = next((known for known in copies() if known.lower() == name.lower()), None)
    if hub is None:
        return None
    directory, date = copies()[hub]
    text = resources.files("varcas").joinpath(f"configs/{directory}/config.json").read_text(encoding="utf-8")
    unseen = f"; revision {revision} was not looked at" if revision else ""
    source = f"varcas's own copy of {date} (varcas/configs/{directory}/config.json{unseen})"
    config = json.loads(text)
    return Found(from_config(config, name, f"configs/{directory}/config.json"), config, "own copy", source)


def _cached(name: str, revision: str | None) -> Found | None:
    """From what the hub's own library has fetched before; None without that library."""
    hub = _hub()
    path = hub.try_to_load_from_cache(name, "config.json", revision=revision) if hub and _is_hub_id(name) else None
    if not isinstance(path, str):
        return None
    config = _config(name, Path(path))
    return Found(from_config(config, name, path), config, "hub cache", path)


def _asked(name: str, revision: str | None) -> Found | None:
    """From the hub, with HF_TOKEN of the environment; None without network or such a model. Asks once: no retries."""
    if not _is_hub_id(name) or os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0"):
        return None
    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{name}/resolve/{revision or 'main'}/config.json"
    request = urllib.request.Request(url)  # noqa: S310
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S) as answer:  # noqa: S310
            config = json.loads(answer.read())
    except (OSError, ValueError):
        return None
    return Found(from_config(config, name, url), config, "hub", url)


def _config(name: str, path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model: {name}: {path}: no readable config.json ({error}).") from error
    return config


def _is_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith(("/", ".", "~"))


@functools.cache
def _hub() -> ModuleType | None:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        return None
