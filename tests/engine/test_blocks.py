"""Blocks are conserved, whatever the order of allocations and returns."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.errors import OutOfBlocksError

NUM_BLOCKS = 12


class Blocks(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS, block_size=64)
        self.held = []

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count):
        free = self.allocator.num_free
        if count > free:
            with pytest.raises(OutOfBlocksError, match=f"{count} KV blocks"):
                self.allocator.allocate(count)
            assert self.allocator.num_free == free
        else:
            self.held.append(self.allocator.allocate(count))

    @rule(data=st.data())
    def free(self, data):
        if self.held:
            index = data.draw(st.integers(0, len(self.held) - 1))
            self.allocator.free(self.held.pop(index))

    @invariant()
    def every_block_is_free_or_held_once(self):
        held = [block for blocks in self.held for block in blocks]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(1, NUM_BLOCKS))
        assert self.allocator.num_free + len(held) == self.allocator.num_usable


TestBlocks = Blocks.TestCase


def test_blocks_come_in_order_and_come_back_in_order():
    allocator = BlockAllocator(6, block_size=64)
    first = allocator.allocate(3)
    assert first == [1, 2, 3]
    allocator.free(first)
    assert allocator.allocate(5) == [1, 2, 3, 4, 5]


def test_a_block_cannot_be_returned_twice():
    allocator = BlockAllocator(3, block_size=64)
    blocks = allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(KeyError):
        allocator.free(blocks)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_count(tokens, blocks):
    assert BlockAllocator(2, block_size=64).count(tokens) == blocks
