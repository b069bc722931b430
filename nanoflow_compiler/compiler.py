"""The ``torch.compile`` backend: a Dynamo graph in, a compiled callable out."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.errors import ConfigError, NanoflowError
from nanoflow_compiler.graphs import is_tensor, shape_of, size_hint
from nanoflow_compiler.hardware import DEVICE_SPECS, DeviceSpec, device_spec
from nanoflow_compiler.naming import input_names, name_placeholders
from nanoflow_compiler.pipeline import CapturedGraph, CompiledGraph, compile_graph
from nanoflow_compiler.stepper import Stepper

__all__ = ["compile_dynamo_graph", "device_of", "stepper_for", "trace_aten", "weight_names"]


def compile_dynamo_graph(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="nanoflow", options=...)`` calls for each graph.

    A graph that needs gradients goes to Inductor or eager (``options={"training": ...}``) with a
    warning. Raises :class:`ConfigError` for a mode or an option that is not known.
    """
    try:
        config = _config(mode, options)
        if _needs_gradients(example_inputs):
            return _train(module, example_inputs, config=config)
        names = input_names(module)
        compiler = partial(_compile_aten, example_inputs=example_inputs, names=names, config=config)
        return trace_aten(module, example_inputs, compiler=compiler)
    except NanoflowError as error:
        raise _surfaced(error) from None


def _config(mode: str | None, options: Mapping[str, object] | None) -> CompileConfig:
    if mode not in (None, "default"):
        raise ConfigError(f"mode {mode!r} is Inductor's; nanoflow takes options={{...}} only")
    return CompileConfig.from_options(options)


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    tensors = (item for item in example_inputs if isinstance(item, torch.Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _train(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, config: CompileConfig
) -> Callable[..., Any]:
    _warn_of_training(config.training)
    if config.training == "eager":
        return module.forward
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(module, list(example_inputs)))


@cache
def _warn_of_training(compiler: str) -> None:
    """Once, however many graphs a model has."""
    warnings.warn(
        "nanoflow compiles inference only: this graph needs gradients and goes to "
        f"{compiler}. For inference call the model under torch.no_grad().",
        stacklevel=2,
    )


def _surfaced(error: NanoflowError) -> Exception:
    """The same error as a kind that Dynamo hands to the user as it is.

    Others it wraps in its own, and to every message it adds lines that would hide ours.
    """
    from torch._dynamo.exc import ShortenTraceback

    message = str(error)
    own = {"__module__": type(error).__module__, "__str__": lambda _: message}
    kind: type[Exception] = type(type(error).__name__, (type(error), ShortenTraceback), own)
    surfaced: Exception = BaseException.__new__(kind)
    surfaced.__dict__.update(error.__dict__ | {"first_useful_frame": None})
    surfaced.args = error.args
    return surfaced


def trace_aten(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, compiler: Callable[..., Any]
) -> Callable[..., Any]:
    """AOTAutograd for inference, no decompositions; ``compiler`` gets the ATen graph."""
    aot = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=compiler,
        decompositions={},
        keep_inference_input_mutations=True,
    )
    compiled: Callable[..., Any] = aot(module, list(example_inputs))
    return compiled


def _compile_aten(
    module: fx.GraphModule,
    fake_inputs: Sequence[Any],
    *,
    example_inputs: Sequence[Any],
    names: Sequence[str],
    config: CompileConfig,
) -> Callable[..., Any]:
    del fake_inputs
    if len(names) == len(module.graph.find_nodes(op="placeholder")):
        name_placeholders(module, names)
    captured = _captured_batch(module, example_inputs)
    device = device_of(config, example_inputs)
    compiled = compile_graph(captured, config=config, device=device, step=stepper_for(config))
    return _boxed(compiled)


def _boxed(compiled: CompiledGraph) -> Callable[[list[Any]], list[Any]]:
    """AOTAutograd's calling convention: it hands over a list, which the callee may empty."""

    def run(values: list[Any]) -> list[Any]:
        result = compiled(values)
        values.clear()
        return result

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def stepper_for(config: CompileConfig) -> Stepper:
    """A stepper that dumps each graph into a new directory of its own."""
    if config.dump is None:
        return Stepper()
    try:
        Path(config.dump).mkdir(parents=True, exist_ok=True)
        folders = (Path(config.dump) / f"graph_{number:02d}" for number in itertools.count())
        folder = next(folder for folder in folders if not folder.exists())
        folder.mkdir()
    except OSError as error:
        raise ConfigError(
            f"dump {config.dump} cannot be written ({error.strerror}); pass another directory"
        ) from error
    return Stepper(dump=folder)


def device_of(config: CompileConfig, inputs: Sequence[Any]) -> DeviceSpec:
    """The device to plan for: the one asked for, else that of the first tensor."""
    if config.device != "auto":
        return DEVICE_SPECS[config.device]
    tensors = (item for item in inputs if isinstance(item, torch.Tensor))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return device_spec(device.type, device_name=name)


def weight_names(module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[str, ...]:
    """Placeholders that are parameters; none if AOTAutograd did not keep inputs one to one."""
    placeholders = module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        return ()
    pairs = zip(placeholders, example_inputs, strict=True)
    return tuple(node.name for node, item in pairs if isinstance(item, torch.nn.Parameter))


def _captured_batch(module: fx.GraphModule, example_inputs: Sequence[Any]) -> CapturedGraph:
    """A graph of whole batches: it splits along the batch axis of its inputs."""
    seeds = _batch_seeds(module, example_inputs)
    nodes = {node.name: node for node in module.graph.find_nodes(op="placeholder")}
    tokens = size_hint(nodes[seeds[0][0]].meta["val"].shape[0]) if seeds else 1
    weights = weight_names(module, example_inputs)
    buffers = _buffer_names(module, example_inputs)
    return CapturedGraph(module, weights, seeds, tokens, buffers=buffers)


def _buffer_names(module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[str, ...]:
    """Placeholders that belong to the model and are no parameters."""
    placeholders = module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        return ()
    pairs = zip(placeholders, example_inputs, strict=True)
    kept = [(n, i) for n, i in pairs if not isinstance(i, torch.nn.Parameter)]
    return tuple(node.name for node, item in kept if _belongs_to_model(item))


def _batch_seeds(
    module: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[tuple[str, int], ...]:
    """Inputs of two or more dimensions whose first has the size of that of the token ids.

    Any choice is safe (see ``passes.axis``); this one finds the batch where there is one.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        return ()
    pairs = zip(placeholders, example_inputs, strict=True)
    given = [n for n, item in pairs if is_tensor(n) and not _belongs_to_model(item)]
    wide = [node for node in given if len(shape_of(node)) >= 2]
    ids = [node for node in wide if not node.meta["val"].is_floating_point()] or wide
    if not ids or shape_of(ids[0])[0] == 1:
        return ()
    batch = shape_of(ids[0])[0]
    return tuple((node.name, 0) for node in [*ids, *wide] if shape_of(node)[0] == batch)


def _belongs_to_model(item: Any) -> bool:
    """Parameters and buffers, as Dynamo marks them."""
    marked = getattr(item, "_dynamo_static_input_type", None) is not None
    return isinstance(item, torch.nn.Parameter) or marked
