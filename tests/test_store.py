from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.golden.make import GOLDEN, TRIALS, full_row, request, row
from varcas.errors import InputError, VarcasError
from varcas.records import RequestRecord, Sample, TrialRow
from varcas.store import COMPACT_ABOVE, DATASETS, SCHEMA_VERSION, SCHEMAS, Store, arrow_type

READERS = ("pyarrow", "duckdb", "polars")
GOLDENS = sorted(GOLDEN.glob("schema_v*"))


def read_with(reader: str, directory: Path, dataset: str) -> list[dict[str, Any]]:
    """A dataset as a reader without varcas gives it, files of several schema versions among them."""
    files = sorted((directory / dataset).glob("*.parquet"))
    if reader == "pyarrow":
        table = pads.dataset(files, schema=SCHEMAS[dataset], format="parquet").to_table()
        return table.to_pylist(maps_as_pydicts="strict")
    if reader == "duckdb":
        query = f"select * from read_parquet('{directory / dataset}/*.parquet', union_by_name=true)"
        return duckdb.sql(query).to_arrow_table().to_pylist(maps_as_pydicts="strict")
    return pl.concat([pl.scan_parquet(file) for file in files], how="diagonal").collect().to_dicts()


def read_plainly(reader: str, directory: Path, dataset: str) -> list[dict[str, Any]]:
    """A dataset in each reader's shortest words."""
    if reader == "pyarrow":
        return pads.dataset(directory / dataset).to_table().to_pylist(maps_as_pydicts="strict")
    if reader == "duckdb":
        table = duckdb.sql(f"select * from '{directory / dataset}/*.parquet'").to_arrow_table()
        return table.to_pylist(maps_as_pydicts="strict")
    return pl.scan_parquet(directory / dataset / "*.parquet").collect().to_dicts()


def as_json(value: Any) -> Any:
    return json.loads(
        json.dumps(value, default=lambda v: v.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z"))
    )


def fill(store: Store, numbers: range, *, records: int = 2) -> None:
    for number in numbers:
        store.append(row(number, {"max_num_seqs": number}), [request(i) for i in range(records)], [Sample(t_s=0.0)])


# what is written is what is read

texts = st.text(st.characters(codec="utf-8"), max_size=20)
floats = st.floats(allow_nan=False)
optional_floats = st.none() | floats
RECORDS = st.builds(
    RequestRecord,
    index=st.integers(0, 2**40),
    scheduled_s=floats,
    sent_s=optional_floats,
    first_token_s=optional_floats,
    last_token_s=optional_floats,
    end_s=optional_floats,
    scheduled_prompt_tokens=st.integers(0, 2**31),
    scheduled_output_tokens=st.integers(0, 2**31),
    prompt_tokens=st.none() | st.integers(0, 2**31),
    output_tokens=st.integers(0, 2**31),
    token_offsets_s=st.lists(floats, max_size=5).map(tuple),
    token_counts=st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple),
    finish_reason=st.none() | texts,
    error=st.none() | texts,
    http_status=st.none() | st.integers(0, 999),
    conversation=st.integers(0, 2**31),
    turn=st.integers(0, 2**31),
)
SAMPLES = st.builds(
    Sample,
    t_s=floats,
    gpu_throttled=st.none() | st.booleans(),
    **{f.name: optional_floats for f in dataclasses.fields(Sample) if f.name not in ("t_s", "gpu_throttled")},
)
STRATEGIES = {
    "str | None": st.none() | texts,
    "float | None": optional_floats,
    "int | None": st.none() | st.integers(-(2**63), 2**63 - 1),
    "bool | None": st.none() | st.booleans(),
}
ROWS = st.fixed_dictionaries(
    {
        name: STRATEGIES[str(field.annotation)]
        for name, field in TrialRow.model_fields.items()
        if str(field.annotation) in STRATEGIES
    }
    | {
        "flags": st.dictionaries(texts, texts, max_size=3),
        "constraints": st.dictionaries(texts, floats, max_size=3),
        "invalid_reasons": st.lists(texts, max_size=3),
        "started_at": st.datetimes(
            min_value=datetime.datetime.fromisoformat("1970-01-02"),
            timezones=st.sampled_from([datetime.UTC, datetime.timezone(datetime.timedelta(hours=-7))]),
        ),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS, st.lists(RECORDS, max_size=4), st.lists(SAMPLES, max_size=4), st.booleans())
def test_a_measurement_survives_the_store(
    tmp_path_factory: pytest.TempPathFactory,
    columns: dict[str, Any],
    records: list[RequestRecord],
    samples: list[Sample],
    compacted: bool,
) -> None:
    directory = tmp_path_factory.mktemp("store")
    written = row(7, {"a": 1}, **columns)
    with Store(directory) as store:
        store.append(written, records, samples)
        store.append(row(8, {}), [request(0)], [Sample(t_s=1.0)])
        if compacted:
            store.compact()
    read = Store(directory, readonly=True)
    assert read.rows()[0] == written
    assert read.requests(written.trial_id) == records
    assert read.samples(written.trial_id) == samples


def test_half_a_surrogate_pair_costs_one_character_not_the_trial(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(row(0, {}), [request(0, error="bad \ud800 text")])
        assert store.requests(row(0, {}).trial_id)[0].error == "bad ? text"


def test_every_column_is_typed_in_every_file(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(row(0, {}), [request(0, error=None, http_status=None)], [Sample(t_s=0.0)])
        store.append(full_row(1), [request(0)], [Sample(t_s=0.0, gpu_throttled=True)])
    for dataset in DATASETS:
        for path in (tmp_path / dataset).glob("*.parquet"):
            found = pq.read_schema(path)
            assert {f.name: f.type for f in found} == {f.name: f.type for f in SCHEMAS[dataset]}
            assert pq.read_metadata(path).metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()


def test_unknown_annotations_have_no_column_type() -> None:
    with pytest.raises(TypeError, match="CONTAINERS"):
        arrow_type(set[str])


def test_rows_come_by_study_and_number_and_one_study_alone(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for number, study in ((2, "b"), (0, "b"), (1, "a")):
            store.append(row(number, {}, study=study))
        assert [(r.study, r.number) for r in store.rows()] == [("a", 1), ("b", 0), ("b", 2)]
        assert [r.number for r in store.rows("b")] == [0, 2]
        store.save_study("c", {})
        assert store.study_names() == ["a", "b", "c"]


def test_a_reader_sees_what_a_writer_adds_and_reads_no_file_twice(tmp_path: Path) -> None:
    with Store(tmp_path) as writer:
        reader = Store(tmp_path, readonly=True)
        fill(writer, range(2))
        first = reader.rows()
        writer.append(row(2, {}))
        assert [r.number for r in reader.rows()] == [0, 1, 2]
        assert reader.rows()[0] is first[0]


def test_a_trial_is_recorded_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(row(0, {}))
        with pytest.raises(VarcasError, match="there already"):
            store.append(row(0, {}))
        store.append(row(1, {}))
        store.compact()
    with Store(tmp_path) as store, pytest.raises(VarcasError, match="there already"):
        store.append(row(0, {}))


def test_studies_are_kept_and_replaced(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.study("s") is None
        store.save_study("s", {"fingerprint": "1"})
        store.save_study("s", {"fingerprint": "2", "experiment": {"name": "s"}})
    assert Store(tmp_path, readonly=True).study("s") == {"fingerprint": "2", "experiment": {"name": "s"}}
    (tmp_path / "studies" / "s.json").write_text("{")
    with pytest.raises(InputError, match=r"s\.json: cannot be read"):
        Store(tmp_path, readonly=True).study("s")


def test_readers_change_nothing_and_cannot_write(tmp_path: Path) -> None:
    reader = Store(tmp_path / "none", readonly=True)
    assert reader.rows() == []
    assert reader.study_names() == []
    assert reader.sql("select count(*) as n from requests").to_pylist() == [{"n": 0}]
    with pytest.raises(VarcasError, match="not open for writing"):
        reader.append(row(0, {}))
    reader.close()
    assert not (tmp_path / "none").exists()


# schema versions


def write_other_version(
    directory: Path, number: int, *, without: tuple[str, ...] = (), extra: str | None = None
) -> None:
    """A trial's file as a varcas of another schema version would have written it."""
    with Store(directory / "other") as store:
        store.append(row(number, {"old": True}))
    (path,) = (directory / "other" / "trials").glob("*.parquet")
    table = pq.read_table(path).drop_columns(list(without))
    version = SCHEMA_VERSION - 1
    if extra is not None:
        table, version = table.append_column(extra, pa.array(["new"])), SCHEMA_VERSION + 1
    (directory / "trials").mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"schema_version": str(version)}), directory / "trials" / path.name)
    shutil.rmtree(directory / "other")


@pytest.mark.parametrize("reader", READERS)
def test_two_schema_versions_null_columns_and_mixed_flags_are_read_whole(tmp_path: Path, reader: str) -> None:
    with Store(tmp_path) as store:
        store.append(row(1, {"max_num_seqs": 8, "kv_cache_dtype": None}, power_w=70.0))
        store.append(row(2, {"max_num_seqs": "auto", "kv_cache_dtype": {"a": 1}}))
    write_other_version(tmp_path, 0, without=("power_w", "invalid_reasons", "attempt"))
    assert_whole(read_with(reader, tmp_path, "trials"))
    assert len(list((tmp_path / "trials").iterdir())) == 3
    Store(tmp_path).close()
    assert_whole(read_plainly(reader, tmp_path, "trials"))


def assert_whole(rows: list[dict[str, Any]]) -> None:
    found = sorted(rows, key=lambda r: r["number"])
    assert [r["number"] for r in found] == [0, 1, 2]
    assert [r["power_w"] for r in found] == [None, 70.0, None]
    assert [r["flags"] for r in found] == [
        {"old": "true"},
        {"max_num_seqs": "8", "kv_cache_dtype": "null"},
        {"max_num_seqs": '"auto"', "kv_cache_dtype": '{"a": 1}'},
    ]
    assert set(SCHEMAS["trials"].names) <= set(found[0])


def test_a_column_that_an_old_file_lacks_has_its_default(tmp_path: Path) -> None:
    write_other_version(tmp_path, 0, without=("power_w", "attempt", "flags"))
    (found,) = Store(tmp_path, readonly=True).rows()
    assert (found.power_w, found.attempt, found.flags) == (None, 0, {})


def test_an_older_varcas_keeps_what_a_newer_one_added(tmp_path: Path) -> None:
    write_other_version(tmp_path, 0, extra="column_of_tomorrow")
    with Store(tmp_path) as store:
        store.append(row(1, {}))
        store.compact()
        assert [r.number for r in store.rows()] == [0, 1]
        kept = store.sql("select number, column_of_tomorrow as c from trials order by number")
    assert kept.to_pylist() == [{"number": 0, "c": "new"}, {"number": 1, "c": None}]
    (path,) = (tmp_path / "trials").glob("*.parquet")
    assert pq.read_metadata(path).metadata[b"schema_version"] == str(SCHEMA_VERSION + 1).encode()


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.name)
@pytest.mark.parametrize("reader", READERS)
def test_golden_stores_are_read_whole(golden: Path, reader: str) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    trials = {r["trial_id"]: as_json(r) for r in read_with(reader, golden / "results", "trials")}
    for old in expected["trials"]:
        new = trials.pop(old["trial_id"])
        assert {name: new[name] for name in old} == old
    assert not trials
    for dataset in ("requests", "samples"):
        found = as_json(read_with(reader, golden / "results", dataset))
        for trial_id, olds in expected[dataset].items():
            mine = [r for r in found if r["trial_id"] == trial_id]
            assert [{name: new[name] for name in old} for new, old in zip(mine, olds, strict=True)] == olds


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.name)
def test_golden_stores_are_read_whole_by_the_store(golden: Path) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    store = Store(golden / "results", readonly=True)
    for old, new in zip(expected["trials"], store.rows(), strict=True):
        assert {name: new.model_dump(mode="json")[name] for name in old} == old
    for trial_id, olds in expected["requests"].items():
        news = as_json([dataclasses.asdict(record) for record in store.requests(trial_id)])
        assert [{name: new[name] for name in old} for new, old in zip(news, olds, strict=True)] == olds
    assert store.study("golden") is not None


@pytest.mark.parametrize("dataset", DATASETS)
def test_columns_are_only_ever_added(dataset: str) -> None:
    """Fails on a column removed, retyped, or added without a new SCHEMA_VERSION and its golden store."""
    assert GOLDENS[-1].name == f"schema_v{SCHEMA_VERSION}", "write it with: python -m tests.golden.make"
    for golden in GOLDENS:
        found = pq.read_schema(next((golden / "results" / dataset).glob("*.parquet")))
        current = {field.name: field.type for field in SCHEMAS[dataset]}
        assert {f.name: current.get(f.name) for f in found} == {f.name: f.type for f in found}
    assert found.names == list(current)


# what goes wrong


def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store(tmp_path) as store:
        fill(store, range(3))
    (damaged,) = (tmp_path / "trials").glob("golden-000001-*")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING), Store(tmp_path) as store:
        assert [r.number for r in store.rows()] == [0, 2]
        assert store.sql("select count(*) as n from trials").to_pylist() == [{"n": 2}]
        store.compact()
        assert [r.number for r in store.rows()] == [0, 2]
    assert [str(damaged) in record.getMessage() for record in caplog.records] == [True]
    assert damaged.exists(), "what cannot be read may yet be saved by someone"
    assert len(list((tmp_path / "requests").glob("*.parquet"))) == 2, "its requests are no orphans"


def test_a_file_of_random_bytes_hides_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store(tmp_path) as store:
        fill(store, range(2))
    (tmp_path / "requests" / "compact-000001.parquet").write_bytes(random.Random(0).randbytes(1000))
    (tmp_path / "requests" / "notes.txt").write_text("mine")
    with Store(tmp_path) as store:
        assert len(store.requests(row(0, {}).trial_id)) == 2
        assert store.sql("select count(*) as n from requests").to_pylist() == [{"n": 4}]
        store.compact()
        assert len(store.requests(row(1, {}).trial_id)) == 2
    assert (tmp_path / "requests" / "notes.txt").exists()
    assert "compact-000001.parquet: cannot be read" in caplog.text


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    code = "import sys; from varcas.store import Store; s = Store(sys.argv[1]); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError) as caught:
            Store(tmp_path)
        message = str(caught.value)
        assert f"process {holder.pid} on {socket.gethostname()}" in message
        assert "give another `results` directory" in message
        Store(tmp_path, readonly=True).rows()
        holder.kill()
        holder.wait()
    Store(tmp_path).close()


def test_the_lock_is_free_after_close_and_twice_in_one_process_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} "):
        Store(tmp_path)
    Store(tmp_path).close()


@pytest.mark.parametrize("place", ["file/results", "file", "/proc/varcas"])
def test_a_directory_that_cannot_be_written_is_bad_input(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written: .*Give a directory that can"):
        Store(tmp_path / place)


def test_a_full_disk_leaves_no_torn_file_and_says_so(tmp_path: Path) -> None:
    code = """if True:
        import resource, signal, sys
        from tests.golden.make import request, row
        from varcas.errors import VarcasError
        from varcas.store import Store
        store = Store(sys.argv[1])
        store.append(row(0, {}), [request(0)])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG on write, as ENOSPC would come
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        try:
            store.append(row(1, {}), [request(0)])
        except VarcasError as error:
            print(error)
        store.close()
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "trial 1 could not be written" in done.stdout, done.stderr
    assert [r.number for r in Store(tmp_path, readonly=True).rows()] == [0]
    assert not list(tmp_path.glob("*/.*.tmp"))
    with Store(tmp_path) as store:
        store.append(row(1, {}), [request(0)])
        assert len(store.requests(row(1, {}).trial_id)) == 1


# orphans and compaction


def test_orphans_and_temporaries_go_with_the_next_writer(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        fill(store, range(2))
        store.compact()
        fill(store, range(2, 4))
    next((tmp_path / "trials").glob("golden-000002-*")).unlink()
    (tmp_path / "trials" / ".golden-000009.parquet.tmp").write_bytes(b"half")
    assert Store(tmp_path, readonly=True).requests(row(2, {}).trial_id) == []
    with Store(tmp_path) as store:
        assert [r.number for r in store.rows()] == [0, 1, 3]
        assert [len(store.requests(r.trial_id)) for r in store.rows()] == [2, 2, 2]
        assert {path.name[:13] for path in (tmp_path / "requests").iterdir()} == {"compact-00000", "golden-000003"}
        store.append(row(2, {}), [request(0)], [])
        assert len(store.requests(row(2, {}).trial_id)) == 1


def test_compaction_changes_no_row_and_leaves_a_file_a_dataset(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for trial in TRIALS:
            store.append(*trial)
        store.compact()
        store.append(row(9, {}), [request(0)], [Sample(t_s=3.0)])
        store.compact()
        for reader in (store, Store(tmp_path, readonly=True)):
            assert reader.rows() == [*(found for found, _, _ in TRIALS), row(9, {})]
            for found, requests, samples in TRIALS:
                assert reader.requests(found.trial_id) == requests
                assert reader.samples(found.trial_id) == samples
    assert [len(list((tmp_path / dataset).iterdir())) for dataset in DATASETS] == [1, 1, 1]


def test_close_compacts_many_files(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for number in range(COMPACT_ABOVE):
            store.append(row(number, {}))
    assert len(list((tmp_path / "trials").iterdir())) == COMPACT_ABOVE
    with Store(tmp_path) as store:
        store.append(row(COMPACT_ABOVE, {}))
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["compact-000001.parquet"]
    assert len(Store(tmp_path, readonly=True).rows()) == COMPACT_ABOVE + 1


def test_no_row_is_seen_twice_when_a_kill_leaves_sources_behind(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        fill(store, range(3))
        kept = tmp_path / "kept"
        shutil.copytree(tmp_path / "trials", kept / "trials")
        shutil.copytree(tmp_path / "requests", kept / "requests")
        store.compact()
    for dataset in ("trials", "requests"):
        for path in (kept / dataset).iterdir():
            shutil.copy(path, tmp_path / dataset)
    for readonly in (True, False):
        store = Store(tmp_path, readonly=readonly)
        assert [r.number for r in store.rows()] == [0, 1, 2]
        assert len(store.requests(row(1, {}).trial_id)) == 2
        assert store.sql("select count(*) as n from requests").to_pylist() == [{"n": 6}]
        store.close()
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["compact-000001.parquet"]


# SQL


@pytest.fixture(scope="module")
def golden_store() -> Store:
    return Store(GOLDENS[-1] / "results", readonly=True)


def test_sql_sees_flags_in_their_own_types(golden_store: Store) -> None:
    found = golden_store.sql("select * from trials order by number")
    kinds = {name: found.schema.field(f"flag_{name}").type for name in ("enforce_eager", "swap_space", "max_num_seqs")}
    assert kinds == {"enforce_eager": pa.bool_(), "swap_space": pa.float64(), "max_num_seqs": pa.string()}
    assert found["flag_max_num_seqs"].to_pylist() == ["8", "auto", None, "16"]
    assert found["flag_swap_space"].to_pylist() == [None, 4.0, 0.5, None]
    assert found["flag_speculative_config"].to_pylist()[3] == '{"method": "ngram"}'


def test_sql_joins_the_views(golden_store: Store) -> None:
    query = """
        select t.number, count(distinct r.index) as requests, count(distinct s.t_s) as samples
        from trials t left join requests r using (trial_id) left join samples s using (trial_id)
        group by 1 order by 1
    """
    assert golden_store.sql(query).to_pydict() == {
        "number": [0, 1, 2, 3],
        "requests": [2, 1, 0, 1],
        "samples": [2, 0, 0, 2],
    }


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("select nope from trials", 'Referenced column "nope" not found'),
        ("selct 1", "syntax error"),
        ("copy trials to 'HERE/out.csv'", "disabled by configuration"),
        ("select * from read_text('/etc/hostname')", "disabled by configuration"),
        ("set enable_external_access = true", "configuration"),
        ("select * from query", "does not exist"),
    ],
)
def test_sql_errors_are_bad_input_in_duckdbs_words(golden_store: Store, tmp_path: Path, query: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        golden_store.sql(query.replace("HERE", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_sql_without_an_answer_is_an_empty_table(golden_store: Store) -> None:
    assert golden_store.sql("").num_rows == 0


# kill -9 at any instant


def keep_appending(directory: str, first: int, ack: int) -> None:
    """Appends, acknowledges each trial once `append` returned, compacts now and then; runs until it is killed."""
    with Store(directory) as store:
        for number in range(first, first + 10_000):
            trial = row(number, {"max_num_seqs": number})
            store.append(trial, [request(i) for i in range(number % 7)], [Sample(t_s=0.0)] * (number % 3))
            os.write(ack, f"{number}\n".encode())
            if number % 8 == 7:
                store.compact()


@pytest.fixture(scope="module")
def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_store"])  # so that a victim is up in milliseconds
    return context


def kill_while_appending(context: Any, directory: Path, first: int, instant_s: float) -> int:
    """Kills an appending process `instant_s` after its first acknowledgement; returns the last number acknowledged."""
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as acks:
        victim = context.Process(target=keep_appending_on, args=(str(directory), first, FileNumber(writing)))
        victim.start()
        os.close(writing)
        seen = acks.readline()
        time.sleep(instant_s)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        numbers = [int(line) for line in [seen, *acks] if line.endswith("\n")]
    victim.close()
    return numbers[-1]


class FileNumber:
    """A descriptor that survives the journey through the fork server."""

    def __init__(self, number: int) -> None:
        from multiprocessing.reduction import DupFd

        self._dup, self._number = DupFd, number

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _detached, (self._dup(self._number),)


def _detached(dup: Any) -> int:
    return int(dup.detach())


def keep_appending_on(directory: str, first: int, ack: int) -> None:
    keep_appending(directory, first, ack)


def check_whole(directory: Path, acknowledged: int) -> int:
    """Every acknowledged row is there, whole, and no file is torn. Returns the last number."""
    for path in directory.glob("*/*.parquet"):
        pq.read_table(path, partitioning=None)  # raises on a torn file
    for readonly in (True, False):
        with Store(directory, readonly=readonly) as store:
            rows = store.rows()
            numbers = [found.number for found in rows]
            assert numbers == list(range(len(numbers))), "each once, none missing"
            assert len(numbers) > acknowledged
            for found in rows[-6:]:
                assert len(store.requests(found.trial_id)) == found.number % 7
                assert len(store.samples(found.trial_id)) == found.number % 3
    assert not list(directory.glob("*/.*.tmp"))
    return numbers[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_kill_9_at_any_instant_loses_nothing_acknowledged(tmp_path: Path, forkserver: Any) -> None:
    rng = random.Random(int.from_bytes(os.urandom(4)))
    for study in range(4):
        directory, last = tmp_path / str(study), -1
        for _ in range(8):
            acknowledged = kill_while_appending(forkserver, directory, last + 1, rng.uniform(0, 0.08))
            last = check_whole(directory, acknowledged)
        store = Store(directory, readonly=True)
        found = store.sql("select count(*) as n, count(distinct trial_id) as trials from requests").to_pylist()
        sizes = [trial.number % 7 for trial in store.rows() if trial.number % 7]
        assert found == [{"n": sum(sizes), "trials": len(sizes)}]


def test_readers_beside_a_compacting_writer_see_every_row_once(tmp_path: Path, forkserver: Any) -> None:
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as acks:
        victim = forkserver.Process(target=keep_appending_on, args=(str(tmp_path), 0, FileNumber(writing)))
        victim.start()
        os.close(writing)
        try:
            seen, until = 0, time.monotonic() + 2
            while time.monotonic() < until:
                acknowledged = int(acks.readline())
                reader = Store(tmp_path, readonly=True)
                numbers = [found.number for found in reader.rows()]
                assert numbers == list(range(len(numbers)))
                assert len(numbers) > acknowledged
                counted = reader.sql("select count(*) as n, count(distinct number) as d from trials").to_pylist()[0]
                assert counted["n"] == counted["d"] > acknowledged
                seen += 1
        finally:
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            victim.close()
    assert seen > 3
