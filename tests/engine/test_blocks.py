"""Blocks are conserved and found by name, whatever the order of what happens to them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nanoflow_compiler.engine.blocks import BlockAllocator, block_hashes
from nanoflow_compiler.errors import OutOfBlocksError

NUM_BLOCKS = 12


class Blocks(RuleBasedStateMachine):
    """Holders of blocks; a name is a number, given in the order of the holder's blocks."""

    @initialize(keeps=st.booleans())
    def start(self, keeps):
        self.keeps = keeps
        self.allocator = BlockAllocator(NUM_BLOCKS, block_size=64, keep_unused=keeps)
        self.held = []
        self.named = {}

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count):
        free = self.allocator.num_free
        if count > free:
            with pytest.raises(OutOfBlocksError, match=f"{count} KV blocks"):
                self.allocator.allocate(count)
            assert self.allocator.num_free == free
            return
        blocks = self.allocator.allocate(count)
        for block in blocks:
            self.named.pop(block, None)
        self.held.append(blocks)

    @rule(data=st.data(), name=st.integers(0, 5))
    def name(self, data, name):
        blocks = sorted({block for blocks in self.held for block in blocks})
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            self.allocator.name(block, bytes([name]))
            if block not in self.named and name not in self.named.values():
                self.named[block] = name

    @rule(name=st.integers(0, 5))
    def share(self, name):
        found = self.allocator.find([bytes([name]), b"unknown"])
        assert [self.named[block] for block in found] == [name] * len(found)
        assert bool(found) == (name in self.named.values())
        used = {block for blocks in self.held for block in blocks}
        assert self.allocator.num_free_beside(found) == self.allocator.num_free - sum(
            block not in used for block in found
        )
        self.allocator.share(found)
        self.held.append(found)

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.allocator.release(blocks)
            used = {block for blocks in self.held for block in blocks}
            if not self.keeps:
                self.named = {b: n for b, n in self.named.items() if b in used}

    @invariant()
    def every_block_is_free_or_used(self):
        users = Counter(block for blocks in getattr(self, "held", ()) for block in blocks)
        if users:
            assert set(users) <= set(range(1, NUM_BLOCKS))
            assert self.allocator.num_free + len(users) == self.allocator.num_usable


TestBlocks = Blocks.TestCase


def test_blocks_come_in_order_and_come_back_in_order():
    allocator = BlockAllocator(6, block_size=64)
    first = allocator.allocate(3)
    assert first == [1, 2, 3]
    allocator.release(first)
    assert allocator.allocate(5) == [1, 2, 3, 4, 5]


def test_the_cache_gives_up_what_was_used_least_lately_and_ends_before_beginnings():
    allocator = BlockAllocator(5, block_size=64)
    old, new = allocator.allocate(2), allocator.allocate(2)
    for block in (*old, *new):
        allocator.name(block, bytes([block]))
    allocator.release(old)
    allocator.release(new)
    assert allocator.num_free == 4
    assert allocator.allocate(1) == [old[1]]
    assert allocator.allocate(1) == [old[0]]
    assert allocator.find([bytes([new[0]]), bytes([new[1]])]) == new
    assert allocator.find([bytes([old[0]])]) == []


def test_a_block_cannot_be_returned_twice():
    allocator = BlockAllocator(3, block_size=64)
    blocks = allocator.allocate(1)
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        allocator.release(blocks)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_count(tokens, blocks):
    assert BlockAllocator(2, block_size=64).count(tokens) == blocks


def test_a_name_stands_for_all_tokens_before():
    tokens = np.arange(12, dtype=np.int32)
    names = list(block_hashes(tokens, block_size=4))
    assert len(set(names)) == 3
    assert list(block_hashes(tokens[:11], block_size=4)) == names[:2]
    assert list(block_hashes(tokens[4:], block_size=4, before=names[0])) == names[1:]
    other = tokens.copy()
    other[0] = 99
    assert not set(block_hashes(other, block_size=4)) & set(names)
    assert not set(block_hashes(tokens, block_size=4, before=b"group")) & set(names)
