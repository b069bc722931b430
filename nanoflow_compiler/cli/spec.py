"""From flags to what an engine is made of."""

from typing import TYPE_CHECKING

from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.cli.options import CompileFlags, EngineFlags

if TYPE_CHECKING:
    from nanoflow_compiler.engine.spec import EngineSpec

__all__ = ["make_spec"]


def make_spec(model: ModelSettings, *, engine: EngineFlags, compiler: CompileFlags) -> "EngineSpec":
    """Raises :class:`ConfigError` for a setting that cannot be; imports torch."""
    from nanoflow_compiler.engine.engine_config import EngineConfig
    from nanoflow_compiler.engine.spec import EngineSpec

    return EngineSpec(
        model=model.name,
        **model.loading(),
        config=EngineConfig(**engine.settings()),
        enforce_eager=compiler.enforce_eager,
        options=compiler.options(),
    )
