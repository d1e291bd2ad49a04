"""The result store: what was measured, in Parquet, on disk before anyone else hears of it.

    results/
      trials/    one row a measurement; the trial's file here is its commit point
      requests/  one row a request          samples/  one row a look at server and GPU
      studies/   NAME.json: the experiment as it was last run
      .lock      held by the one writer, released by the kernel when it dies

A file is written under a dot-name, fsynced, renamed, and the folder fsynced: a reader sees it whole or not at all.
requests and samples come before the trial's row; without their row they are orphans, which the next writer removes.
It also brings files of an older schema up to its own, so that any reader of Parquet can read a dataset as it stands:

    pyarrow.dataset.dataset("results/trials")
    duckdb.sql("select * from 'results/trials/*.parquet'")
    polars.scan_parquet("results/trials/*.parquet")
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

COMPACT_LIMIT_BYTES = 256 << 20
"""A compact file that has grown so large is left as it is: rewriting it for each 200 trials would cost too much."""

ROW_GROUP_ROWS = 1000
"""Least rows of a compact file's row group: a trial's requests have one of their own, and are found fast by it."""

LOCK = ".lock"
HOLDER = ".lock.holder"
COMPACT = re.compile(r"compact-(\d{6,})")
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
        except VarcasError as error:  # every row is safe where it is: slower to read, nothing more
            log.warning("%s", error)
        finally:
            self._release()

    # write

    def append(
        self, row: TrialRow, records: Iterable[RequestRecord] | pa.Table = (), samples: Iterable[Sample] = ()
    ) -> None:
        """Puts a measurement on disk; when this returns, no kill and no power cut takes it away.

        Args:
            row: of `trials`.
            records: its requests; or a table of them in the schema of `requests`.
            samples: its samples.

        Raises:
            VarcasError: the trial is there already, the store is not open for writing, or the disk refused.
        """
        self._writable()
        if row.trial_id in self._ids:
            raise VarcasError(f"{self.path}: trial {row.trial_id} is there already: a measurement is recorded once")
        name = f"{_stem(row)}.parquet"
        requests = records if isinstance(records, pa.Table) else _owned(row, "requests", records)
        parts = {"requests": requests, "samples": _owned(row, "samples", samples)}
        try:
            for dataset, table in parts.items():
                if table.num_rows:
                    _write(self.path / dataset / name, table)
            columns = {field: [value] for field, value in row.model_dump().items()}
            _write(self.path / "trials" / name, _table(columns, SCHEMAS["trials"]))
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
        while True:
            views: dict[str, Any] = {}
            try:
                for name in DATASETS:
                    if name == "trials" or name in query.lower():
                        views[name] = self._dataset(name)
                views["trials"] = _with_flags(views["trials"].to_table())
                return _answer(query, views)
            except FileNotFoundError:  # compacted between the listing and the look
                continue
            except (duckdb.Error, OSError) as error:
                if not self._compacted_since(views):
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
        for dataset in (*DATASETS, "studies"):
            for path in (self.path / dataset).glob(".*.tmp"):
                path.unlink()
        for dataset in DATASETS:
            for path in self._superseded(dataset):
                path.unlink()
        if self._refresh():  # a row that cannot be read must not cost its requests
            for dataset in ("requests", "samples"):
                for path in set((self.path / dataset).glob("*.parquet")) - self._owned_files(dataset):
                    path.unlink()
        for dataset in DATASETS:
            self._upgrade(dataset)

    def _upgrade(self, dataset: str) -> None:
        """Merges files of an older schema into one of ours: a reader that takes the first file's columns loses none."""
        files = self._files(dataset)
        if any(footer is not None and _version(footer) < SCHEMA_VERSION for footer in map(self._footer, files)):
            self._compact(dataset, files)

    def _owned_files(self, dataset: str) -> set[Path]:
        """Files of trials that have a row."""
        known = {_stem(row) for rows in self._rows.values() for row in rows}
        return {path for path in (self.path / dataset).glob("*.parquet") if _is_compact(path) or path.stem in known}

    def _superseded(self, dataset: str) -> list[Path]:
        directory = self.path / dataset
        names = {name for path in directory.glob("*.parquet") if _is_compact(path) for name in self._sources(path)}
        return [path for name in sorted(names) if (path := directory / name).exists()]

    def _sources(self, path: Path) -> list[str]:
        """Files that a compact file was merged from."""
        try:
            footer = self._footer(path)
        except FileNotFoundError:
            return []
        if footer is None:
            return []
        names: list[str] = json.loads((footer.metadata or {}).get(b"sources", b"[]"))
        return names

    def _files(self, dataset: str) -> list[Path]:
        """The files to read, each row once, whatever a compaction does meanwhile.

        A listing is no snapshot: it is taken again until nothing that it holds has gone and no compact file has come.
        """
        while True:
            listed = set((self.path / dataset).glob("*.parquet"))
            merged = {name for path in listed if _is_compact(path) for name in self._sources(path)}
            now = set((self.path / dataset).glob("*.parquet"))
            if listed <= now and not any(_is_compact(path) for path in now - listed):
                return sorted(path for path in listed if path.name not in merged)

    def _refresh(self) -> bool:
        """Reads trial files not read before, and forgets those that are gone; False when one could not be read."""
        while True:
            try:
                read = {path.name: self._rows.get(path.name) or self._read_rows(path) for path in self._files("trials")}
                break
            except FileNotFoundError:  # compacted between the listing and the look
                continue
        self._rows = {name: rows for name, rows in read.items() if rows}
        self._ids = {row.trial_id for rows in self._rows.values() for row in rows}
        return None not in read.values()

    def _read_rows(self, path: Path) -> list[TrialRow] | None:
        """A trial file's rows; None when it is damaged."""
        if (table := self._read(path)) is None:
            return None
        known = table.select([name for name in table.column_names if name in TrialRow.model_fields])
        try:
            return [_row(values) for values in known.to_pylist(maps_as_pydicts="strict")]
        except ValidationError as error:
            self._warn(path, error)
            return None

    def _read(self, path: Path, trial_id: str | None = None) -> pa.Table | None:
        """A file's rows, or those of one trial in it; None when it is damaged."""
        try:
            if trial_id is not None and _is_compact(path):
                return pq.read_table(path, partitioning=None, filters=[("trial_id", "=", trial_id)])
            with pq.ParquetFile(path) as file:
                return file.read(use_threads=False)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            self._warn(path, error)
            return None

    def _footer(self, path: Path) -> pa.Schema | None:
        """A file's schema with the file's metadata; None when it is damaged."""
        try:
            with pq.ParquetFile(path) as file:
                return file.schema_arrow.with_metadata(file.metadata.metadata)
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
        fields = [field.name for field in dataclasses.fields(kind)]
        while True:
            paths = [path for path in self._files(dataset) if path.name in names or _is_compact(path)]
            try:
                tables = [self._read(path, trial_id) for path in paths]
            except FileNotFoundError:  # compacted between the listing and the look
                continue
            found = [values for table in tables if table is not None for values in table.to_pylist()]
            return [kind(**{name: _plain(values.get(name)) for name in fields}) for values in found]

    def _dataset(self, dataset: str) -> pads.Dataset:
        footers = {path: footer for path in self._files(dataset) if (footer := self._footer(path)) is not None}
        if not footers:
            return pads.dataset(SCHEMAS[dataset].empty_table())
        schema = _union(SCHEMAS[dataset], footers.values())
        return pads.dataset([str(path) for path in footers], schema=schema, format="parquet")

    def _compacted_since(self, views: Mapping[str, Any]) -> bool:
        """Whether a file that these views read from has gone."""
        files = [file for view in views.values() for file in getattr(view, "files", [])]
        return not all(Path(file).exists() for file in files)

    # compaction

    def _compact_datasets(self, *, above: int) -> None:
        for dataset in DATASETS:
            files = [path for path in self._files(dataset) if path.stat().st_size < COMPACT_LIMIT_BYTES]
            if len(files) > above:
                try:
                    self._compact(dataset, files)
                except (OSError, pa.ArrowException) as error:
                    raise VarcasError(f"{self.path / dataset}: could not be compacted: {error}") from error

    def _compact(self, dataset: str, files: list[Path]) -> None:
        directory = self.path / dataset
        if dataset == "trials":
            files = [path for path in files if path.name in self._rows]
        else:
            files = sorted(self._owned_files(dataset).intersection(files))
        footers = {path: footer for path in files if (footer := self._footer(path)) is not None}
        target = _next_compact(directory)
        merged = _merge(target, _union(SCHEMAS[dataset], footers.values()), ((p, self._read(p)) for p in footers))
        if dataset == "trials":
            self._rows[target.name] = [row for path in merged for row in self._rows.pop(path.name)]
        for path in merged:
            path.unlink()
        _fsync_directory(directory)


# the lock


def _locked(path: Path) -> filelock.BaseFileLock:
    """Makes the directories and takes the lock on them."""
    # no soft lock where the file system has none: that one outlives a kill
    lock = filelock.FileLock(path / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
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


def _is_compact(path: Path) -> bool:
    return COMPACT.fullmatch(path.stem) is not None


def _next_compact(directory: Path) -> Path:
    taken = [int(found[1]) for path in directory.glob("*.parquet") if (found := COMPACT.fullmatch(path.stem))]
    return directory / f"compact-{max(taken, default=0) + 1:06d}.parquet"


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


ONE_ROW = {"compression": "snappy", "use_dictionary": False, "write_statistics": False}
"""A file of one row is all footer: 11 kB so, 43 kB as below, and three times faster to write and read."""

MANY_ROWS = {"compression": "zstd"}
ARRIVALS = {
    "compression": "zstd",
    "use_dictionary": [*SCHEMAS["requests"].names, "token_counts.list.element"],
    "use_byte_stream_split": ["token_offsets_s.list.element"],
}
"""Arrival times do not repeat: with their bytes split, zstd takes a quarter off and a tenth of the time."""


@contextlib.contextmanager
def _parquet(path: Path, schema: pa.Schema, options: Mapping[str, Any]) -> Iterator[pq.ParquetWriter]:
    """A Parquet file that appears whole; Parquet's own types say all of ours, so Arrow's copy of the schema is out."""
    if "token_offsets_s" in schema.names:
        options = ARRIVALS
    with _replacing(path) as file, pq.ParquetWriter(file, schema, store_schema=False, **options) as writer:
        writer.add_key_value_metadata(schema.metadata)
        yield writer


def _write(path: Path, table: pa.Table) -> None:
    with _parquet(path, table.schema, ONE_ROW if len(table) == 1 else MANY_ROWS) as writer:
        writer.write_table(table)


def _merge(target: Path, schema: pa.Schema, sources: Iterable[tuple[Path, pa.Table | None]]) -> list[Path]:
    """Writes the readable sources into one file that names them, and returns them."""
    merged: list[Path] = []
    with _parquet(target, schema, MANY_ROWS) as writer:
        held: list[pa.Table] = []
        for path, table in sources:
            if table is None:
                continue
            merged.append(path)
            held.append(table)
            if sum(map(len, held)) >= ROW_GROUP_ROWS:
                writer.write_table(_fitted(held, schema))
                held = []
        if held:
            writer.write_table(_fitted(held, schema))
        writer.add_key_value_metadata({"sources": json.dumps([path.name for path in merged])})
    return merged


# tables


def _version(schema: pa.Schema) -> int:
    return int((schema.metadata or {}).get(b"schema_version", 0))


def _union(schema: pa.Schema, footers: Iterable[pa.Schema]) -> pa.Schema:
    """Our columns, and those of a newer version that some file has: an older varcas drops nothing either."""
    theirs = list(footers)
    fields = {field.name: field for found in (*theirs, schema) for field in found}
    ordered = dict.fromkeys([*schema.names, *fields])
    return pa.schema([fields[name] for name in ordered], {"schema_version": str(max(map(_version, (schema, *theirs))))})


def _fitted(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    """The tables as one, with every column of the schema, null where it has none."""
    table = pa.concat_tables(tables, promote_options="default").combine_chunks()
    have = dict(zip(table.column_names, table.columns, strict=True))
    columns = [
        have[field.name].cast(field.type) if field.name in have else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _table(columns: Mapping[str, list[Any]], schema: pa.Schema) -> pa.Table:
    return pa.table([_array(columns[field.name], field.type) for field in schema], schema=schema)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # half a surrogate pair, as a server's JSON may hold: no Parquet text
        clean = [None if text is None else text.encode("utf-8", "replace").decode() for text in values]
        return pa.array(clean, kind)


def _owned(row: TrialRow, dataset: str, records: Iterable[Any]) -> pa.Table:
    """Requests or samples as a table, with the trial that they belong to."""
    held, schema = list(records), SCHEMAS[dataset]
    columns: dict[str, list[Any]] = {name: [getattr(row, name)] * len(held) for name in _OWNER}
    for name in schema.names[len(_OWNER) :]:
        columns[name] = [getattr(record, name) for record in held]
    return _table(columns, schema)


def _row(values: Mapping[str, Any]) -> TrialRow:
    """A row from a file; a column that the file lacks, or that is null, has its default."""
    return TrialRow(**{name: value for name, value in values.items() if value is not None})


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# SQL


def _answer(query: str, views: Mapping[str, Any]) -> pa.Table:
    """Runs the query in a database of its own, which sees the views and no file."""
    shut = ("python_enable_replacements", "autoinstall_known_extensions", "autoload_known_extensions")
    with duckdb.connect(config=dict.fromkeys(shut, "false")) as connection:
        for name, view in views.items():
            connection.register(name, view)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        answer = connection.sql(query)
        return pa.table({}) if answer is None else answer.to_arrow_table()


def _with_flags(trials: pa.Table) -> pa.Table:
    """Adds a column `flag_NAME` for each flag that a trial has."""
    flags = [json.loads(text) for text in trials["config_json"].to_pylist()]
    for name in sorted({name for found in flags for name in found}):
        trials = trials.append_column(f"flag_{name}", _flag_column([found.get(name) for found in flags]))
    return trials


def _flag_column(values: list[Any]) -> pa.Array:
    """Values of the one type that all have; integers and floats are floats; text where nothing else holds all."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool} or kinds <= {str} or (kinds <= {int} and all(abs(v) < 1 << 63 for v in values if v is not None)):
        return pa.array(values, SCALARS[next(iter(kinds), str)])
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
