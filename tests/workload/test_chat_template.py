from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from varcas.workload.chat_template import decide_endpoint


@pytest.mark.parametrize(
    ("asked", "files", "flags", "expected"),
    [
        ("completions", {"chat_template.jinja": "x"}, {}, "completions"),
        ("chat", {}, {}, "chat"),
        ("auto", {}, {}, "completions"),
        ("auto", {"tokenizer_config.json": "{}"}, {}, "completions"),
        ("auto", {"tokenizer_config.json": "not json"}, {}, "completions"),
        ("auto", {"tokenizer_config.json": '{"chat_template": null}'}, {}, "completions"),
        ("auto", {"tokenizer_config.json": '{"chat_template": "{{ x }}"}'}, {}, "chat"),
        ("auto", {"chat_template.jinja": "x"}, {}, "chat"),
        ("auto", {"chat_template.json": "{}"}, {}, "chat"),
        ("auto", {"tekken.json": "{}"}, {}, "chat"),
        ("auto", {}, {"chat_template": "my.jinja"}, "chat"),
        ("auto", {}, {"chat_template": None}, "completions"),
        ("auto", {}, {"tokenizer_mode": "mistral"}, "chat"),
    ],
)
def test_the_endpoint_is_decided_from_files_and_flags(
    tmp_path: Path,
    asked: Literal["auto", "chat", "completions"],
    files: dict[str, str],
    flags: dict[str, str | None],
    expected: str,
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert decide_endpoint(asked, tmp_path, flags) == expected


def test_without_a_directory_only_flags_decide() -> None:
    assert decide_endpoint("auto", None, {}) == "completions"
    assert decide_endpoint("auto", None, {"chat_template": "x"}) == "chat"
