"""The result store: what was measured, in Parquet, on disk before anyone else hears of it.

    results/
      trials/    one row a measurement; the trial's file here is its commit point
      requests/  one row a request          samples/  one row a look at server and GPU
      studies/   NAME.json: the experiment as it was last run
      .lock      held by the one writer, released by the kernel when it dies

A file is written under a dot-name, fsynced, renamed, and the folder fsynced: a reader sees it whole or not at all.
requests and samples come before the trial's row; without their row they are orphans, which the next writer removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import socket
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import duckdb
import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pydantic import ValidationError

from varcas.errors import InputError, VarcasError
from varcas.records import RequestRecord, Sample, TrialRow

SCHEMA_VERSION = 1
"""Raised with every added column; tests/golden holds a store of each version, and all stay readable."""

DATASETS = ("trials", "requests", "samples")
COMPACT_ABOVE = 200
"""Files in a dataset beyond which `close` compacts it."""

COMPACT_LIMIT_BYTES = 1 << 30
"""A compact file that has grown so large is left as it is: rewriting it for each 200 trials would cost too much."""

ROW_GROUP_BYTES = 64 << 20
"""Rows that `compact` holds in memory at a time."""

log = logging.getLogger(__name__)
T = TypeVar("T", RequestRecord, Sample)

# schemas

SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime.datetime: pa.timestamp("us", tz="UTC"),
}
CONTAINERS: dict[Any, pa.DataType] = {
    dict[str, str]: pa.map_(pa.string(), pa.string()),
    dict[str, float]: pa.map_(pa.string(), pa.float64()),
    list[str]: pa.list_(pa.string()),
    tuple[float, ...]: pa.list_(pa.float64()),  # exact: metrics computed again from the store are the row's
    tuple[int, ...]: pa.list_(pa.int32()),
}


def arrow_type(annotation: Any) -> pa.DataType:
    """The column type of an annotation; `X | None` is X's, a Literal is text.

    Raises:
        TypeError: no column type is known for it.
    """
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = [arg for arg in typing.get_args(annotation) if arg is not types.NoneType]
    if typing.get_origin(annotation) is Literal:
        annotation = str
    if (found := SCALARS.get(annotation) or CONTAINERS.get(annotation)) is None:
        raise TypeError(f"no Arrow type for {annotation}: add it to SCALARS or CONTAINERS in store.py")
    return found


def _schema(annotations: Mapping[str, Any]) -> pa.Schema:
    metadata = {"schema_version": str(SCHEMA_VERSION)}
    return pa.schema([pa.field(name, arrow_type(found)) for name, found in annotations.items()], metadata)


_OWNER = {"trial_id": str, "study": str, "number": int}
SCHEMAS: dict[str, pa.Schema] = {
    "trials": _schema({name: field.annotation for name, field in TrialRow.model_fields.items()}),
    "requests": _schema(_OWNER | typing.get_type_hints(RequestRecord)),
    "samples": _schema(_OWNER | typing.get_type_hints(Sample)),
}
"""The one fixed schema of each dataset: every column is typed in every file, all null or not."""


class Store:
    """A results directory. One writer at a time; readers need no lock and may come while a sweep runs.

    Args:
        path: the directory; a writer makes it.
        readonly: take no lock, change nothing.

    Raises:
        InputError: the directory cannot be written, or another process writes to it.
    """

    def __init__(self, path: str | Path, *, readonly: bool = False) -> None:
        self.path = Path(path).absolute()
        self.readonly = readonly
        self._rows: dict[str, list[TrialRow]] = {}  # file name in trials/ → its rows
        self._ids: set[str] = set()
        self._warned: set[Path] = set()
        self._lock: filelock.BaseFileLock | None = None
        if not readonly:
            self._lock = _locked(self.path)
            try:
                self._recover()
            except BaseException:
                self._release()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(compact=kind is None)

    def close(self, *, compact: bool = True) -> None:
        """Compacts datasets of more than `COMPACT_ABOVE` files, and lets go of the lock. May be called twice."""
        if self._lock is None:
            return
        try:
            if compact:
                self._compact_datasets(above=COMPACT_ABOVE)
        finally:
            self._release()

    # write

    def append(self, row: TrialRow, records: Iterable[RequestRecord] = (), samples: Iterable[Sample] = ()) -> None:
        """Puts a measurement on disk; when this returns, no kill and no power cut takes it away.

        Raises:
            VarcasError: the trial is there already, the store is not open for writing, or the disk refused.
        """
        self._writable()
        if row.trial_id in self._ids:
            raise VarcasError(f"{self.path}: trial {row.trial_id} is there already: a measurement is recorded once")
        name = f"{_stem(row)}.parquet"
        parts = {"requests": _owned(row, "requests", records), "samples": _owned(row, "samples", samples)}
        try:
            for dataset, table in parts.items():
                if table.num_rows:
                    _write(self.path / dataset / name, [table], SCHEMAS[dataset])
            _write(self.path / "trials" / name, [_table([row.model_dump()], SCHEMAS["trials"])], SCHEMAS["trials"])
        except OSError as error:
            raise VarcasError(f"{self.path}: trial {row.number} could not be written: {error}") from error
        self._rows[name] = [row]
        self._ids.add(row.trial_id)

    def save_study(self, name: str, study: Mapping[str, Any]) -> None:
        """Keeps an experiment as it was run, with its fingerprint, in `studies/NAME.json`.

        Raises:
            VarcasError: the store is not open for writing, or the disk refused.
        """
        self._writable()
        path = self.path / "studies" / f"{name}.json"
        try:
            with _replacing(path) as file:
                file.write(json.dumps(study, indent=2, sort_keys=True).encode())
        except OSError as error:
            raise VarcasError(f"{path}: could not be written: {error}") from error

    def compact(self) -> None:
        """Merges the files of each dataset into one, and may be killed at any instant.

        The merged file names its sources in its metadata. While both are there, readers pass the sources over; what a
        kill leaves of them the next writer removes.

        Raises:
            VarcasError: the store is not open for writing, or the disk refused.
        """
        self._writable()
        self._compact_datasets(above=1)

    # read

    def rows(self, study: str | None = None) -> list[TrialRow]:
        """Rows of one study, or of all, by study and number; each file is read once, whoever asks how often."""
        if self.readonly:
            self._refresh()
        rows = [row for rows in self._rows.values() for row in rows if study is None or row.study == study]
        return sorted(rows, key=lambda row: (row.study, row.number, row.attempt, row.started_at))

    def requests(self, trial_id: str) -> list[RequestRecord]:
        """Every request of one trial, as recorded; empty when it had none."""
        return self._records("requests", trial_id, RequestRecord)

    def samples(self, trial_id: str) -> list[Sample]:
        """Every sample of one trial, as recorded; empty when it had none."""
        return self._records("samples", trial_id, Sample)

    def study_names(self) -> list[str]:
        """Studies that have a row or a saved experiment."""
        saved = {path.stem for path in (self.path / "studies").glob("*.json")}
        return sorted(saved | {row.study for row in self.rows()})

    def study(self, name: str) -> dict[str, Any] | None:
        """What `save_study` kept, or None.

        Raises:
            InputError: the file is no JSON.
        """
        path = self.path / "studies" / f"{name}.json"
        try:
            kept: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}. Remove it: the next sweep writes it anew.") from error
        return kept

    def sql(self, query: str) -> pa.Table:
        """Answers DuckDB SQL over the views `trials`, `requests` and `samples`, and no other file.

        `trials` has one more column a flag, `flag_NAME`: of the flag's own type where all trials agree on one
        (integers and floats meet as floats), else text.

        Raises:
            InputError: in DuckDB's words.
        """
        settings = {"python_enable_replacements": "false", "TimeZone": "UTC"}
        with duckdb.connect(config=settings) as connection:
            connection.register("trials", self._trials_view())
            for dataset in ("requests", "samples"):
                if re.search(dataset, query, re.IGNORECASE):
                    connection.register(dataset, self._dataset(dataset))
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            try:
                answer = connection.sql(query)
                return pa.table({}) if answer is None else answer.to_arrow_table()
            except duckdb.Error as error:
                raise InputError(f"SQL: {error}") from error

    # pieces

    def _writable(self) -> None:
        if self._lock is None:
            raise VarcasError(f"{self.path}: the store is not open for writing")

    def _release(self) -> None:
        if self._lock is not None:
            (self.path / HOLDER).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def _recover(self) -> None:
        """Removes what a killed writer left: temporaries, merged sources, requests and samples without a row."""
        for dataset in DATASETS:
            for path in (self.path / dataset).glob(".*.tmp"):
                path.unlink()
            for path in self._superseded(dataset):
                path.unlink()
        if self._refresh():  # a row that cannot be read must not cost its requests
            known = {_stem(row) for rows in self._rows.values() for row in rows}
            for dataset in ("requests", "samples"):
                for path in (self.path / dataset).glob("*.parquet"):
                    if path.stem not in known and not path.name.startswith(COMPACT):
                        path.unlink()

    def _superseded(self, dataset: str) -> list[Path]:
        directory = self.path / dataset
        names = {name for path in directory.glob(f"{COMPACT}*.parquet") for name in self._sources(path)}
        return [path for name in sorted(names) if (path := directory / name).exists()]

    def _sources(self, path: Path) -> list[str]:
        """Files that a compact file was merged from."""
        try:
            metadata = pq.read_metadata(path).metadata or {}
        except FileNotFoundError:
            return []
        except (OSError, pa.ArrowException) as error:
            self._warn(path, error)
            return []
        names: list[str] = json.loads(metadata.get(b"sources", b"[]"))
        return names

    def _files(self, dataset: str) -> list[Path]:
        """The files to read, each row once, whatever a compaction does meanwhile.

        A listing is no snapshot: it is taken again until nothing that it holds has gone and no compact file has come.
        """
        while True:
            listed = set((self.path / dataset).glob("*.parquet"))
            merged = {path: self._sources(path) for path in listed if path.name.startswith(COMPACT)}
            now = set((self.path / dataset).glob("*.parquet"))
            if listed <= now and not any(path.name.startswith(COMPACT) for path in now - listed):
                gone = {name for names in merged.values() for name in names}
                return sorted(path for path in listed if path.name not in gone)

    def _refresh(self) -> bool:
        """Reads trial files not read before, and forgets those that are gone; False when one could not be read."""
        while True:
            paths, whole = self._files("trials"), True
            fresh: dict[str, list[TrialRow]] = {}
            try:
                for path in paths:
                    rows = self._rows.get(path.name) or self._read_rows(path)
                    whole &= rows is not None
                    fresh[path.name] = rows or []
            except FileNotFoundError:  # compacted between the listing and the look
                continue
            self._rows = fresh
            self._ids = {row.trial_id for rows in fresh.values() for row in rows}
            return whole

    def _read_rows(self, path: Path) -> list[TrialRow] | None:
        table = self._read(path)
        if table is None:
            return None
        known = table.select([name for name in table.column_names if name in TrialRow.model_fields])
        try:
            return [_row(values) for values in known.to_pylist(maps_as_pydicts="strict")]
        except ValidationError as error:
            self._warn(path, error)
            return None

    def _read(self, path: Path, **options: Any) -> pa.Table | None:
        try:
            return pq.read_table(path, partitioning=None, **options)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            self._warn(path, error)
            return None

    def _warn(self, path: Path, error: Exception) -> None:
        if path not in self._warned:
            self._warned.add(path)
            log.warning("%s: cannot be read and is left out: %s", path, " ".join(str(error).split())[:200])

    def _records(self, dataset: str, trial_id: str, kind: type[T]) -> list[T]:
        names = {f"{_stem(row)}.parquet" for row in self.rows() if row.trial_id == trial_id}
        mine = [("trial_id", "=", trial_id)]
        fields = [field.name for field in dataclasses.fields(kind)]
        while True:
            paths = [path for path in self._files(dataset) if path.name in names or path.name.startswith(COMPACT)]
            try:
                tables = [table for path in paths if (table := self._read(path, filters=mine)) is not None]
            except FileNotFoundError:  # compacted between the listing and the look
                continue
            return [
                kind(**{name: _plain(values.get(name)) for name in fields})
                for table in tables
                for values in table.to_pylist()
            ]

    def _dataset(self, dataset: str) -> pads.Dataset:
        paths = [str(path) for path in self._files(dataset) if self._sound(path)]
        if not paths:
            return pads.dataset(SCHEMAS[dataset].empty_table())
        return pads.dataset(paths, schema=SCHEMAS[dataset], format="parquet")

    def _sound(self, path: Path) -> bool:
        try:
            pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            self._warn(path, error)
            return False
        return True

    def _trials_view(self) -> pa.Table:
        rows = self.rows()
        table = _table([row.model_dump() for row in rows], SCHEMAS["trials"])
        flags = [json.loads(row.config_json) for row in rows]
        for name in sorted({name for found in flags for name in found}):
            table = table.append_column(f"flag_{name}", _flag_column([found.get(name) for found in flags]))
        return table

    # compaction

    def _compact_datasets(self, *, above: int) -> None:
        for dataset in DATASETS:
            files = [path for path in self._files(dataset) if path.stat().st_size < COMPACT_LIMIT_BYTES]
            if len(files) > above:
                try:
                    self._compact(dataset, files)
                except OSError as error:
                    raise VarcasError(f"{self.path / dataset}: could not be compacted: {error}") from error
        self._refresh()

    def _compact(self, dataset: str, files: list[Path]) -> None:
        sound = [path for path in files if self._read_rows(path) is not None] if dataset == "trials" else files
        merged = [path for path in sound if self._sound(path)]
        schema = SCHEMAS[dataset]
        metadata = {**schema.metadata, b"sources": json.dumps([path.name for path in merged]).encode()}
        target = _next_compact(self.path / dataset)
        _write(target, _grouped(_cast(pq.read_table(path, partitioning=None), schema) for path in merged), schema.with_metadata(metadata))
        for path in merged:
            path.unlink()
        _fsync_directory(target.parent)


# the lock

LOCK = ".lock"
HOLDER = ".lock.holder"
COMPACT = "compact-"


def _locked(path: Path) -> filelock.BaseFileLock:
    """Makes the directories and takes the lock on them."""
    lock = filelock.FileLock(path / LOCK, timeout=0)
    try:
        for name in (*DATASETS, "studies"):
            (path / name).mkdir(parents=True, exist_ok=True)
        lock.acquire()
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        (path / HOLDER).write_text(json.dumps(holder), encoding="utf-8")
    except filelock.Timeout:
        raise InputError(
            f"results: {str(path)!r} is in use by {_holder(path)}. "
            "Wait for it or stop it, or give another `results` directory."
        ) from None
    except (OSError, NotImplementedError) as error:
        lock.release()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"results: {str(path)!r} cannot be written: {reason}. Give a directory that can.") from error
    return lock


def _holder(path: Path) -> str:
    try:
        holder = json.loads((path / HOLDER).read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


# files


def _stem(row: TrialRow) -> str:
    return f"{row.study}-{row.number:06d}-{row.trial_id[:12]}"


def _next_compact(directory: Path) -> Path:
    taken = [int(path.stem.removeprefix(COMPACT)) for path in directory.glob(f"{COMPACT}*.parquet")]
    return directory / f"{COMPACT}{max(taken, default=0) + 1:06d}.parquet"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A file that takes its name once it is whole and on the disk; nothing is left of it otherwise."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_directory(path.parent)


def _fsync_directory(directory: Path) -> None:
    """Makes renames and removals last; without it a power cut may take the name back."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    split = ["token_offsets_s.list.element"] if "token_offsets_s" in schema.names else False
    leaves = _leaves(schema)
    plain = [name for name in leaves if not split or name not in split]
    with _replacing(path) as file, pq.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=plain, use_byte_stream_split=split
    ) as writer:
        for table in tables:
            writer.write_table(table)


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins small tables into row groups of about `ROW_GROUP_BYTES`."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(part.nbytes for part in held) >= ROW_GROUP_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)
