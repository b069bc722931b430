"""``torch.compile(model, backend="nanoflow")``: any model, any call, the results of eager."""

import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from nanoflow_compiler import compiler
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.ir import Program
from tiny_models import BUILDERS, gemma2, gpt2, llama

EAGER_CLUSTERS = {"clusters": "eager"}
NAMES_OF_OPTIONS = ", ".join(CompileConfig.__dataclass_fields__)


def reset_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    reset_dynamo()


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def make_batch(batch, length, *, seed=0):
    """Prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row * 2 % length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def mark_dynamic(inputs):
    for tensor in inputs.values():
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)


def assert_logits_equal(model, compiled, inputs):
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        found = compiled(**inputs, use_cache=False).logits
    real = inputs.get("attention_mask", torch.ones(expected.shape[:2])).bool()
    assert found.dtype == expected.dtype
    assert (found - expected)[real].abs().max() <= 1e-5 * expected[real].abs().max()


def cells_of(dump):
    """The number of cells of the last program of each dumped graph."""
    texts = [max(graph.glob("*_emit.txt")).read_text() for graph in sorted(dump.iterdir())]
    bodies = ["\n".join(line for line in text.splitlines() if line[0] != "#") for text in texts]
    return [Program.parse(body).num_cells for body in bodies]


def test_found_without_an_import():
    code = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
assert "nanoflow" in torch._dynamo.list_backends()
compiled = torch.compile(model, backend="nanoflow", options={"clusters": "eager"})
assert "nanoflow_compiler.compiler" not in sys.modules
x = torch.randn(3, 4)
with torch.no_grad():
    assert torch.equal(compiled(x), model(x))
assert "nanoflow_compiler.compiler" in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"options": {"partz": 2}},
            rf"unknown option 'partz' .*'parts'.*known: {NAMES_OF_OPTIONS}",
        ),
        ({"options": {"zorp": 2}}, rf"unknown option 'zorp'; known: {NAMES_OF_OPTIONS}"),
        ({"options": {"parts": 0}}, "parts must be 'auto' or an integer from 1 to 16, not 0"),
        ({"options": {"parts": True}}, "parts must be 'auto' or an integer"),
        ({"options": {"device": "abacus"}}, "device must be one of auto, .*a100-80gb"),
        ({"options": {"backend": "stone"}}, "backend must be one of auto, codegen, streams"),
        ({"options": {"fuse": 1}}, "fuse must be True or False"),
        ({"mode": "max-autotune"}, "mode 'max-autotune' is Inductor's; nanoflow takes options"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    compiled = torch.compile(lambda x: x + 1, backend="nanoflow", **settings)
    with pytest.raises(ConfigError, match=message) as caught:
        compiled(torch.ones(2))
    assert "\n" not in str(caught.value)


def test_batches_of_any_size_without_a_new_graph(tmp_path):
    """The first call is compiled for its sizes, the second for any: as torch.compile does it."""
    model = llama(num_hidden_layers=1)
    options = EAGER_CLUSTERS | {"parts": 2, "dump": tmp_path}
    compiled = torch.compile(model, backend="nanoflow", options=options, fullgraph=True)
    for batch, length in [(4, 9), (3, 12), (2, 7), (7, 12), (5, 30), (2, 2)]:
        assert_logits_equal(model, compiled, make_batch(batch, length))
    assert num_graphs() == 2
    assert cells_of(tmp_path) == [2, 2]


def test_one_prompt_runs_whole():
    model = llama(num_hidden_layers=1)
    options = EAGER_CLUSTERS | {"parts": 2}
    compiled = torch.compile(model, backend="nanoflow", options=options, fullgraph=True)
    assert_logits_equal(model, compiled, make_batch(1, 8))


@pytest.mark.parametrize(
    ("name", "parts"),
    [("llama", 1), ("llama", 2), ("llama", 3), ("gemma2", 2), ("gpt2", 3), ("mixtral", 3)],
)
def test_some_architectures(name, parts):
    check_sizes(BUILDERS[name](), make_batch, clusters="eager", parts=parts)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(
    ("backend", "clusters"),
    [("codegen", "inductor"), ("codegen", "eager"), ("reference", "eager")],
)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_architecture(name, backend, clusters, parts):
    model = BUILDERS[name]()
    for make in (make_batch, without_mask):
        check_sizes(model, make, backend=backend, clusters=clusters, parts=parts)


def without_mask(batch, length):
    return {"input_ids": make_batch(1, batch * length)["input_ids"].view(batch, length)}


def check_sizes(model, make, **options):
    """One graph, and the logits of eager, for any batch and length."""
    reset_dynamo()
    compiled = torch.compile(model, backend="nanoflow", options=options, fullgraph=True)
    for batch, length in [(4, 12), (3, 20), (2, 17)]:
        inputs = make(batch, length)
        mark_dynamic(inputs)
        assert_logits_equal(model, compiled, inputs)
    assert num_graphs() == 1


def continuations(model, inputs, **settings):
    settings = {"max_new_tokens": 8, "do_sample": False} | settings
    return model.generate(**inputs, **settings).tolist()


def compile_forward(model, options):
    model.forward = torch.compile(model.forward, backend="nanoflow", options=options)


def compile_model(model, options):
    model.compile(backend="nanoflow", options=options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("compile_it", [compile_forward, compile_model])
def test_generate(compile_it, cache):
    model = llama(num_hidden_layers=1, eos_token_id=None)
    batches = [make_batch(3, 9), make_batch(5, 6, seed=1)][: 1 + (compile_it is compile_forward)]
    settings = {"cache_implementation": cache}
    expected = [continuations(model, inputs, **settings) for inputs in batches]
    compile_it(model, EAGER_CLUSTERS | {"parts": 2})
    assert [continuations(model, inputs, **settings) for inputs in batches] == expected
    assert num_graphs() >= 2


def test_generate_with_a_sliding_window_and_compiled_clusters():
    model = gemma2(eos_token_id=None, num_hidden_layers=1)
    inputs = make_batch(4, 11)
    expected = continuations(model, inputs)
    compile_forward(model, {"parts": 2})
    assert continuations(model, inputs) == expected


def test_generate_by_sampling_with_dropout_off():
    model = gpt2(n_layer=1, attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5, eos_token_id=None)
    inputs = make_batch(3, 7)
    sampled = []
    for compile_it in (lambda *_: None, compile_forward):
        compile_it(model, EAGER_CLUSTERS | {"parts": 3})
        torch.manual_seed(5)
        sampled.append(continuations(model, inputs, do_sample=True, top_k=20))
    assert sampled[0] == sampled[1]


def test_writes_to_arguments_and_buffers():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(5, 4))

        def forward(self, x, cache, at):
            self.calls += 1
            self.last.copy_(x * 2)
            cache.index_copy_(1, at, x[:, None] + self.last[:, None])
            x.mul_(3)
            return cache.sum(1) + x, cache

    def run(model):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, 4, generator=generator)
        cache = torch.randn(5, 6, 4, generator=generator)
        outputs = []
        with torch.no_grad():
            for at in (2, 3, 2):
                total, same = model(x, cache, torch.tensor([at]))
                assert same.data_ptr() == cache.data_ptr()
                outputs += [total, cache.clone(), x.clone()]
        return outputs

    eager, split = Counter(), Counter()
    expected = run(eager)
    options = EAGER_CLUSTERS | {"parts": 2}
    found = run(torch.compile(split, backend="nanoflow", options=options))
    assert all(map(torch.equal, found, expected))
    assert torch.equal(split.calls, eager.calls)
    assert torch.equal(split.last, eager.last)


def test_random_numbers_differ_between_parts():
    options = EAGER_CLUSTERS | {"parts": 2}
    function = torch.compile(
        lambda x: torch.nn.functional.dropout(x + 1), backend="nanoflow", options=options
    )
    with torch.no_grad():
        rows = function(torch.zeros(2, 1000))
    assert 0.4 < (rows == 0).float().mean() < 0.6
    assert set(rows.unique().tolist()) == {0, 2}
    assert not torch.equal(rows[0], rows[1])


class Broken(nn.Module):
    """Two graphs: the first ends where torch is asked to stop."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        torch._dynamo.graph_break()
        return self.second(hidden)


def test_a_graph_break(tmp_path):
    model = Broken()
    options = EAGER_CLUSTERS | {"parts": 2, "dump": tmp_path}
    compiled = torch.compile(model, backend="nanoflow", options=options)
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert cells_of(tmp_path) == [2, 2]


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("training", ["eager", "inductor"])
def test_training_is_left_to_others_with_one_warning(training):
    model = Broken()
    compiled = torch.compile(model, backend="nanoflow", options={"training": training})
    x = torch.randn(5, 4)
    expected = gradients_of(model, model(x).pow(2).sum())
    compiler._warn_of_training.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loss = compiled(x).pow(2).sum()
    ours = [str(w.message) for w in told if "nanoflow" in str(w.message)]
    assert len(ours) == 1
    assert f"goes to {training}" in ours[0]
    assert "torch.no_grad()" in ours[0]
    for name, gradient in gradients_of(model, loss).items():
        torch.testing.assert_close(gradient, expected[name])


def test_inference_and_training_of_one_model():
    """Merged weights stay parameters that eager code, or an optimizer, can use and change."""
    model = llama(num_hidden_layers=1)
    inputs = make_batch(4, 6)
    expected = gradients_of(model, model(**inputs, use_cache=False).logits.pow(2).mean())
    compiled = torch.compile(model, backend="nanoflow", options=EAGER_CLUSTERS | {"parts": 2})
    with torch.inference_mode():
        before = compiled(**inputs, use_cache=False).logits.clone()
    found = gradients_of(model, model(**inputs, use_cache=False).logits.pow(2).mean())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_logits_equal(model, compiled, inputs)
    with torch.inference_mode():
        assert not torch.equal(compiled(**inputs, use_cache=False).logits, before)


def test_bfloat16():
    model = llama(num_hidden_layers=1).bfloat16()
    inputs = make_batch(4, 6)
    compiled = torch.compile(model, backend="nanoflow", options={"parts": 2})
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits.float()
        found = compiled(**inputs, use_cache=False).logits
    assert found.dtype == torch.bfloat16
    real = inputs["attention_mask"].bool()
    assert (found.float() - expected)[real].abs().max() <= 0.02 * expected[real].abs().max()


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("auto", "overlap: off because cpu runs one kernel at a time"),
        ("a100-80gb", "us in sequence"),
    ],
)
def test_parts_by_the_estimate(device, told, tmp_path):
    model = llama(num_hidden_layers=1)
    options = EAGER_CLUSTERS | {"device": device, "dump": tmp_path}
    compiled = torch.compile(model, backend="nanoflow", options=options)
    assert_logits_equal(model, compiled, make_batch(4, 6))
    (decision,) = tmp_path.glob("*/*_decision.txt")
    assert told in decision.read_text()


def test_dump(tmp_path):
    model = llama(num_hidden_layers=1)
    options = {"parts": 2, "dump": tmp_path / "of" / "model", "device": "a100-80gb"}
    compiled = torch.compile(model, backend="nanoflow", options=options)
    assert_logits_equal(model, compiled, make_batch(4, 6))
    (graph,) = (tmp_path / "of" / "model").iterdir()
    texts = {path.name: path.read_text() for path in sorted(graph.glob("*.txt"))}
    assert [int(name[:2]) for name in texts] == list(range(len(texts)))
    passes = ["normalize", "fuse", "axis", "lift", "estimate", "nano_split", "schedule", "emit"]
    for name in passes:
        heads = [text.splitlines()[0] for file, text in texts.items() if file[3:] == f"{name}.txt"]
        assert heads
        assert all(head.startswith(f"# {name}: ") and head.endswith(" ms") for head in heads)
    merged = next(text for file, text in texts.items() if file[3:] == "fuse.txt")
    assert "# -3 aten.mm.default\n" in merged  # query, key, value: one; gate, up: one
    assert "model_layers_0_self_attn_q_proj_weight" in merged
    sources = sorted(graph.glob("*.py"))
    assert len(sources) == 2
    for path in sources:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert callable(module.run)
