"""A device without a model, which reads what a step is given as a model would, and an engine on it."""

from concurrent.futures import Future

import numpy as np
import torch

from nanoflow_compiler.engine.batcher import Batcher
from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.grammars import Grammars
from nanoflow_compiler.engine.limits import RequestLimits
from nanoflow_compiler.engine.messages import EngineRequest
from nanoflow_compiler.engine.sampled import Sampled
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.table import RequestTable
from nanoflow_compiler.errors import RequestError

PRIME = 1_000_003
BLOCK, VOCABULARY, END = 4, 50, 3


def next_token(tokens, *, vocab_size):
    """What :class:`StubDevice` finds after these tokens."""
    state = 7
    for token in tokens:
        state = (state * PRIME + int(token)) % 2**31
    return state % vocab_size


def masked(tokens, mask):
    """Instead of a barred token the next one that may come."""
    tokens = list(tokens)
    for row, words in zip(mask.rows.tolist(), mask.words, strict=True):
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCABULARY]
        (allowed,) = np.nonzero(np.tile(bits, 2)[tokens[row] :])
        tokens[row] = (tokens[row] + int(allowed[0])) % VOCABULARY
    return tokens


class StubGrammar:
    """Token ``i`` of the text leaves the remainder ``i % 3``; the end token may always come."""

    def __init__(self):
        self.tokens = []

    @property
    def is_terminated(self):
        return END in self.tokens

    def allows(self, token):
        return token == END or token % 3 == len(self.tokens) % 3

    def accept(self, token):
        if not self.allows(token):
            raise RequestError(f"token {token} does not fit")
        self.tokens.append(token)

    def fill(self, row):
        bits = np.zeros(len(row) * 32, dtype=np.uint8)
        bits[:VOCABULARY] = [self.allows(token) for token in range(VOCABULARY)]
        row[:] = np.packbits(bits, bitorder="little").view(np.int32)


class StubCompiler:
    """Makes a :class:`StubGrammar`, or fails for a regex that is no number."""

    def compile(self, params):
        if not params.regex.isdigit():
            raise RequestError(f"{params.regex} cannot\nbe compiled")
        return StubGrammar()


class StubDevice:
    """The next token depends on every token that the blocks of a request hold.

    A block that two requests write, that is read before it is written, or that is given away too
    early, thus shows as a wrong token.
    """

    def __init__(self, *, block_size, vocab_size):
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.last = {}
        self.store = {}
        self.batches = []

    def submit(self, batch, sampling, *, mask=None):
        assert len(sampling.temperature) == len(batch.rows)
        self.batches.append(batch)
        ids = batch.token_ids.copy()
        ids[batch.unknown] = [self.last[slot] for slot in batch.unknown_slots.tolist()]
        owners = np.repeat(np.arange(len(batch.query_lens)), batch.query_lens)
        for owner, position, token in zip(owners, batch.positions, ids, strict=True):
            self.store[self.place(batch, owner, position)] = int(token)
        tokens = [self.sample(batch, owners[row], batch.positions[row]) for row in batch.rows]
        sampled = Future()
        if mask is None:
            self.finish(batch, tokens, sampled)
        else:
            mask.add_done_callback(
                lambda known: self.finish(batch, masked(tokens, known.result()), sampled)
            )
        return sampled

    def finish(self, batch, tokens, sampled):
        self.last.update(zip(batch.slots.tolist(), tokens, strict=True))
        sampled.set_result(Sampled(torch.tensor(tokens, dtype=torch.int64), None))

    def place(self, batch, owner, position):
        block = int(batch.block_tables[owner, position // self.block_size])
        assert block > 0, "the scratch block was read or written"
        return block * self.block_size + int(position) % self.block_size

    def sample(self, batch, owner, position):
        places = (self.place(batch, owner, at) for at in range(int(position) + 1))
        return next_token([self.store[place] for place in places], vocab_size=self.vocab_size)

    def close(self):
        pass


def make_core(
    *, num_slots=4, num_blocks=40, budget=16, most=40, cache=True, make_compiler=StubCompiler
):
    table = RequestTable(
        num_slots=num_slots, max_model_len=most, block_size=BLOCK, eos_token_ids=[END]
    )
    allocator = BlockAllocator(num_blocks, block_size=BLOCK, keep_unused=cache)
    limits = RequestLimits(
        max_model_len=most,
        vocab_size=VOCABULARY,
        block_size=BLOCK,
        num_blocks=allocator.num_usable,
    )
    return EngineCore(
        StubDevice(block_size=BLOCK, vocab_size=VOCABULARY),
        batcher=Batcher(table, allocator, max_num_batched_tokens=budget),
        limits=limits,
        grammars=Grammars(make_compiler, vocab_size=VOCABULARY),
    )


def make_request(key, prompt, *, group=None, **params):
    return EngineRequest(
        key=key,
        request_id=str(key),
        prompt_token_ids=prompt,
        params=SamplingParams(temperature=0, **params),
        group=key if group is None else group,
    )


def alone(request, *, most):
    """The tokens of a request that has the device to itself, and why they end."""
    tokens, params = list(request.prompt_token_ids), request.params
    limit = min(most, len(tokens) + (params.max_tokens or most))
    grammar = StubGrammar() if params.structured_outputs else None
    while len(tokens) < limit:
        token = next_token(tokens, vocab_size=VOCABULARY)
        while grammar and not grammar.allows(token):
            token = (token + 1) % VOCABULARY
        if grammar:
            grammar.accept(token)
        tokens.append(token)
        is_end = tokens[-1] == END and not (params.ignore_eos and grammar is None)
        if is_end or tokens[-1] in params.stop_token_ids:
            return tokens[len(request.prompt_token_ids) :], "stop"
    return tokens[len(request.prompt_token_ids) :], "length"
