"""What an engine is made of, by names and numbers, so that another process can make it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.build import BuiltEngine, build_engine
from nanoflow_compiler.engine.engine_config import EngineConfig
from nanoflow_compiler.engine.served import Loading
from nanoflow_compiler.models.load import load_tokenizer
from nanoflow_compiler.models.weights import DummyDistribution

__all__ = ["EngineSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Raises :class:`ConfigError` on construction for a setting that cannot be."""

    model: str
    dtype: str = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    dummy_distribution: DummyDistribution = "normal"
    hf_overrides: Mapping[str, Any] | None = None
    """Replace values of the model's configuration."""
    device: str = "auto"
    """``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is a GPU where torch has one."""
    tokenizer: str | None = None
    """Of another model; ``None`` is the model's own."""
    config: EngineConfig = field(default_factory=EngineConfig)
    enforce_eager: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    """Of the compiler, as ``torch.compile(..., options=...)`` takes them."""

    def __post_init__(self) -> None:
        """Refuse options that no compiler could use, and what names no device."""
        CompileConfig.from_options(self.options)
        self._loading()

    def build(self) -> BuiltEngine:
        """Load the model and make the engine: seconds to minutes."""
        compile_config = CompileConfig.from_options(self.options)
        return build_engine(
            self.model,
            tokenizer=None if self.tokenizer is None else load_tokenizer(self.tokenizer),
            loading=self._loading(),
            config=self.config,
            compile_config=None if self.enforce_eager else compile_config,
        )

    def _loading(self) -> Loading:
        return Loading(
            dtype=self.dtype,
            load_format=self.load_format,
            device=self.device,
            dummy_distribution=self.dummy_distribution,
            hf_overrides=self.hf_overrides,
        )
