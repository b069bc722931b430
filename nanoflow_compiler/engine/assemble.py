"""Puts an engine together: the compiled step, the KV cache, and the loop around them."""

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.batcher import Batcher
from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.engine_config import EngineConfig
from nanoflow_compiler.engine.runner import EagerStep, ModelRunner, StepFn
from nanoflow_compiler.engine.served import Served
from nanoflow_compiler.engine.table import RequestTable
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.models.verify import verify_packed

__all__ = ["make_core"]


def make_core(
    served: Served, config: EngineConfig, *, compile_config: CompileConfig | None
) -> EngineCore:
    """An engine that is ready to run; ``compile_config`` is None for one that runs eagerly."""
    if config.max_model_len > served.max_model_len:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is more than the {served.max_model_len} "
            "tokens that the model's positions hold"
        )
    packed = PackedDecoder(served.model, max_length=config.max_model_len)
    verify_packed(packed)
    bytes_per_block = BLOCK_SIZE * sum(layer.bytes_per_token for layer in packed.layers)
    usable = config.count_blocks(block_size=BLOCK_SIZE, bytes_per_block=bytes_per_block)
    cache = KVCache.allocate(packed.layers, num_blocks=usable + 1, device=packed.device)
    table = RequestTable(
        num_slots=config.max_num_seqs,
        max_model_len=config.max_model_len,
        block_size=BLOCK_SIZE,
        eos_token_ids=served.eos_token_ids,
        seed=config.seed,
    )
    allocator = BlockAllocator(
        usable + 1, block_size=BLOCK_SIZE, keep_unused=config.enable_prefix_caching
    )
    step = _make_step(packed, compile_config=compile_config, keep=served.loaded)
    return EngineCore(
        ModelRunner(step, cache=cache, num_slots=config.max_num_seqs),
        batcher=Batcher(table, allocator, max_num_batched_tokens=config.max_num_batched_tokens),
        max_model_len=config.max_model_len,
        vocab_size=served.model.config.get_text_config().vocab_size,
    )


def _make_step(
    packed: PackedDecoder, *, compile_config: CompileConfig | None, keep: bool
) -> StepFn:
    if compile_config is None:
        return EagerStep(packed)
    # Imported here, because an eager engine needs no compiler.
    from nanoflow_compiler.packed import compile_packed

    step: StepFn = compile_packed(packed, compile_config, keep=keep)
    return step
