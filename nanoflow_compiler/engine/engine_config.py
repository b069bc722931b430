"""The sizes of an engine, checked."""

from dataclasses import dataclass

from nanoflow_compiler.errors import ConfigError

__all__ = ["EngineConfig", "EngineSizes"]


NUM_SEQS = {"cpu": 64, "cuda": 1024}
NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 2048}
"""By type of device. On a CPU, a step of 512 tokens of a small model takes about a second, in which no
other request advances; on a current GPU, a GEMM over 2048 tokens has reached the compute roof."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """Settings of :class:`EngineConfig` that have a number now."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much runs at once; names are vLLM's. What is ``None`` is derived from model and device."""

    max_model_len: int | None = None
    """Tokens of a prompt and its output together; ``None`` is what the model's positions hold."""
    max_num_seqs: int | None = None
    """Requests that run at the same time; ``None`` is 64 on a CPU and 1024 on a GPU."""
    max_num_batched_tokens: int | None = None
    """The token budget of a step, longer prompts take several; ``None``: 512 on a CPU, 2048 on a GPU."""
    num_kv_blocks: int | None = None
    """Usable blocks of 64 tokens; ``None`` leaves it to ``kv_cache_memory_bytes``."""
    kv_cache_memory_bytes: int | None = None
    """``None``: what ``max_num_seqs`` full sequences need, if the device has as much to spare."""
    gpu_memory_utilization: float | None = None
    """The fraction of the GPU's memory that may be in use, KV cache included; ``None`` is 0.9."""
    enable_prefix_caching: bool = True
    """Keep the blocks of requests that ended, for prompts that begin alike."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that no step could use."""
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_kv_blocks",
            "kv_cache_memory_bytes",
        ):
            _check_positive(name, getattr(self, name))
        memory = ("num_kv_blocks", "kv_cache_memory_bytes", "gpu_memory_utilization")
        given = [name for name in memory if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"give {given[0]} or {given[1]}, not both")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, not {share}")

    def sizes(self, *, longest: int, device_type: str) -> "EngineSizes":
        """For a model whose positions hold ``longest`` tokens, on a device of this type of torch's."""
        if self.max_model_len is not None and self.max_model_len > longest:
            raise ConfigError(
                f"max_model_len={self.max_model_len} is more than the {longest} "
                "tokens that the model's positions hold"
            )
        if self.gpu_memory_utilization is not None and device_type == "cpu":
            raise ConfigError(
                "gpu_memory_utilization is for a GPU; on a CPU, set kv_cache_memory_bytes"
            )
        budget = self.max_num_batched_tokens or NUM_BATCHED_TOKENS[device_type]
        return EngineSizes(
            max_model_len=self.max_model_len or longest,
            max_num_seqs=self.max_num_seqs or NUM_SEQS[device_type],
            max_num_batched_tokens=budget,
        )

    @property
    def is_cache_sized(self) -> bool:
        """Whether the size of the KV cache is given, not derived from what the device has to spare."""
        return self.num_kv_blocks is not None or self.kv_cache_memory_bytes is not None

    def count_blocks(
        self, sizes: "EngineSizes", *, block_size: int, bytes_per_block: int, spare_bytes: int
    ) -> int:
        """Usable blocks of the KV cache, when the device has ``spare_bytes``."""
        if self.num_kv_blocks is not None:
            return self.num_kv_blocks
        if self.kv_cache_memory_bytes is not None:
            fitting = self.kv_cache_memory_bytes // bytes_per_block
        else:
            most = sizes.max_num_seqs * -(-sizes.max_model_len // block_size)
            fitting = min(most, spare_bytes // bytes_per_block)
        if fitting < 1:
            raise ConfigError(
                f"kv_cache_memory_bytes={self.kv_cache_memory_bytes or spare_bytes} holds no block of "
                f"the KV cache, which takes {bytes_per_block} bytes for {block_size} tokens of all "
                "layers"
            )
        return fitting


def _check_positive(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, not {value!r}")
