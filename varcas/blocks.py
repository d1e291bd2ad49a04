"""A model of vLLM's KV-cache blocks: how many are free, and which hold a prefix that another request may use.

After `BlockPool` and `KVCacheManager`, vLLM 0.32 `v1/core/block_pool.py` and `kv_cache_manager.py`. Blocks have no
numbers here: of a block that holds a known prefix its key is kept, of all others their count. Free blocks without a
prefix are taken first, then cached ones, the longest unused first. A second copy of a prefix that is computed at the
same time stays without a key, as if it held nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

Key = Hashable


class BlockPool:
    """Blocks of one engine; none is ever lost: `free + held` is `num_blocks`.

    Args:
        num_blocks: that sequences may use; vLLM keeps one more back.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = num_blocks
        self._unused: OrderedDict[Key, None] = OrderedDict()  # cached, nobody's, the longest unused first
        self._users: dict[Key, int] = {}  # cached and in use: by how many sequences

    @property
    def free(self) -> int:
        """Blocks that may be taken, cached ones included."""
        return self._blank + len(self._unused)

    @property
    def held(self) -> int:
        """Blocks in use, one that several sequences share counted once."""
        return self.num_blocks - self.free

    def holds(self, key: Key) -> bool:
        """Whether a block of this key is cached."""
        return key in self._users or key in self._unused

    def unused_among(self, keys: Sequence[Key]) -> int:
        """How many of these cached blocks are nobody's: to use them takes them from the free ones."""
        return sum(key in self._unused for key in keys)

    def share(self, keys: Sequence[Key]) -> None:
        """One more sequence uses these cached blocks."""
        for key in keys:
            if key in self._unused:
                del self._unused[key]
                self._users[key] = 1
            else:
                self._users[key] += 1

    def take(self, count: int) -> None:
        """Takes free blocks, of cached ones the longest unused; there must be as many."""
        blank = min(count, self._blank)
        self._blank -= blank
        for _ in range(count - blank):
            self._unused.popitem(last=False)

    def name(self, key: Key) -> bool:
        """Gives a block that is held its key; False when another block has it already."""
        if self.holds(key):
            return False
        self._users[key] = 1
        return True

    def give_back(self, keys: Sequence[Key], blanks: int) -> None:
        """A sequence lets go of its blocks: of those with a key the last ones are taken again first."""
        self._blank += blanks
        for key in reversed(keys):
            left = self._users[key] - 1
            if left:
                self._users[key] = left
            else:
                del self._users[key]
                self._unused[key] = None
