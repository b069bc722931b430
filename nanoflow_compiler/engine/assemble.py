"""Puts an engine together: the compiled step, the KV cache, and the loop around them."""

from functools import partial

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.batcher import Batcher
from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.engine.buckets import Buckets
from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.engine_config import EngineConfig, EngineSizes
from nanoflow_compiler.engine.grammars import Grammars
from nanoflow_compiler.engine.limits import RequestLimits
from nanoflow_compiler.engine.memory import spare_bytes
from nanoflow_compiler.engine.runner import EagerStep, ModelRunner, StepFn
from nanoflow_compiler.engine.served import Served
from nanoflow_compiler.engine.structured import GrammarCompiler
from nanoflow_compiler.engine.table import RequestTable
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.models.progress import progress_bar
from nanoflow_compiler.models.verify import verify_packed

__all__ = ["make_core"]


def make_core(
    served: Served, config: EngineConfig, *, compile_config: CompileConfig | None
) -> EngineCore:
    """An engine that is ready to run; ``compile_config`` is None for one that runs eagerly."""
    device = served.model.device
    sizes = config.sizes(longest=served.max_model_len, device_type=device.type)
    packed = PackedDecoder(served.model, max_length=sizes.max_model_len)
    verify_packed(packed)
    usable = _count_blocks(packed, config, sizes)
    table = RequestTable(
        num_slots=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
        block_size=BLOCK_SIZE,
        eos_token_ids=served.eos_token_ids,
        seed=config.seed,
    )
    allocator = BlockAllocator(
        usable + 1, block_size=BLOCK_SIZE, keep_unused=config.enable_prefix_caching
    )
    limits = RequestLimits(
        max_model_len=sizes.max_model_len,
        vocab_size=served.model.config.get_text_config().vocab_size,
        block_size=BLOCK_SIZE,
        num_blocks=usable,
    )
    cache = KVCache.allocate(packed.layers, num_blocks=usable + 1, device=packed.device)
    step = _make_step(packed, compile_config=compile_config, keep=served.loaded)
    runner = ModelRunner(step, cache=cache, num_slots=sizes.max_num_seqs)
    if compile_config is not None and device.type == "cuda":
        _capture(runner, sizes)
    return EngineCore(
        runner,
        batcher=Batcher(table, allocator, max_num_batched_tokens=sizes.max_num_batched_tokens),
        limits=limits,
        grammars=_grammars(served, vocab_size=limits.vocab_size),
    )


def _count_blocks(packed: PackedDecoder, config: EngineConfig, sizes: EngineSizes) -> int:
    return config.count_blocks(
        sizes,
        block_size=BLOCK_SIZE,
        bytes_per_block=BLOCK_SIZE * sum(layer.bytes_per_token for layer in packed.layers),
        spare_bytes=spare_bytes(
            packed.device, gpu_memory_utilization=config.gpu_memory_utilization
        ),
    )


def _capture(runner: ModelRunner, sizes: EngineSizes) -> None:
    buckets = Buckets.of_sizes(
        max_num_seqs=sizes.max_num_seqs, max_num_batched_tokens=sizes.max_num_batched_tokens
    ).all
    with progress_bar("capture CUDA graphs", total=len(buckets)) as bar:
        for _ in runner.capture(buckets, max_model_len=sizes.max_model_len):
            bar.advance()


def _grammars(served: Served, *, vocab_size: int) -> Grammars:
    make_compiler = partial(
        GrammarCompiler,
        served.tokenizer,
        vocab_size=vocab_size,
        eos_token_ids=served.eos_token_ids,
    )
    return Grammars(make_compiler, vocab_size=vocab_size)


def _make_step(
    packed: PackedDecoder, *, compile_config: CompileConfig | None, keep: bool
) -> StepFn:
    if compile_config is None:
        return EagerStep(packed)
    # Imported here, because an eager engine needs no compiler.
    from nanoflow_compiler.packed import compile_packed

    step: StepFn = compile_packed(packed, compile_config, keep=keep)
    return step
