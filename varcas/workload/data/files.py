"""Files of records: how they are held, a record at a time, and what is wrong with one."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from varcas.errors import InputError

Container = Literal["csv", "jsonl", "json", "parquet"]
Numbers = npt.NDArray[np.int64]

US = 1_000_000
MAX_TOKENS = 2**31 - 1
MAX_TIME_S = 1e11
"""A larger number of seconds lies beyond the year 5000: it is one of milliseconds since 1970."""
WHOLE = f"must be a whole number of tokens, at least 1 and at most {MAX_TOKENS}."
TIME = "must be a number or an ISO 8601 time; a number is in seconds, and at most 1e11."
CSV_TEXT: Any = {"encoding": "utf-8-sig", "errors": "replace", "newline": ""}
WINDOW_BYTES = 8 << 20
DECODER = json.JSONDecoder()
SEPARATOR = re.compile(r"[ \t\r\n,]*")


def container_of(path: str) -> Container:
    """Told from the first bytes. Raises InputError: the file cannot be read."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError(f"workload.data: {path}: cannot be read: {error.strerror}.") from error
    if head.startswith(b"PAR1"):
        return "parquet"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return "json" if first == b"[" else "jsonl" if first == b"{" else "csv"


def rows_of(path: str, container: Container) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every record as it stands there, with its number from 1: to look at the first, and to say which one is wrong."""
    if container == "parquet":
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)
    elif container == "csv":
        with Path(path).open(**CSV_TEXT) as file:
            yield from enumerate(csv.DictReader(file), 1)
    else:
        records = open_records(path, container)
        yield from ((row + 1, records[row]) for row in range(len(records)))


def bad_value(path: str, row: int, field: str, value: object, allowed: str) -> InputError:
    """Names file, row, field, value, and what is allowed."""
    return InputError(f"{path}: row {row}: {field}: {shortened(value)}: {allowed}")


def shortened(value: object) -> str:
    """A value in an error's one line."""
    text = repr(value)
    return "missing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


def is_whole(value: object) -> bool:
    """Whether it is a number of tokens, also as text."""
    try:
        return not isinstance(value, bool) and 1 <= float(value) == int(float(value)) <= MAX_TOKENS  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def is_time(value: object, unit_s: float = 1.0) -> bool:
    """Whether `seconds_of` takes it, a number being in this unit."""
    try:
        seconds_of(value, unit_s)
    except (TypeError, ValueError):
        return False
    return True


def seconds_of(value: object, unit_s: float = 1.0) -> float:
    """Of a number, or of an ISO 8601 time, which is in UTC where it does not say. Raises ValueError, TypeError."""
    if isinstance(value, bool):
        raise ValueError(value)
    if not isinstance(value, datetime.datetime):
        try:
            seconds = float(value)  # type: ignore[arg-type]
        except ValueError:
            value = datetime.datetime.fromisoformat(str(value))
        else:
            if not abs(seconds) * unit_s <= MAX_TIME_S:  # nor is it NaN
                raise ValueError(value)
            return seconds * unit_s
    return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()


class Records(Protocol):
    """Records that are parsed when they are asked for."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        """One of them. Raises InputError: it is no JSON object."""


def open_records(path: str, container: Container) -> Records:
    """Finds where each record stands. Raises InputError: the file is broken, or holds no texts."""
    if container == "parquet":
        return _TableRecords(pyarrow.parquet.read_table(path))
    if container == "csv":
        raise InputError(f"{path}: texts come as JSONL, as a JSON array or as Parquet, not as CSV.")
    with Path(path).open("rb") as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    starts, ends = _elements(path, text) if container == "json" else _lines(text)
    return _JsonRecords(path, text, starts, ends)


@dataclass(frozen=True, slots=True)
class _TableRecords:
    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.table.slice(row, 1).to_pylist()[0]
        return found


@dataclass(frozen=True, slots=True)
class _JsonRecords:
    path: str
    text: mmap.mmap
    starts: Numbers
    ends: Numbers

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        try:
            found = json.loads(self.text[self.starts[row] : self.ends[row]].removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: row {row + 1}: not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"{self.path}: row {row + 1}: {shortened(found)}: must be a JSON object.")
        return found


def _lines(text: mmap.mmap) -> tuple[Numbers, Numbers]:
    """Where each line begins and ends; empty ones are left out."""
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    if not len(ends) or ends[-1] != len(text) - 1:
        ends = np.append(ends, len(text))
    starts = np.concatenate(([0], ends[:-1] + 1))
    filled = ends - starts > 1  # a lone carriage return is empty too
    return starts[filled], ends[filled]


def _elements(path: str, text: mmap.mmap) -> tuple[Numbers, Numbers]:
    """Where each object of a JSON array begins and ends: each is parsed once, in a window that slides over the file.

    The window is read as Latin-1, in which a character is a byte, whatever the text really is: only its quotes and
    brackets matter here. Raises InputError: an object is not valid, or the array is not closed.
    """
    starts: list[int] = []
    ends: list[int] = []
    base, size, at = text.find(b"[") + 1, WINDOW_BYTES, 0
    window = text[base : base + size].decode("latin-1")
    while True:
        at = SEPARATOR.match(window, at).end()  # type: ignore[union-attr]
        if window[at : at + 1] == "]":
            return np.array(starts, np.int64), np.array(ends, np.int64)
        try:
            end = DECODER.raw_decode(window, at)[1]
        except RecursionError as error:
            raise InputError(f"{path}: row {len(starts) + 1}: not valid JSON: {error}") from error
        except ValueError as error:
            if base + len(window) == len(text):
                raise InputError(
                    f"{path}: row {len(starts) + 1}: not valid JSON, or the file is cut off here: {error}"
                ) from error
            size = size if at else 2 * size  # an object that is longer than the window
            base, at = base + at, 0
            window = text[base : base + size].decode("latin-1")
            continue
        starts.append(base + at)
        ends.append(base + end)
        at = end
