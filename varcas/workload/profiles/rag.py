"""rag: long prompts with retrieved documents, short answers."""

from __future__ import annotations

from varcas.workload.profiles.profile import Lengths, Profile

PROFILE = Profile(
    prompt=Lengths.of_quantiles(2730, 3702),
    output=Lengths.of_quantiles(167, 372),
    max_tokens=4096,
    source="arXiv-Summarization-4K in Vidur's table 1 (Agrawal et al., MLSys 2024, arXiv:2405.05465): p50 and p90 of "
    "2730 and 3702 prompt tokens, 167 and 372 output tokens. No public trace of a retrieval service has lengths: this "
    "is its shape, documents in and a short answer out. Nothing is shared; `shared_prefix_tokens` and "
    "`shared_prefixes` put one of so many documents before the question. Prompt + output at most 4096, as there.",
)
