"""Requests of one's own (`workload.data`): lengths or texts from a file, whose format is told from what stands in it.

A new format of lengths is a line in `FORMATS` (`table.py`).
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet

from varcas.errors import InputError
from varcas.workload.conversation import Conversation
from varcas.workload.data.files import CSV_TEXT, Container, Numbers, container_of, open_records, rows_of
from varcas.workload.data.table import FORMATS, Table
from varcas.workload.data.texts import TEXT_FIELDS, Texts

KNOWN = "; ".join(
    [*(f"{f.prompt}, {f.output} ({f.name})" for f in FORMATS), "conversations (ShareGPT), messages, prompt (texts)"]
)


class Data(Protocol):
    """The records of a file, numbered from 0."""

    def __len__(self) -> int:
        """How many there are."""

    @property
    def times_us(self) -> Numbers:
        """Microseconds from the first record's arrival, in order. Raises InputError: there are none."""

    def conversation(self, row: int) -> Conversation | None:
        """A record; None when nothing in it can be asked. Raises InputError: it is not as its format says."""

    def check(self, limit: int | None) -> None:
        """Looks at every record. Raises InputError: one is not as its format says, or longer than `limit` tokens."""


def open_data(path: str) -> Data:
    """Opens a file; what was made of it is kept until it changes.

    Raises:
        InputError: there is none, or its format is not known.
    """
    try:
        status = Path(path).stat()
    except OSError as error:
        raise InputError(f"workload.data: {path}: cannot be read: {error.strerror}.") from error
    return _open(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2)
def _open(path: str, mtime_ns: int, size: int) -> Data:
    container = container_of(path)
    names = _names(path, container)
    if any(name in names for name in TEXT_FIELDS):
        return Texts(path, open_records(path, container))
    for columns in FORMATS:
        if columns.prompt in names and columns.output in names:
            return Table.read(path, container, columns, names)
    found = ", ".join(name if name.isprintable() else repr(name) for name in names)[:200] or "nothing"
    raise InputError(f"{path}: its format is not known: found {found}; allowed are {KNOWN}.")


def _names(path: str, container: Container) -> list[str]:
    """The fields of the first record."""
    if container == "parquet":
        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: no Parquet file: {error}") from error
    if container == "csv":
        with Path(path).open(**CSV_TEXT) as file:
            return next(csv.reader(file), [])
    first: Mapping[str, Any] = next(rows_of(path, container), (0, {}))[1]
    return list(first)
