"""A step of a given mix of requests, made by hand, and the memory that it works on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nanoflow_compiler.bench.ablation_settings import AblationSettings, Order
from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.sampling_columns import SamplingColumns
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape

__all__ = ["OneStep", "fill_cache", "make_step"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class OneStep:
    """A batch, and which of the requests each of its rows of logits is."""

    batch: Batch
    sampling: SamplingBatch
    requests: Ints
    num_decodes: int
    order: Order

    def cut(self, num_tokens: int, num_cells: int) -> Sequence[int]:
        """Where the cells end: two cells of a step with its decodes first are of one kind each."""
        kinds = (0, self.num_decodes, num_tokens)
        if num_cells == 2 and self.order == "decodes-first" and 0 < kinds[1] < num_tokens:
            return kinds
        return [num_tokens * cell // num_cells for cell in range(num_cells + 1)]


def fill_cache(
    layers: Sequence[LayerShape], settings: AblationSettings, *, device: torch.device
) -> KVCache:
    """With random keys and values; where memory is short, requests share all but their last block."""
    wanted = _own_blocks(settings) + settings.decodes * (_decode_blocks(settings) - 1) + 1
    usable = wanted
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        bytes_per_block = BLOCK_SIZE * sum(layer.bytes_per_token for layer in layers)
        usable = min(wanted, int(0.85 * free) // bytes_per_block)
    cache = KVCache.allocate(
        layers, num_blocks=max(usable, _own_blocks(settings) + 2), device=device
    )
    for pool in (*cache.keys, *cache.values):
        pool.normal_()
    return cache


def make_step(
    settings: AblationSettings, order: Order, *, num_blocks: int, vocab_size: int
) -> OneStep:
    """Random tokens, the same for each request in any order."""
    rng = np.random.default_rng(settings.seed)
    lens = np.array([1] * settings.decodes + settings.prompt_lens)
    starts = np.where(np.arange(len(lens)) < settings.decodes, settings.context - 1, 0)
    tables = _tables(settings, lens, num_blocks=num_blocks, rng=rng)
    tokens = np.split(rng.integers(0, vocab_size, lens.sum()), np.cumsum(lens)[:-1])
    at = _ordered(settings, order)
    lens, starts, tables = lens[at], starts[at], tables[at]
    ends, slots = np.cumsum(lens), np.arange(len(at))
    none = Batch.empty()
    batch = Batch(
        token_ids=np.concatenate([tokens[request] for request in at]),
        unknown=none.unknown,
        unknown_slots=none.unknown_slots,
        positions=np.concatenate(
            [start + np.arange(n) for start, n in zip(starts, lens, strict=True)]
        ),
        query_lens=lens,
        context_lens=starts,
        block_tables=tables,
        rows=ends - 1,
        slots=slots,
        keys=slots,
        counters=np.zeros_like(slots),
        prompt_rows=none.prompt_rows,
        prompt_targets=none.prompt_targets,
        prompt_keys=none.prompt_keys,
        prompt_counts=none.prompt_counts,
    )
    return OneStep(batch, _greedy(batch), at, settings.decodes, order)


def _decode_blocks(settings: AblationSettings) -> int:
    return -(-settings.context // BLOCK_SIZE)


def _own_blocks(settings: AblationSettings) -> int:
    """That a request writes to: the last one of a decode, all of a prompt."""
    return settings.decodes + sum(-(-length // BLOCK_SIZE) for length in settings.prompt_lens)


def _tables(
    settings: AblationSettings, lens: Ints, *, num_blocks: int, rng: np.random.Generator
) -> npt.NDArray[np.int32]:
    """Block 0 is scratch; a request's own blocks come first, and are nobody else's."""
    decodes, before = settings.decodes, _decode_blocks(settings) - 1
    most = max([before + 1, *(-(-length // BLOCK_SIZE) for length in settings.prompt_lens)])
    tables = np.zeros((len(lens), most), dtype=np.int32)
    first_shared = _own_blocks(settings) + 1
    shared = np.arange(first_shared, num_blocks)
    is_enough = len(shared) >= decodes * before
    drawn = rng.permutation(shared) if is_enough else rng.choice(shared, decodes * before)
    tables[:decodes, :before] = drawn[: decodes * before].reshape(decodes, before)
    tables[:decodes, before] = 1 + rng.permutation(decodes)
    own = decodes + 1
    for row, length in enumerate(settings.prompt_lens, decodes):
        count = -(-length // BLOCK_SIZE)
        tables[row, :count] = own + np.arange(count)
        own += count
    return tables


def _ordered(settings: AblationSettings, order: Order) -> Ints:
    """Numbers of the requests, decodes before prompts, as the step has them."""
    num_prompts = len(settings.prompt_lens)
    decodes, prompts = np.arange(settings.decodes), settings.decodes + np.arange(num_prompts)
    if order == "decodes-first":
        return np.concatenate([decodes, prompts])
    pairs = zip(
        np.array_split(decodes, settings.parts),
        np.array_split(prompts, settings.parts),
        strict=True,
    )
    return np.concatenate([part for pair in pairs for part in pair])


def _greedy(batch: Batch) -> SamplingBatch:
    num_rows = len(batch.slots)
    columns = SamplingColumns.allocate(num_rows)
    for slot in range(num_rows):
        columns.put(slot, SamplingParams(temperature=0), seed=0, eos_token_ids=())
    return SamplingBatch.gather(
        columns,
        slots=batch.slots,
        num_prompt_tokens=batch.context_lens + batch.query_lens,
        num_output_tokens=np.zeros(num_rows, dtype=np.int64),
        block_tables=batch.block_tables,
        block_size=BLOCK_SIZE,
    )
