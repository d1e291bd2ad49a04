"""Texts from a file: found once, and parsed when they are drawn."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from varcas.errors import InputError
from varcas.workload.conversation import Conversation, Turn
from varcas.workload.data.files import TIME, US, WHOLE, Numbers, Records, bad_value, is_time, is_whole, seconds_of

TEXT_FIELDS = ("conversations", "messages", "prompt")
OUTPUT_FIELDS = ("output_tokens", "max_tokens", "max_completion_tokens")
TIME_FIELD = "timestamp"
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""Who speaks, as ShareGPT and OpenAI's API have it."""


class Texts:
    """Conversations with words of their own."""

    def __init__(self, path: str, records: Records) -> None:
        self._path, self._records = path, records
        if not len(records):
            raise InputError(f"{path}: has no records.")

    def __len__(self) -> int:
        """How many there are."""
        return len(self._records)

    @functools.cached_property
    def times_us(self) -> Numbers:
        """Microseconds from the first."""
        seconds = np.empty(len(self))
        for row in range(len(self)):
            value = self._records[row].get(TIME_FIELD)
            if not is_time(value):
                raise bad_value(self._path, row + 1, TIME_FIELD, value, TIME)
            seconds[row] = seconds_of(value)
            if row and seconds[row] < seconds[row - 1]:
                raise bad_value(
                    self._path, row + 1, TIME_FIELD, value, "must not be before the one above: sort the file."
                )
        return np.rint((seconds - seconds[:1]) * US).astype(np.int64)

    def conversation(self, row: int) -> Conversation | None:
        """Its turns; the answers that were once given only say how long answers are."""
        record = self._records[row]
        if "conversations" in record:
            return self._dialogue(row, record, "conversations", "from", "value")
        if "messages" in record:
            return self._dialogue(row, record, "messages", "role", "content")
        prompt = record.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise bad_value(self._path, row + 1, "prompt", prompt, "must be a text.")
        return Conversation([Turn(0, self._output_tokens(row, record), prompt)])

    def check(self, limit: int | None) -> None:
        """Parses every one; how long they are only the server can tell."""
        if not sum(self.conversation(row) is not None for row in range(len(self))):
            raise InputError(f"{self._path}: no record has a question with an answer.")

    def _output_tokens(self, row: int, record: Mapping[str, Any]) -> int:
        field = next((name for name in OUTPUT_FIELDS if record.get(name) is not None), None)
        if field is None:
            allowed = f"say how many tokens to generate: {', '.join(OUTPUT_FIELDS[:2])}, or an assistant's message."
            raise bad_value(self._path, row + 1, OUTPUT_FIELDS[0], None, allowed)
        if not is_whole(record[field]):
            raise bad_value(self._path, row + 1, field, record[field], WHOLE)
        return int(record[field])

    def _dialogue(
        self, row: int, record: Mapping[str, Any], field: str, role_field: str, text_field: str
    ) -> Conversation | None:
        """Of messages. A last question without an answer needs a number of tokens; in ShareGPT it is left out."""
        turns: list[Turn] = []
        system = None
        for role, text in self._messages(row, record, field, role_field, text_field):
            if role == "system":
                system = text
            elif role == "assistant":
                if turns:
                    turns[-1].answer = "\n\n".join(filter(None, (turns[-1].answer, text)))
            elif turns and turns[-1].answer is None:
                turns[-1].prompt = f"{turns[-1].prompt}\n\n{text}"
            else:
                turns.append(Turn(0, 0, text))
        if turns and turns[-1].answer is None:
            if field == "conversations":
                turns.pop()
            else:
                turns[-1].output_tokens = self._output_tokens(row, record)
        if not turns and field == "messages":
            raise bad_value(self._path, row + 1, field, record[field], "must have a message of a user.")
        return Conversation(turns, system=system) if turns else None

    def _messages(
        self, row: int, record: Mapping[str, Any], field: str, role_field: str, text_field: str
    ) -> Iterator[tuple[str, str]]:
        messages = record[field]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise bad_value(self._path, row + 1, field, messages, "must be a list of objects.")
        for number, message in enumerate(messages):
            role, text = message.get(role_field), message.get(text_field)
            if not isinstance(role, str) or role not in ROLES:
                allowed = f"must be one of {', '.join(ROLES)}."
                raise bad_value(self._path, row + 1, f"{field}[{number}].{role_field}", role, allowed)
            if not isinstance(text, str):
                raise bad_value(self._path, row + 1, f"{field}[{number}].{text_field}", text, "must be a text.")
            if text:
                yield ROLES[role], text
