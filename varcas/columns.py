"""Request records as columns: what metrics compute on. A million requests are a dozen arrays, not a million objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from varcas.records import LoadResult, RequestRecord

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TIMES = ("scheduled_s", "sent_s", "first_token_s", "last_token_s", "end_s")


@dataclass(frozen=True, slots=True)
class Requests:
    """The columns of `RequestRecord` that metrics need, one entry a request; NaN where a record has None.

    Attributes:
        scheduled_s: as the record has it; so `sent_s`, `first_token_s`, `last_token_s`, `end_s`.
        prompt_tokens: as the server counted them, else as scheduled.
        scheduled_prompt_tokens: as the record has it; of a later turn without its history.
        turns: place in its conversation, from 0.
        output_tokens: as the record has it; so `scheduled_output_tokens`.
        ok: the answer came whole and without an error.
        unfinished: neither whole nor failed: the drain ran out.
        offsets_s: of every token event of all requests after its request's send, request by request.
        counts: tokens of each of those events.
        splits: `offsets_s[splits[i]:splits[i + 1]]` are request i's.
    """

    scheduled_s: Floats
    sent_s: Floats
    first_token_s: Floats
    last_token_s: Floats
    end_s: Floats
    prompt_tokens: Floats
    scheduled_prompt_tokens: Floats
    turns: Ints
    output_tokens: Floats
    scheduled_output_tokens: Floats
    ok: Bools
    unfinished: Bools
    offsets_s: Floats
    counts: npt.NDArray[np.int32]
    splits: Ints

    def __len__(self) -> int:
        return len(self.scheduled_s)

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> Self:
        """Columns of these records."""
        sizes = [len(record.token_offsets_s) for record in records]
        failed = np.array([record.error not in (None, "unfinished") for record in records], dtype=np.bool_)
        ok = np.array([record.ok for record in records], dtype=np.bool_)
        tokens = [r.scheduled_prompt_tokens if r.prompt_tokens is None else r.prompt_tokens for r in records]
        return cls(
            **{name: np.array([getattr(record, name) for record in records], dtype=np.float64) for name in TIMES},
            prompt_tokens=np.array(tokens, dtype=np.float64),
            scheduled_prompt_tokens=np.array([r.scheduled_prompt_tokens for r in records], dtype=np.float64),
            turns=np.array([record.turn for record in records], dtype=np.int64),
            output_tokens=np.array([record.output_tokens for record in records], dtype=np.float64),
            scheduled_output_tokens=np.array([r.scheduled_output_tokens for r in records], dtype=np.float64),
            ok=ok,
            unfinished=~ok & ~failed,
            offsets_s=np.fromiter((o for r in records for o in r.token_offsets_s), np.float64, sum(sizes)),
            counts=np.fromiter((c for r in records for c in r.token_counts), np.int32, sum(sizes)),
            splits=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
        )

    @classmethod
    def from_arrow(cls, table: Any) -> Self:
        """Columns of rows of `results/requests`, a pyarrow table, without an object for each."""

        def floats(name: str) -> Floats:
            found: Floats = table[name].to_numpy().astype(np.float64, copy=False)
            return found

        def flat(name: str) -> tuple[Any, Ints]:
            column = table[name].combine_chunks()
            splits = column.offsets.to_numpy().astype(np.int64)
            return column.flatten().to_numpy(), splits - splits[0]

        error = table["error"].combine_chunks()
        clean = np.asarray(error.is_null().to_numpy(zero_copy_only=False), dtype=np.bool_)
        texts = error.dictionary_encode()
        named = [text == "unfinished" for text in texts.dictionary.to_pylist()]
        code = texts.indices.fill_null(0).to_numpy()
        cut = ~clean & (np.array([*named, False])[code])
        prompts, end_s = floats("prompt_tokens"), floats("end_s")
        ok = clean & ~np.isnan(end_s)
        offsets_s, splits = flat("token_offsets_s")
        return cls(
            **{name: floats(name) for name in TIMES},
            prompt_tokens=np.where(np.isnan(prompts), floats("scheduled_prompt_tokens"), prompts),
            scheduled_prompt_tokens=floats("scheduled_prompt_tokens"),
            turns=table["turn"].to_numpy().astype(np.int64, copy=False),
            output_tokens=floats("output_tokens"),
            scheduled_output_tokens=floats("scheduled_output_tokens"),
            ok=ok,
            unfinished=~ok & (clean | cut),
            offsets_s=offsets_s,
            counts=flat("token_counts")[0].astype(np.int32, copy=False),
            splits=splits,
        )

    @property
    def num_events(self) -> Ints:
        """Token events of each request."""
        return np.diff(self.splits)

    def where(self, mask: Bools) -> Requests:
        """The requests that the mask names, in order."""
        return self.take(np.flatnonzero(mask))

    def take(self, index: Ints) -> Requests:
        """These requests, in this order."""
        if len(index) == len(self) and np.array_equal(index, np.arange(len(self))):
            return self
        sizes = self.num_events[index]
        splits = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        events = np.repeat(self.splits[index] - splits[:-1], sizes) + np.arange(splits[-1])
        names = [n for n in self.__slots__ if n not in ("offsets_s", "counts", "splits")]
        picked: dict[str, Any] = {name: getattr(self, name)[index] for name in names}
        return replace(self, **picked, offsets_s=self.offsets_s[events], counts=self.counts[events], splits=splits)


@dataclass(frozen=True, slots=True)
class Measured:
    """A load as metrics see it.

    Attributes:
        requests: all of it.
        window: of them, those that were due within [0, `duration_s`), in the order in which they came due.
        duration_s: the window.
        drain_s: spent after it, until the last response or `max_drain_s`.
        client_cpu_frac: as `LoadResult` has it.
        kernel_stamped_frac: as `LoadResult` has it.
        num_left_out: as `LoadResult` has it.
    """

    requests: Requests
    window: Requests
    duration_s: float
    drain_s: float
    client_cpu_frac: float
    kernel_stamped_frac: float = 1.0
    num_left_out: int = 0

    @classmethod
    def of(
        cls,
        requests: Requests,
        *,
        duration_s: float,
        drain_s: float,
        client_cpu_frac: float = 0.0,
        kernel_stamped_frac: float = 1.0,
        num_left_out: int = 0,
    ) -> Self:
        """From columns; finds the window's requests."""
        inside = np.flatnonzero((requests.scheduled_s >= 0) & (requests.scheduled_s < duration_s))
        order = inside[np.argsort(requests.scheduled_s[inside], kind="stable")]
        window = requests.take(order)
        return cls(requests, window, duration_s, drain_s, client_cpu_frac, kernel_stamped_frac, num_left_out)

    @classmethod
    def of_load(cls, load: LoadResult) -> Self:
        """From records."""
        return cls.of(
            Requests.of(load.records),
            duration_s=load.duration_s,
            drain_s=load.drain_s,
            client_cpu_frac=load.client_cpu_frac,
            kernel_stamped_frac=load.kernel_stamped_frac,
            num_left_out=load.num_left_out,
        )


def token_events(requests: Requests) -> tuple[Floats, Floats]:
    """Arrival time in s and tokens of every token event of these requests."""
    at_s = requests.offsets_s + np.repeat(requests.sent_s, requests.num_events)
    sent = ~np.isnan(at_s)
    return at_s[sent], requests.counts[sent].astype(np.float64)
