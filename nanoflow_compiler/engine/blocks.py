"""Who owns which block of the KV cache, and which blocks hold a prefix that somebody may want again."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.errors import OutOfBlocksError

__all__ = ["BlockAllocator", "block_hashes"]

Ints = npt.NDArray[np.int32]


def block_hashes(token_ids: Ints, *, block_size: int, before: bytes = b"") -> Iterator[bytes]:
    """Names of the full blocks of tokens that follow the block called ``before``, or a salt.

    A name stands for all tokens up to the end of its block. 16 bytes of blake2b: two of a billion
    blocks share a name with a probability of 10^-21.
    """
    for end in range(block_size, len(token_ids) + 1, block_size):
        tokens = token_ids[end - block_size : end]
        before = hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest()
        yield before


class BlockAllocator:
    """Hands out block numbers 1, 2, ...; block 0 is scratch (see ``kv_cache``) and never handed out.

    A block is free, used by one request or more, or cached: used by none, but named, and found by
    its name until its memory is needed. Cached blocks count as free, and go in the order in which
    they were last used. Numbers come in ascending order as long as none has been returned, so that
    a request alone in the cache has consecutive blocks, which kernels read without a gather.
    """

    def __init__(self, num_blocks: int, *, block_size: int, keep_unused: bool = True) -> None:
        """``num_blocks`` counts the scratch block; ``keep_unused`` is the prefix cache."""
        self.block_size = block_size
        self.keep_unused = keep_unused
        self.num_usable = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))
        self._num_users = np.zeros(num_blocks, dtype=np.int32)
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, bytes] = {}
        self._by_name: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._cached)

    def count(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens``."""
        return -(-num_tokens // self.block_size)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest prefix of ``names`` that is there."""
        found: list[int] = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_beside(self, blocks: Sequence[int]) -> int:
        """Blocks that could be allocated if ``blocks`` were shared too."""
        return self.num_free - sum(block in self._cached for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """One more user of blocks that :meth:`find` named."""
        for block in blocks:
            self._cached.pop(block, None)
        self._num_users[blocks] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """All of them or, with :class:`OutOfBlocksError`, none."""
        if num_blocks > self.num_free:
            raise OutOfBlocksError(
                f"{num_blocks} KV blocks are needed and {self.num_free} of {self.num_usable} are free"
            )
        blocks = [self._take() for _ in range(num_blocks)]
        self._num_users[blocks] = 1
        return blocks

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        if (name := self._names.pop(block, None)) is not None:
            del self._by_name[name]

    def name(self, block: int, name: bytes) -> None:
        """Let others find a used block whose tokens are all computed; the first of a name keeps it."""
        if name not in self._by_name and block not in self._names:
            self._by_name[name] = block
            self._names[block] = name

    def forget_names(self) -> None:
        """Nobody knows any more what the blocks hold."""
        self._names.clear()
        self._by_name.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def release(self, blocks: Sequence[int]) -> None:
        """One user less of each; the last block of a request is the first that the cache gives up."""
        self._num_users[blocks] -= 1
        left = self._num_users[blocks].tolist()
        assert min(left, default=0) >= 0, f"one of the blocks {blocks} was released twice"
        for block, num_users in zip(reversed(blocks), reversed(left), strict=True):
            if num_users == 0:
                self._return(block)

    def _return(self, block: int) -> None:
        if self.keep_unused and block in self._names:
            self._cached[block] = None
        else:
            self._forget(block)
            self._free.append(block)
