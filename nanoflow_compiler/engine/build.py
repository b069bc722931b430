"""From the name of a model to an engine that is ready to run."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.assemble import Assembled, assemble
from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.engine_config import EngineConfig
from nanoflow_compiler.engine.served import Loading, Served
from nanoflow_compiler.graphs import dtype_name
from nanoflow_compiler.models import Decoder
from nanoflow_compiler.models.place import current_device

__all__ = ["BuiltEngine", "build_engine"]

_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine that is ready to run."""

    core: EngineCore
    tokenizer: PreTrainedTokenizerBase | None
    path: Path | None
    """The local directory of the model, where it has one."""
    sampling_defaults: Mapping[str, float]
    """What the authors of the model recommend to requests that do not say otherwise."""
    facts: Mapping[str, Any]
    """What is in force, for people."""
    seconds: Mapping[str, float]
    """By stage."""
    compile_seconds: Mapping[str, float]
    """Of the stage ``compile``, by what it did; the rest is the probe of the model and the KV cache."""


def build_engine(
    model: str | Path | Decoder | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    loading: Loading,
    config: EngineConfig,
    compile_config: CompileConfig | None,
) -> BuiltEngine:
    """Load the model and make the engine: seconds to minutes; without ``compile_config`` an eager one."""
    start = time.perf_counter()
    served = Served.find(model, tokenizer=tokenizer, loading=loading)
    loaded = time.perf_counter()
    place = {"device": str(served.model.device), "dtype": dtype_name(served.model.dtype)}
    with current_device(served.model.device):
        assembled = assemble(served, config, compile_config=compile_config)
    made = time.perf_counter()
    times = assembled.core.runner.times
    capture = {} if times is None else {"capture": times.capture_s}
    compile_s = made - loaded - sum(capture.values())
    return BuiltEngine(
        core=assembled.core,
        tokenizer=served.tokenizer,
        path=served.path,
        sampling_defaults=_sampling_defaults(served.model),
        facts=place | _facts(assembled),
        seconds={"load": loaded - start, "compile": compile_s, **capture},
        compile_seconds=assembled.compile_seconds,
    )


def _sampling_defaults(model: PreTrainedModel) -> dict[str, float]:
    found = {name: getattr(model.generation_config, name, None) for name in _RECOMMENDED}
    return {name: value for name, value in found.items() if value is not None}


def _facts(assembled: Assembled) -> dict[str, Any]:
    core = assembled.core
    table, batcher = core.table, core.batcher
    return {
        "max_model_len": core.limits.max_model_len,
        "max_num_seqs": len(table.keys),
        "max_num_batched_tokens": batcher.max_num_batched_tokens,
        "num_kv_blocks": core.limits.num_blocks,
        "block_size": core.limits.block_size,
        **assembled.memory.facts,
        "kv_cache_bytes": core.runner.cache.num_bytes,
        "enable_prefix_caching": batcher.allocator.keep_unused,
        "seed": table.seed,
    }
