"""What an engine is made of, by names and numbers, so that another process can make it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.assemble import make_core
from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.engine_config import EngineConfig
from nanoflow_compiler.engine.served import Served
from nanoflow_compiler.models.load import load_tokenizer

__all__ = ["BuiltEngine", "EngineSpec"]

_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Raises :class:`ConfigError` on construction for a setting that cannot be."""

    model: str
    dtype: str = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    tokenizer: str | None = None
    """Of another model; ``None`` is the model's own."""
    config: EngineConfig = field(default_factory=EngineConfig)
    enforce_eager: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    """Of the compiler, as ``torch.compile(..., options=...)`` takes them."""

    def __post_init__(self) -> None:
        """Refuse options that no compiler could use."""
        CompileConfig.from_options(self.options)

    def build(self) -> "BuiltEngine":
        """Load the model and make the engine: seconds to minutes."""
        compile_config = CompileConfig.from_options(self.options)
        start = time.perf_counter()
        served = Served.find(
            self.model,
            tokenizer=None if self.tokenizer is None else load_tokenizer(self.tokenizer),
            dtype=self.dtype,
            load_format=self.load_format,
        )
        loaded = time.perf_counter()
        core = make_core(
            served, self.config, compile_config=None if self.enforce_eager else compile_config
        )
        seconds = {"load": loaded - start, "compile": time.perf_counter() - loaded}
        return BuiltEngine(core=core, served=served, seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine that is ready to run."""

    core: EngineCore
    served: Served
    seconds: Mapping[str, float]
    """By stage."""

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """What the authors of the model recommend to requests that do not say otherwise."""
        config = self.served.model.generation_config
        found = {name: getattr(config, name, None) for name in _RECOMMENDED}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """What is in force, for people."""
        table, batcher = self.core.table, self.core.batcher
        return {
            "device": str(self.served.model.device),
            "dtype": str(self.served.model.dtype).removeprefix("torch."),
            "max_model_len": self.core.limits.max_model_len,
            "max_num_seqs": len(table.keys),
            "max_num_batched_tokens": batcher.max_num_batched_tokens,
            "num_kv_blocks": self.core.limits.num_blocks,
            "block_size": self.core.limits.block_size,
            "kv_cache_bytes": self.core.runner.cache.num_bytes,
            "enable_prefix_caching": batcher.allocator.keep_unused,
            "seed": table.seed,
        }
