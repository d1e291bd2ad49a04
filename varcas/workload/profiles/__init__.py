"""The built-in workloads, a file each. A new one is a file with a `PROFILE`, and a line here."""

from __future__ import annotations

from varcas.workload.profiles import chat_long, chat_medium, chat_short, code, multi_turn, rag, shared_prefix
from varcas.workload.profiles.profile import Profile

PROFILES: dict[str, Profile] = {
    "chat-short": chat_short.PROFILE,
    "chat-medium": chat_medium.PROFILE,
    "chat-long": chat_long.PROFILE,
    "multi-turn": multi_turn.PROFILE,
    "shared-prefix": shared_prefix.PROFILE,
    "rag": rag.PROFILE,
    "code": code.PROFILE,
}
