"""The wall: what a model's unavoidable operations would allow if each ran alone at its best.

The GEMMs of the layers at the token budget and that of the LM head on the rows of decodes, by cuBLAS through
torch; decode attention with our kernel at the mean context. Each is measured in a sustained run, at
the clock that it reaches by itself. Attention of prompts, norms, rotary embeddings, sampling and the host
are left out: the wall is above what any serial engine can reach with these kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from nanoflow_compiler.bench.gemms import Gemm, list_gemms
from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.bench.sustained import Sustained, measure_sustained
from nanoflow_compiler.bench.workload import Workload
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages, KVCache, LayerShape
from nanoflow_compiler.models import load_decoder
from nanoflow_compiler.models.place import find_device

__all__ = ["Part", "Wall", "check_wall", "measure_wall"]

SECONDS = 0.5
"""Of each measurement, after as much to warm up."""
MEMORY_BYTES = 400 << 20
"""What the calls of one replay read at least, eight times what the second-level cache holds."""
MOST_CALLS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One operation, and how often a run needs it."""

    name: str
    rows: int
    calls: float
    """Of ``rows`` rows each, for all requests."""
    time: Sustained

    def results(self) -> dict[str, Any]:
        """As JSON has it; ``seconds`` are those of all calls."""
        return {
            "name": self.name,
            "rows": self.rows,
            "calls": self.calls,
            "seconds": self.calls * self.time.us / 1e6,
            **asdict(self.time),
        }


@dataclass(frozen=True, slots=True)
class Wall:
    """The parts, and what they allow together."""

    parts: Sequence[Part]
    workload: Workload

    def results(self) -> dict[str, Any]:
        """As JSON has it."""
        seconds = sum(part.calls * part.time.us for part in self.parts) / 1e6
        joules = sum(part.calls * part.time.joules for part in self.parts)
        num_tokens = self.workload.num_tokens
        return {
            "tokens_per_second": num_tokens / seconds,
            "joules_per_1000_tokens": joules / num_tokens * 1e3,
            "workload": asdict(self.workload),
            "parts": [part.results() for part in self.parts],
        }


def check_wall(model: ModelSettings) -> PreTrainedModel:
    """The model without its weights; ConfigError where the wall cannot be measured."""
    place = find_device(model.device)
    if place.type != "cuda" or torch.cuda.get_device_capability(place) < (9, 0):
        raise ConfigError(
            "--wall needs a GPU of compute capability 9.0 or more, for its decode attention"
        )
    loading = model.loading() | {"load_format": "dummy", "device": "meta"}
    shapes = load_decoder(model.name, **loading).model
    config = shapes.config.get_text_config()
    if {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
        raise ConfigError("--wall is for full attention: this model has layers with windows")
    list_gemms(shapes)
    return shapes


def measure_wall(shapes: PreTrainedModel, workload: Workload) -> Wall:
    """On the current GPU, which must have memory for one layer's cache and weights: close the engine."""
    gemms, head = list_gemms(shapes)
    steps = workload.num_computed / workload.tokens_per_step
    parts = [
        _gemm(gemm, rows=workload.tokens_per_step, calls=count * steps, dtype=shapes.dtype)
        for gemm, count in gemms.items()
    ]
    turns = workload.num_output / workload.decode_rows
    parts.append(_gemm(head, rows=workload.decode_rows, calls=turns, dtype=shapes.dtype))
    if workload.num_decodes:
        parts.append(_attention(shapes, workload))
    return Wall(parts, workload)


def _gemm(gemm: Gemm, *, rows: int, calls: float, dtype: torch.dtype) -> Part:
    """Random data: zeros would draw less power and run at a higher clock."""
    made = {"device": "cuda", "dtype": dtype}
    inputs = torch.randn(rows, gemm.in_features, **made)  # type: ignore[call-overload]
    shape = (gemm.out_features, gemm.in_features)
    weights = [
        torch.randn(shape, **made).mul_(0.02)  # type: ignore[call-overload]
        for _ in range(_num_calls(gemm.num_weights * dtype.itemsize))
    ]
    out = inputs.new_empty(rows, gemm.out_features)
    multiply = [_call(torch.mm, inputs, weight.t(), out=out) for weight in weights]
    return Part(name=gemm.name, rows=rows, calls=calls, time=_measure(multiply))


def _attention(shapes: PreTrainedModel, workload: Workload) -> Part:
    from nanoflow_compiler.attention_plan import Requests, Visibility
    from nanoflow_compiler.attention_state import StepLayout
    from nanoflow_compiler.kernels.paged_decode import attend_pages, plan_pages
    from nanoflow_compiler.scoring import Scoring

    config = shapes.config.get_text_config()
    layer, num_heads = _layer(shapes)
    rows, context = workload.decode_rows, workload.mean_context
    each = -(-context // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(rows * each).reshape(rows, each) + 1
    layout = StepLayout.pack(
        query_lens=np.ones(rows, dtype=np.int64),
        context_lens=np.full(rows, context - 1),
        block_tables=tables,
    )
    requests = Requests.of(layout.part(0, rows, device=torch.device("cuda")))
    query = torch.randn(rows, num_heads, layer.head_dim, device="cuda", dtype=layer.dtype)
    out = torch.empty_like(query)
    attend = []
    for _ in range(_num_calls(rows * context * layer.bytes_per_token)):
        pages = _pages(layer, num_blocks=rows * each + 1)
        reads = plan_pages(requests, pages, visibility=Visibility())
        scoring = Scoring(layer.head_dim**-0.5)
        attend.append(_call(attend_pages, query, pages, reads=reads, scoring=scoring, out=out))
    calls = config.num_hidden_layers * workload.num_decodes / rows
    return Part(name="decode_attention", rows=rows, calls=calls, time=_measure(attend))


def _layer(shapes: PreTrainedModel) -> tuple[LayerShape, int]:
    """What a layer stores of a token, and the number of its query heads."""
    config = shapes.config.get_text_config()
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return LayerShape(num_kv_heads, head_dim, head_dim, shapes.dtype), num_heads


def _pages(layer: LayerShape, *, num_blocks: int) -> HeadPages:
    cache = KVCache.allocate([layer], num_blocks=num_blocks, device="cuda")
    for pool in (*cache.keys, *cache.values):
        pool.normal_()
    (pages,) = cache.tables
    if not isinstance(pages, HeadPages):
        raise ConfigError(f"--wall: heads of {layer.head_dim} are none that the kernel reads")
    return pages


def _num_calls(num_bytes: int) -> int:
    """Of one replay, each on memory of its own."""
    return min(MOST_CALLS, -(-MEMORY_BYTES // num_bytes))


def _call(function: Callable[..., object], *args: object, **settings: object) -> Callable[[], None]:
    def call() -> None:
        function(*args, **settings)

    return call


def _measure(calls: Sequence[Callable[[], None]]) -> Sustained:
    return measure_sustained(calls, seconds=SECONDS, warmup_seconds=SECONDS)
