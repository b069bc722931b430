"""``nanoflow bench ablation``: one step of a model by several plans, and which of them is fastest.

The sequence, the sequence in parts, and parts on two lanes with each kind of SM budget. Every plan is
captured as the engine captures its steps, replayed at the clock that the GPU keeps up, and its logits
are compared with those of the sequence, which is measured again at the end: what changed since is
no plan's doing. The model is loaded and traced once.
"""

import gc
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nanoflow_compiler.bench.ablation_settings import AblationSettings, Order
from nanoflow_compiler.bench.one_step import OneStep, fill_cache, make_step
from nanoflow_compiler.bench.progress import progress
from nanoflow_compiler.bench.sustained import measure_replays
from nanoflow_compiler.capture import NUM_GIVEN, capture_step, weights_of
from nanoflow_compiler.compiler import device_of
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.buckets import Bucket
from nanoflow_compiler.engine.forward import Forward
from nanoflow_compiler.engine.step_graphs import StepGraphs
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.hardware import DeviceSpec
from nanoflow_compiler.kv_cache import KVCache
from nanoflow_compiler.models import load_decoder
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.models.place import current_device, find_device
from nanoflow_compiler.packed import PackedStep
from nanoflow_compiler.pipeline import Analysed, analyse_graph, compile_analysed
from nanoflow_compiler.stepper import Stepper

__all__ = ["Plan", "measure_ablation", "plans", "print_ablation"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared."""

    name: str
    order: Order
    config: CompileConfig


def plans(settings: AblationSettings) -> Iterator[Plan]:
    """The sequence first, and last."""
    first = settings.orders[0]
    sequence = CompileConfig(parts=1)
    yield Plan("sequence", first, sequence)
    for order in settings.orders:
        parts = replace(sequence, parts=settings.parts)
        yield Plan("split", order, replace(parts, lanes=1))
        two = replace(parts, lanes=2)
        for sms in settings.sms:
            yield Plan(f"overlapped, {sms} SMs", order, replace(two, memory_sms=sms))
        for kind in ("ctas", "none"):
            name = {"ctas": "overlapped, blocks", "none": "overlapped, no budgets"}[kind]
            yield Plan(name, order, replace(two, sm_budgets=kind))
    yield Plan("sequence again", first, sequence)


def measure_ablation(model: str, settings: AblationSettings) -> dict[str, Any]:
    """The results of every plan, and the name of the fastest."""
    settings.check()
    place = find_device(settings.device)
    _check_device(place)
    chosen = list(plans(settings))
    with current_device(place), progress("plans", total=len(chosen)) as advance:
        bench = _Bench.prepare(model, settings, place=place)
        found = []
        for plan in chosen:
            found.append(bench.measure(plan))
            advance(1)
    timed = [result for result in found if result.get("us")]
    best = min(timed, key=lambda result: result["us"]) if timed else None
    return {
        "model": model,
        "num_tokens": settings.num_tokens,
        "fastest": best and f"{best['name']} ({best['order']})",
        "plans": found,
    }


def print_ablation(found: dict[str, Any]) -> None:
    """A table, and a line that says which plan wins."""
    titles = ("plan", "order", "predicted ms", "ms", "speed", "J", "W", "MHz", "top-1", "max diff")
    table = Table(*titles, box=None)
    base = next((result["us"] for result in found["plans"] if result.get("us")), 0.0)
    for result in found["plans"]:
        head = [result["name"], result["order"], f"{result['predicted_us'] / 1e3:.2f}"]
        if "error" in result:
            table.add_row(*head, result["error"])
            continue
        table.add_row(
            *head,
            f"{result['us'] / 1e3:.2f}",
            f"{base / result['us']:.3f}",
            f"{result['joules']:.2f}",
            f"{result['watts']:.0f}",
            f"{result['sm_mhz']:.0f}",
            f"{result['same_top_1']:.2%}",
            f"{result['max_difference']:.3g}",
        )
    Console(width=140).print(table)
    Console().print(f"Fastest: {found['fastest']}")


def _check_device(place: torch.device) -> None:
    if place.type != "cuda":
        raise ConfigError("bench ablation compares plans on a GPU; there is none here")


@dataclass(slots=True)
class _Bench:
    """What all plans share."""

    settings: AblationSettings
    packed: PackedDecoder
    analysed: Analysed
    spec: DeviceSpec
    cache: KVCache
    steps: dict[Order, OneStep]
    expected: Tensor | None = None
    """Logits of the sequence, by request."""

    @classmethod
    def prepare(cls, model: str, settings: AblationSettings, *, place: torch.device) -> "_Bench":
        decoder = load_decoder(model, dtype=settings.dtype, device=place, load_format="dummy")
        packed = PackedDecoder(decoder.model, max_length=decoder.max_model_len)
        captured = capture_step(packed, tokens=settings.num_tokens)
        captured = replace(captured, kv_tokens=settings.mean_context)
        config = CompileConfig()
        spec = device_of(config, weights_of(packed))
        with torch.no_grad():
            analysed = analyse_graph(captured, config=config, device=spec, step=Stepper())
            # Before the cache: what is merged is memory that it cannot have.
            analysed.binder.bind([*[None] * NUM_GIVEN, *weights_of(packed)])
        cache = fill_cache(packed.layers, settings, device=place)
        vocab = int(decoder.model.config.get_text_config().vocab_size)
        steps = {
            order: make_step(settings, order, num_blocks=cache.num_blocks, vocab_size=vocab)
            for order in settings.orders
        }
        return cls(settings, packed, analysed, spec, cache, steps)

    def measure(self, plan: Plan) -> dict[str, Any]:
        with torch.no_grad():
            compiled = compile_analysed(
                self.analysed, config=plan.config, device=self.spec, step=Stepper()
            )
        predicted = compiled.plans[-1]
        result: dict[str, Any] = {
            "name": plan.name,
            "order": plan.order,
            "predicted_us": predicted.makespan_us,
            "budgets": getattr(compiled.executables[-1], "budget_kind", None),
            "predicted_without_power_cap_us": max(slot.end_us for slot in predicted.slots),
        }
        step = PackedStep(compiled, weights_of(self.packed))
        try:
            return result | self._run(step, self.steps[plan.order])
        finally:
            step.close()
            gc.collect()

    def _run(self, step: PackedStep, one: OneStep) -> dict[str, Any]:
        num_rows = len(one.requests)
        forward = Forward(step, cache=self.cache, num_slots=num_rows)
        longest = max(self.settings.context, *self.settings.prompt_lens, 1)
        graphs = StepGraphs(forward, cut=one.cut, max_model_len=longest)
        bucket = Bucket(one.batch.num_tokens, num_rows, has_prompts=not one.batch.is_decode)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            captured = list(graphs.capture([bucket]))
        notes = [str(one.message) for one in told]
        try:
            if not captured:
                return {"error": notes[-1] if notes else "it was not captured"}
            ready = graphs.ready(one.batch, one.sampling)
            assert ready is not None
            agreement = self._compare(graphs.run(ready), one)
            time = measure_replays(lambda: graphs.run(ready), seconds=self.settings.seconds)
        finally:
            graphs.close()
        return asdict(time) | agreement | ({"notes": notes} if notes else {})

    def _compare(self, logits: Tensor, one: OneStep) -> dict[str, float]:
        found = torch.empty_like(logits)
        found[torch.from_numpy(one.requests).to(logits.device)] = logits
        if self.expected is None:
            self.expected = found
        same = (found.argmax(-1) == self.expected.argmax(-1)).double().mean()
        return {"same_top_1": same.item(), "max_difference": _largest(found, self.expected)}


def _largest(found: Tensor, expected: Tensor) -> float:
    """Difference, row by row: there may be gigabytes of logits."""
    rows = zip(found, expected, strict=True)
    return float(torch.stack([(a.float() - b.float()).abs().max() for a, b in rows]).max())
