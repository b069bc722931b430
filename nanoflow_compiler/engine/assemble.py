"""Puts an engine together: the compiled step, the KV cache, and the loop around them."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.batcher import Batcher
from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.engine.buckets import Buckets
from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.engine_config import EngineConfig, EngineSizes
from nanoflow_compiler.engine.grammars import Grammars
from nanoflow_compiler.engine.limits import RequestLimits
from nanoflow_compiler.engine.memory import MemoryBudget, explain_out_of_memory, measure_memory
from nanoflow_compiler.engine.runner import EagerStep, ModelRunner, StepFn
from nanoflow_compiler.engine.served import Served
from nanoflow_compiler.engine.step_memory import StepMemory
from nanoflow_compiler.engine.structured import GrammarCompiler
from nanoflow_compiler.engine.table import RequestTable
from nanoflow_compiler.kernel_warmup import choose_kernel_cache
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.models.progress import progress_bar
from nanoflow_compiler.models.verify import verify_packed
from nanoflow_compiler.stages import Stages

__all__ = ["Assembled", "assemble"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """An engine that is ready to run, and what its memory went to."""

    core: EngineCore
    memory: MemoryBudget
    compile_seconds: Mapping[str, float]
    """Of what was compiled, by stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReadyStep:
    """The step of a model, and what is known of the model when its weights may be gone."""

    step: StepFn
    packed: PackedDecoder
    weights_bytes: int
    memory: StepMemory
    seconds: Mapping[str, float]


def assemble(
    served: Served, config: EngineConfig, *, compile_config: CompileConfig | None
) -> Assembled:
    """``compile_config`` is None for an engine that runs eagerly.

    Raises :class:`ConfigError` where the device has too little memory. The weights of a model that
    was loaded here stay only where its step holds them.
    """
    device = served.model.device
    if device.type == "cuda":
        choose_kernel_cache()
    sizes = config.sizes(longest=served.max_model_len, device_type=device.type)
    with explain_out_of_memory("while the model was compiled"):
        ready = _make_ready(served, sizes, compile_config=compile_config)
    memory = measure_memory(
        device,
        weights_bytes=ready.weights_bytes,
        step=ready.memory,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
    usable = _count_blocks(ready.packed, config, sizes, memory=memory)
    with explain_out_of_memory("while the KV cache was made"):
        cache = KVCache.allocate(ready.packed.layers, num_blocks=usable + 1, device=device)
    core = _make_core(served, config, sizes, cache=cache, step=ready.step)
    if compile_config is not None and device.type == "cuda":
        with explain_out_of_memory("while steps were captured as CUDA graphs"):
            _capture(core.runner, sizes)
    _log(memory, cache)
    return Assembled(core=core, memory=memory, compile_seconds=ready.seconds)


def _make_ready(
    served: Served, sizes: EngineSizes, *, compile_config: CompileConfig | None
) -> _ReadyStep:
    packed = PackedDecoder(served.model, max_length=sizes.max_model_len)
    verify_packed(packed)
    weights_bytes = sum(weight.nbytes for weight in served.model.parameters())
    is_captured = compile_config is not None and packed.device.type == "cuda"
    memory = StepMemory.estimate(served.model, sizes, is_captured=is_captured)
    step, seconds = _make_step(packed, compile_config=compile_config, keep=served.loaded)
    if served.loaded and compile_config is not None:
        _release_weights(packed, served.model)
    return _ReadyStep(
        step=step, packed=packed, weights_bytes=weights_bytes, memory=memory, seconds=seconds
    )


def _make_step(
    packed: PackedDecoder, *, compile_config: CompileConfig | None, keep: bool
) -> tuple[StepFn, Mapping[str, float]]:
    """And the seconds that it took, by stage."""
    if compile_config is None:
        return EagerStep(packed), {}
    stages = Stages()
    # Imported here, because an eager engine needs no compiler.
    with stages.stage("import"):
        from nanoflow_compiler.packed import compile_packed

    step = compile_packed(packed, compile_config, keep=keep)
    return step, stages | step.seconds


def _release_weights(*models: nn.Module) -> None:
    """The compiled step holds the weights that it reads: those that it merged would be there twice."""
    for model in models:
        nn.Module.to(model, torch.device("meta"))


def _make_core(
    served: Served, config: EngineConfig, sizes: EngineSizes, *, cache: KVCache, step: StepFn
) -> EngineCore:
    table = RequestTable(
        num_slots=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
        block_size=BLOCK_SIZE,
        eos_token_ids=served.eos_token_ids,
        seed=config.seed,
    )
    allocator = BlockAllocator(
        cache.num_blocks, block_size=BLOCK_SIZE, keep_unused=config.enable_prefix_caching
    )
    limits = RequestLimits(
        max_model_len=sizes.max_model_len,
        vocab_size=served.model.config.get_text_config().vocab_size,
        block_size=BLOCK_SIZE,
        num_blocks=cache.num_blocks - 1,
    )
    return EngineCore(
        ModelRunner(step, cache=cache, num_slots=sizes.max_num_seqs),
        batcher=Batcher(table, allocator, max_num_batched_tokens=sizes.max_num_batched_tokens),
        limits=limits,
        grammars=_grammars(served, vocab_size=limits.vocab_size),
    )


def _count_blocks(
    packed: PackedDecoder, config: EngineConfig, sizes: EngineSizes, *, memory: MemoryBudget
) -> int:
    bytes_per_block = BLOCK_SIZE * sum(layer.bytes_per_token for layer in packed.layers)
    if not config.is_cache_sized:
        memory.check(bytes_per_block)
    return config.count_blocks(
        sizes,
        block_size=BLOCK_SIZE,
        bytes_per_block=bytes_per_block,
        spare_bytes=memory.spare_bytes,
    )


def _capture(runner: ModelRunner, sizes: EngineSizes) -> None:
    buckets = Buckets.of_sizes(
        max_num_seqs=sizes.max_num_seqs, max_num_batched_tokens=sizes.max_num_batched_tokens
    ).all
    start = time.perf_counter()
    with progress_bar("capture CUDA graphs", total=len(buckets)) as bar:
        for _ in runner.capture(buckets, max_model_len=sizes.max_model_len):
            bar.advance()
    if runner.times:
        runner.times.capture_s = time.perf_counter() - start


def _grammars(served: Served, *, vocab_size: int) -> Grammars:
    make_compiler = partial(
        GrammarCompiler,
        served.tokenizer,
        vocab_size=vocab_size,
        eos_token_ids=served.eos_token_ids,
    )
    return Grammars(make_compiler, vocab_size=vocab_size)


def _log(memory: MemoryBudget, cache: KVCache) -> None:
    sizes = {**memory.facts, "kv_cache_bytes": cache.num_bytes}
    listed = ", ".join(
        f"{name.removesuffix('_bytes')} {count / 2**30:.2f}" for name, count in sizes.items()
    )
    _LOG.info("memory of %s, GiB: %s", memory.device, listed)
