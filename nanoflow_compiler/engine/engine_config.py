"""The sizes of an engine, checked."""

from dataclasses import dataclass

from nanoflow_compiler.errors import ConfigError

__all__ = ["MAX_NUM_BATCHED_TOKENS", "MAX_NUM_SEQS", "EngineConfig"]

MAX_NUM_SEQS = 64
MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_MAX_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much runs at once; names are vLLM's."""

    max_model_len: int
    """Tokens of a prompt and its output together."""
    max_num_seqs: int = MAX_NUM_SEQS
    """Requests that run at the same time."""
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    """The token budget of a step; longer prompts are computed in several."""
    num_kv_blocks: int | None = None
    """Usable blocks of 64 tokens; ``None`` leaves it to ``kv_cache_memory_bytes``."""
    kv_cache_memory_bytes: int | None = None
    """``None``: what ``max_num_seqs`` full sequences need, but at most 2 GiB."""
    enable_prefix_caching: bool = True
    """Keep the blocks of requests that ended, for prompts that begin alike."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that no step could use."""
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            _check_positive(name, getattr(self, name))
        for name in ("num_kv_blocks", "kv_cache_memory_bytes"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.num_kv_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError("give num_kv_blocks or kv_cache_memory_bytes, not both")

    def count_blocks(self, *, block_size: int, bytes_per_block: int) -> int:
        """Usable blocks of the cache."""
        if self.num_kv_blocks is not None:
            return self.num_kv_blocks
        most = self.max_num_seqs * -(-self.max_model_len // block_size)
        if self.kv_cache_memory_bytes is None:
            return max(1, min(most, DEFAULT_MAX_CACHE_BYTES // bytes_per_block))
        if self.kv_cache_memory_bytes < bytes_per_block:
            raise ConfigError(
                f"kv_cache_memory_bytes={self.kv_cache_memory_bytes} holds no block of the KV cache, "
                f"which takes {bytes_per_block} bytes for {block_size} tokens of all layers"
            )
        return self.kv_cache_memory_bytes // bytes_per_block


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, not {value!r}")
