"""Who owns which block of the KV cache."""

from collections.abc import Iterable

from nanoflow_compiler.errors import OutOfBlocksError

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """Hands out block numbers 1, 2, ... ; block 0 is scratch (see ``kv_cache``) and never handed out.

    Numbers come in ascending order as long as none has been returned, so that a request alone in the
    cache has consecutive blocks, which kernels can read without a gather.
    """

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        """``num_blocks`` counts the scratch block."""
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens``."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """All of them or, with :class:`OutOfBlocksError`, none."""
        if num_blocks > len(self._free):
            raise OutOfBlocksError(
                f"{num_blocks} KV blocks are needed and {len(self._free)} of {self.num_usable} are free"
            )
        blocks = [self._free.pop() for _ in range(num_blocks)]
        self._used.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Take back blocks; the first of them is the next handed out."""
        for block in reversed(list(blocks)):
            self._used.remove(block)
            self._free.append(block)
