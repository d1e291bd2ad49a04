"""code: completion in an editor, much context and a few tokens."""

from __future__ import annotations

from varcas.workload.profiles.profile import Lengths, Profile

PROFILE = Profile(
    prompt=Lengths.of_median_and_mean(1500, 2048),
    output=Lengths.of_median_and_mean(13, 28),
    max_tokens=8192,
    source="Azure's code completion service (Patel et al., Splitwise, ISCA 2024, arXiv:2311.18677, figure 3): medians "
    "of 1500 prompt and 13 output tokens; means of 2048 and 28 in the trace published with it "
    "(AzureLLMInferenceTrace_code.csv, 8819 requests, longest prompt about 7440). Log-normals with these medians and "
    "means, prompt + output at most 8192; the trace itself, which is no log-normal, can be given as `data`.",
)
