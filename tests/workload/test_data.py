"""Own data: every format is told from its content, and what is wrong in a file is named."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workload.goldens import DATA
from varcas.errors import InputError
from varcas.experiment import Workload
from varcas.workload.conversation import Conversation
from varcas.workload.data import Data, files, open_data
from varcas.workload.schedule import check_workload


def opened(path: Path, text: str | bytes) -> Data:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_data(str(path))


def rows(data: Data) -> list[Conversation | None]:
    return [data.conversation(row) for row in range(len(data))]


def lengths(data: Data) -> list[tuple[int, int]]:
    return [(c.turns[0].prompt_tokens, c.turns[0].output_tokens) for c in rows(data) if c is not None]


def test_azure_times_are_read_to_the_microsecond(tmp_path: Path) -> None:
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    data = opened(tmp_path / "x", head + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    assert lengths(data) == [(374, 44), (396, 109)]
    assert data.times_us.tolist() == [0, 4_314_579]
    later = opened(tmp_path / "y", head + "2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 00:00:01+00:00,3,4\n")
    assert later.times_us.tolist() == [0, 990_070]


def test_mooncake_times_are_milliseconds_and_blocks_are_kept() -> None:
    data = open_data(str(DATA / "mooncake.jsonl"))
    assert data.times_us.tolist()[:3] == [0, 1_500_000, 4_000_000]
    first = data.conversation(2)
    assert first is not None
    assert (first.turns[0].prompt_tokens, first.turns[0].output_tokens, first.turns[0].blocks) == (
        1700,
        25,
        (0, 1, 5, 6),
    )


@pytest.mark.parametrize("unit", ["number", "timestamp"])
def test_plain_lengths_come_as_csv_jsonl_and_parquet(tmp_path: Path, unit: str) -> None:
    seconds = [0.5, 0.75, 3.0]
    began = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    times: list[Any] = seconds if unit == "number" else [began + datetime.timedelta(seconds=s) for s in seconds]
    columns = {"timestamp": times, "prompt_tokens": [10, 20, 30], "output_tokens": [1, 2, 3], "more": ["a", "b", "c"]}
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    table = pa.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "p")
    pyarrow.csv.write_csv(table, tmp_path / "c")
    (tmp_path / "j").write_text("\n".join(json.dumps(record, default=str) for record in records))
    for name in "pcj":
        data = open_data(str(tmp_path / name))
        assert lengths(data) == [(10, 1), (20, 2), (30, 3)], name
        assert data.times_us.tolist() == [0, 250_000, 2_500_000], name


def test_a_trace_that_is_not_sorted_is_sorted_by_time(tmp_path: Path) -> None:
    text = "".join(
        json.dumps({"timestamp": at, "input_length": n, "output_length": 1, "hash_ids": ids}) + "\n"
        for at, n, ids in ((300, 3, [5]), (100, 1, [6, 7]), (200, 2, []))
    )
    data = opened(tmp_path / "x", text)
    assert data.times_us.tolist() == [0, 100_000, 200_000]
    assert [c.turns[0].blocks for c in rows(data) if c] == [(6, 7), (), (5,)]
    assert lengths(data) == [(1, 1), (2, 1), (3, 1)]
    with pytest.raises(InputError, match=r"row 1: 3 \+ 1 tokens"):
        data.check(3)


def test_times_are_needed_for_a_trace_alone(tmp_path: Path) -> None:
    data = opened(tmp_path / "x.csv", "prompt_tokens,output_tokens\n5,6\n")
    assert lengths(data) == [(5, 6)]
    with pytest.raises(InputError, match="needs a column of times"):
        _ = data.times_us


def test_sharegpt_is_read_as_conversations_with_answers() -> None:
    a, b, c, d = rows(open_data(str(DATA / "sharegpt.json")))
    assert a is not None
    assert b is not None
    assert d is not None
    assert [(t.prompt, t.answer) for t in a.turns] == [
        (
            "What is a prefix cache?",
            'It keeps the keys and values of prompts that begin alike.\nA "hit" is {cheap}.',
        ),
        ("And how large is it?", "As large as the memory that is left."),
    ]
    assert [turn.prompt for turn in b.turns] == ["Name three fruits."]
    assert c is None
    assert (d.system, d.turns[0].prompt) == ("You are terse.", "Zwei Zeilen über Äpfel 🍎, bitte.")


def test_own_texts_have_messages_or_a_prompt(tmp_path: Path) -> None:
    for data in (
        open_data(str(DATA / "own.jsonl")),
        opened(
            tmp_path / "x",
            json.dumps([json.loads(line) for line in (DATA / "own.jsonl").read_text().splitlines()], indent=2),
        ),
    ):
        plain, terse, counting = rows(data)
        assert plain is not None
        assert terse is not None
        assert counting is not None
        assert [(t.prompt, t.output_tokens) for t in plain.turns] == [("Translate to French: the cat sleeps.", 12)]
        assert (terse.system, terse.turns[0].output_tokens) == ("Answer in one word.", 4)
        assert [(t.prompt, t.answer, t.output_tokens) for t in counting.turns] == [
            ("Count to three.", "one two three", 0),
            ("Now backwards.", None, 8),
        ]


def test_texts_in_parquet_and_with_times(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a b", "c"], "max_tokens": [3, 4], "timestamp": ["2026-01-01", "2026-01-01 00:00:02"]})
    pyarrow.parquet.write_table(table, tmp_path / "p")
    data = open_data(str(tmp_path / "p"))
    assert [(c.turns[0].prompt, c.turns[0].output_tokens) for c in rows(data) if c] == [("a b", 3), ("c", 4)]
    assert data.times_us.tolist() == [0, 2_000_000]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(
    conversations=st.lists(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), min_size=1, max_size=4),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    window_bytes=st.sampled_from([1, 7, 64, files.WINDOW_BYTES]),
)
def test_every_json_array_is_taken_apart_where_its_objects_end(
    tmp_path_factory: pytest.TempPathFactory,
    conversations: list[list[tuple[str, str]]],
    indent: int | None,
    ascii_only: bool,
    window_bytes: int,
) -> None:
    records = [
        {"id": 7, "conversations": [{"from": f, "value": v} for pair in c for f, v in zip(("human", "gpt"), pair)]}  # noqa: B905
        for c in conversations
    ]
    path = tmp_path_factory.mktemp("data") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "WINDOW_BYTES", window_bytes)
        data = opened(path, json.dumps(records, indent=indent, ensure_ascii=ascii_only))
    found = [[(turn.prompt, turn.answer) for turn in c.turns] for c in rows(data) if c is not None]
    assert found == conversations


PLAIN = "timestamp,prompt_tokens,output_tokens\n0,5,6\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["format is not known", "found nothing", "ContextTokens", "hash"][:3]),
        ("a,b\n1,2\n", ["format is not known", "found a, b", "prompt_tokens, output_tokens"]),
        ("prompt_tokens,output_tokens\n", ["has no records"]),
        (PLAIN + "1,many,6\n", ["row 2: prompt_tokens: 'many': must be a whole number of tokens, at least 1"]),
        (PLAIN + "1,5,0\n", ["row 2: output_tokens: '0': must be a whole number"]),
        (PLAIN + "1,5.5,1\n", ["row 2: prompt_tokens: '5.5'"]),
        (PLAIN + "1,,1\n", ["row 2: prompt_tokens: ''"]),
        (PLAIN + "noon,5,1\n", ["row 2: timestamp: 'noon': must be a number or an ISO 8601 time"]),
        (PLAIN + "1,5\n", ["row 2: output_tokens: missing"]),
        (PLAIN + "1,9223372036854775807,1\n", ["row 2: prompt_tokens: '9223372036854775807'", "at most 2147483647"]),
        (PLAIN + "1e300,5,6\n", ["row 2: timestamp: '1e300'", "in seconds, and at most 1e11"]),
        (PLAIN + "1700000000000,5,6\n", ["row 2: timestamp: '1700000000000'", "in seconds"]),  # it is in ms
        ("prompt_tokens,prompt_tokens,output_tokens\n1,2,3\n", ["2 columns prompt_tokens"]),
        ("timestamp,timestamp,prompt_tokens,output_tokens\n1,2,3,4\n", ["2 columns timestamp"]),
        ('[{"prompt_tokens": 5, "output_tokens": 6}]', ["CSV, JSONL or Parquet, not as a JSON array"]),
        ('{"prompt_tokens": "5", "output_tokens": "6"}\n', ["row 1: prompt_tokens: '5': must be a whole number"]),
        (
            '{"timestamp": 1, "prompt_tokens": 5, "output_tokens": 6}\n{"prompt_tokens": 5, "output_tokens": 6}\n',
            ["row 2: timestamp: missing"],
        ),
        (
            '{"timestamp": 1e15, "input_length": 5, "output_length": 6}\n',
            ["row 1: timestamp", "in ms, and at most 1e14"],
        ),
        ('{"timestamp": 1, "input_length": 5, "output_length": 6, "hash_ids": 7}\n', ["row 1: hash_ids: 7: must be a"]),
        ('{"prompt": "x", "max_tokens": 1e30}\n', ["row 1: max_tokens: 1e+30: must be a whole number"]),
        ('{"messages": [{"role": ["user"], "content": "x"}]}\n', ["row 1: messages[0].role: ['user']: must be one of"]),
        ('{"prompt": ' + "[" * 100_000 + "\n", ["row 1: not valid JSON"]),
        ("[" + "[" * 100_000, ["row 1: not valid JSON"]),
        (b"\x1f\x8b\x08\x00", ["format is not known: found '\\x1f"]),
        ("prompt,output_tokens\nhello,3\n", ["as JSONL", "not as CSV"]),
        ('{"prompt_tokens": 5, "output_tokens": 6}\n{"prompt_tokens": "x", "output_tokens": 6}\n', ["row 2: prompt_"]),
        ('{"prompt_tokens": 5, "output_tokens": 6}\n{"output_tokens": 6}\n', ["row 2: prompt_tokens: missing"]),
        ('{"prompt_tokens": 5, "output_tokens": 6}\nnonsense\n', ["row 2", "not valid JSON"]),
        (
            '{"timestamp": 1, "input_length": 5, "output_length": 6, "hash_ids": ["a"]}\n',
            ["row 1: hash_ids", "list of whole numbers"],
        ),
        ('{"prompt": "x", "output_tokens": 3}\n{"prompt": "", "output_tokens": 3}\n', ["row 2: prompt: '': must be"]),
        ('{"prompt": "x"}\n', ["row 1: output_tokens: missing", "max_tokens"]),
        ('{"prompt": "x", "max_tokens": -1}\n', ["row 1: max_tokens: -1: must be a whole number"]),
        ('{"messages": "hello", "max_tokens": 1}\n', ["row 1: messages: 'hello': must be a list of objects"]),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', ["row 1: messages[0].role: 'robot'", "assistant"]),
        ('{"messages": [{"role": "user", "content": ["x"]}]}\n', ["row 1: messages[0].content: ['x']: must be a text"]),
        ('{"messages": [{"role": "system", "content": "x"}]}\n', ["row 1: messages", "message of a user"]),
        (
            '{"messages": [{"role": "user", "content": "x"}]}\n',
            ["row 1: output_tokens: missing", "assistant's message"],
        ),
        ('[{"conversations": [{"from": "human", "value": 3}]}]', ["row 1: conversations[0].value: 3: must be a text"]),
        ('[{"conversations": [{"from": "human", "value": "x"}]}]', ["no record has a question with an answer"]),
        ('[{"conversations": [{"from": "human", "value": "x"', ["row 1", "the file is cut off here"]),
        ('[{"conversations": [], }]', ["row 1: not valid JSON"]),
        (b"PAR1 and then nothing that is Parquet", ["no Parquet file"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named_in_one_line(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = tmp_path / "x.data"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        check_workload(Workload(data=str(path), rate_rps=1), {})
    message = str(caught.value)
    assert [word for word in ["x.data", *words] if word not in message] == [], message
    assert len(message.splitlines()) == 1, message


def test_prompts_without_blocks_stand_beside_prompts_with_some(tmp_path: Path) -> None:
    line = '{"timestamp": %d, "input_length": 600, "output_length": 6%s}\n'
    some = opened(
        tmp_path / "x", line % (0, ', "hash_ids": [1, 2]') + line % (1, "") + line % (2, ', "hash_ids": null')
    )
    assert [c.turns[0].blocks for c in rows(some) if c] == [(1, 2), (), ()]
    none = opened(tmp_path / "y", 2 * (line % (0, ', "hash_ids": []')))
    assert [c.turns[0].blocks for c in rows(none) if c] == [(), ()]


@pytest.mark.parametrize(
    "times",
    [
        pa.array(["2024-01-01", "2024-01-02"], pa.large_string()),  # as Polars writes them
        pa.array(["2024-01-01", "2024-01-02"]).dictionary_encode(),
        pa.array([19723, 19724], pa.date32()),
        pa.array([86_400 * 2, 86_400], pa.uint64()),  # not in order
    ],
)
def test_times_are_read_however_parquet_holds_them(tmp_path: Path, times: pa.Array) -> None:
    pyarrow.parquet.write_table(
        pa.table({"timestamp": times, "prompt_tokens": [1, 2], "output_tokens": [3, 4]}), tmp_path / "p"
    )
    assert open_data(str(tmp_path / "p")).times_us.tolist() == [0, 86_400_000_000]


def test_a_file_that_is_not_there_and_one_that_changed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"workload.data: nowhere.csv: cannot be read"):
        check_workload(Workload(data="nowhere.csv", rate_rps=1), {})
    assert lengths(opened(tmp_path / "x", PLAIN)) == [(5, 6)]
    assert lengths(opened(tmp_path / "x", PLAIN + "1,7,8\n")) == [(5, 6), (7, 8)]


def test_times_of_texts_must_be_there_and_in_order(tmp_path: Path) -> None:
    line = '{"prompt": "x", "output_tokens": 3%s}\n'
    for ends, words in (
        (["", ""], "row 1: timestamp: missing"),
        ([', "timestamp": 0', ', "timestamp": 1e300'], r"row 2: timestamp: 1e\+300: .* in seconds, and at most 1e11"),
        ([', "timestamp": 3', ', "timestamp": 2'], "row 2: timestamp: 2: must not be before"),
    ):
        data = opened(tmp_path / "x", "".join(line % end for end in ends))
        with pytest.raises(InputError, match=words):
            _ = data.times_us
