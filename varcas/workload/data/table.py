"""Lengths from a file: columns of numbers, none of which becomes a Python object but those a window needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from varcas.errors import InputError
from varcas.workload.conversation import Conversation, Turn
from varcas.workload.data.files import (
    MAX_TIME_S,
    MAX_TOKENS,
    TIME,
    US,
    WHOLE,
    Container,
    Numbers,
    bad_value,
    is_time,
    is_whole,
    rows_of,
)

JSON_BLOCK_BYTES = 16 << 20
"""Arrow's JSON reader refuses a record that is longer."""
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


@dataclass(frozen=True, slots=True)
class Columns:
    """A format of lengths: how its columns are called.

    Attributes:
        name: for people.
        prompt: tokens of the whole prompt.
        output: tokens of the answer.
        time: of arrival, a number or an ISO 8601 time; may be missing.
        unit_us: microseconds in a unit of a time that is a number.
        blocks: lists of ids of the prompt's blocks.
    """

    name: str
    prompt: str
    output: str
    time: str
    unit_us: int = US
    blocks: str | None = None

    @property
    def time_allowed(self) -> str:
        """Says what a time may be."""
        return TIME if self.unit_us == US else TIME.replace("in seconds, and at most 1e11", "in ms, and at most 1e14")


FORMATS = (
    Columns("Azure LLM inference trace", "ContextTokens", "GeneratedTokens", "TIMESTAMP"),
    Columns("Mooncake trace", "input_length", "output_length", "timestamp", 1000, "hash_ids"),
    Columns("plain", "prompt_tokens", "output_tokens", "timestamp"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Lengths in columns.

    Attributes:
        path: of the file, for messages.
        prompt: tokens of each prompt.
        output: tokens of each answer.
        times: microseconds from the first; None without a column of times.
        blocks: ids of all prompts' blocks, one after the other; None without.
        ends: where each prompt's ids end in `blocks`.
        rows: number of each record in the file, from 1, where they are sorted by time.
    """

    path: str
    prompt: Numbers
    output: Numbers
    times: Numbers | None
    blocks: Numbers | None
    ends: Numbers | None
    rows: Numbers | None

    @classmethod
    def read(cls, path: str, container: Container, columns: Columns, names: list[str]) -> Table:
        """Reads the columns. Raises InputError: a value is not as it should be."""
        wanted = [columns.prompt, columns.output]
        wanted += [name for name in (columns.time, columns.blocks) if name in names and name]
        if twice := [name for name in wanted if names.count(name) > 1]:
            raise InputError(f"{path}: there are {names.count(twice[0])} columns {twice[0]}: which one counts?")
        try:
            table = _arrow(path, container, wanted)
            if not table.num_rows:
                raise InputError(f"{path}: has no records.")
            prompt, output = (_whole(table[name], 1, MAX_TOKENS) for name in wanted[:2])
            times = _times_us(table[columns.time], columns.unit_us) if columns.time in wanted else None
            blocks, ends = _blocks(table[columns.blocks]) if columns.blocks in wanted else (None, None)
        except (pa.ArrowException, ValueError) as error:
            raise _explained(path, container, columns, names, error) from error
        return cls(path, prompt, output, times, blocks, ends, None)._sorted()

    def _sorted(self) -> Table:
        """By time, for the few traces that are not."""
        if self.times is None or not np.any(np.diff(self.times) < 0):
            return self
        order = np.argsort(self.times, kind="stable")
        starts = None if self.ends is None else np.concatenate(([0], self.ends[:-1]))
        blocks, ends = self.blocks, self.ends
        if starts is not None and ends is not None and self.blocks is not None:
            blocks = np.concatenate([self.blocks[starts[row] : ends[row]] for row in order])
            ends = np.cumsum((ends - starts)[order])
        times = self.times[order] - self.times[order[0]]
        return Table(self.path, self.prompt[order], self.output[order], times, blocks, ends, order + 1)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.prompt)

    @property
    def times_us(self) -> Numbers:
        """Microseconds from the first."""
        if self.times is None:
            raise InputError(f"{self.path}: `arrival: trace` needs a column of times (`timestamp`), and it has none.")
        return self.times

    def conversation(self, row: int) -> Conversation:
        """One turn."""
        ids: tuple[int, ...] = ()
        if self.blocks is not None and self.ends is not None:
            ids = tuple(self.blocks[self.ends[row - 1] if row else 0 : self.ends[row]].tolist())
        return Conversation([Turn(int(self.prompt[row]), int(self.output[row]), blocks=ids)])

    def check(self, limit: int | None) -> None:
        """Whether every one fits."""
        if limit is not None and (long := np.flatnonzero(self.prompt + self.output > limit)).size:
            raise self.too_long(int(long[0]), limit)

    def too_long(self, row: int, limit: int) -> InputError:
        """Says so."""
        number = row + 1 if self.rows is None else int(self.rows[row])
        asked = f"{self.prompt[row]} + {self.output[row]} tokens do not fit the {limit} that the server takes"
        return InputError(
            f"{self.path}: row {number}: {asked}: raise `max_model_len`, or write `workload.max_tokens: {limit}`, "
            "and longer ones are cut to that."
        )


def _arrow(path: str, container: Container, wanted: list[str]) -> pa.Table:
    if container == "json":
        raise InputError(f"{path}: lengths come as CSV, JSONL or Parquet, not as a JSON array.")
    if container == "parquet":
        return pyarrow.parquet.read_table(path, columns=wanted)
    if container == "csv":
        return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(include_columns=wanted))
    options = pyarrow.json.ReadOptions(block_size=JSON_BLOCK_BYTES)
    return pyarrow.json.read_json(path, read_options=options).select(wanted)


def _blocks(column: pa.ChunkedArray) -> tuple[Numbers, Numbers]:
    """Ids one after the other, and where each record's end; a record without a list has none.

    Raises ValueError: these are no lists of ids.
    """
    lists = column.combine_chunks()
    if not (any(is_one(lists.type) for is_one in LISTS)):
        raise ValueError("not all are lists")
    ids = lists.flatten()
    if pa.types.is_null(ids.type) and not len(ids):  # all of them are empty
        ids = ids.cast(pa.int64())
    ends = np.cumsum(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
    return _whole(pa.chunked_array([ids]), 0, None), ends


def _whole(column: pa.ChunkedArray, least: int, most: int | None) -> Numbers:
    """Raises ValueError: a value is none, no whole number, or out of bounds."""
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ValueError("not all are whole numbers")
    values = column.to_numpy()
    with np.errstate(invalid="ignore"):  # no number at all: it differs from what it becomes
        whole = values.astype(np.int64)
    if np.any(whole != values) or np.any(whole < least) or (most is not None and np.any(whole > most)):
        raise ValueError("not all are whole numbers")
    numbers: Numbers = whole
    return numbers


def _times_us(column: pa.ChunkedArray, unit_us: int) -> Numbers:
    """Microseconds from the first. Raises ValueError: a value is no time."""
    if column.null_count:
        raise ValueError("a time is missing")
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        column = _iso_8601(column)
        since_ns = column.cast(pa.timestamp("ns", column.type.tz)).to_numpy().astype(np.int64)
        times: Numbers = (since_ns - since_ns[:1] + 500) // 1000
        return times
    values = column.to_numpy()
    if not np.all(np.abs(values) <= MAX_TIME_S * US / unit_us):  # nor is one NaN
        raise ValueError("not all are times")
    if pa.types.is_integer(column.type):
        values = values.astype(np.int64)  # unsigned ones cannot go back in time
    elapsed: Numbers = np.rint((values - values[:1]) * float(unit_us)).astype(np.int64)
    return elapsed


def _iso_8601(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times with a zone, or without, however they are held. Raises ArrowException: one is none."""
    if pa.types.is_timestamp(column.type):
        return column
    column = column.cast(pa.string())
    try:
        return column.cast(pa.timestamp("ns", "UTC"))
    except pa.ArrowInvalid:
        return column.cast(pa.timestamp("ns"))


def _explained(path: str, container: Container, columns: Columns, names: list[str], error: Exception) -> InputError:
    """Finds the first value that is not as it should be."""
    for number, row in rows_of(path, container):
        for field in (columns.prompt, columns.output):
            if not is_whole(row.get(field)) or (container != "csv" and isinstance(row[field], str)):
                return bad_value(path, number, field, row.get(field), WHOLE)
        if columns.time in names and not is_time(row.get(columns.time), columns.unit_us / US):
            return bad_value(path, number, columns.time, row.get(columns.time), columns.time_allowed)
        ids = (row.get(columns.blocks) or []) if columns.blocks else []
        if not isinstance(ids, list) or not all(isinstance(id_, int) and id_ >= 0 for id_ in ids):
            return bad_value(path, number, str(columns.blocks), ids, "must be a list of whole numbers.")
    return InputError(f"{path}: {' '.join(str(error).split())[:300]}")
