"""Where a model runs, what its memory goes to, and what is said when there is too little."""

import gc
import logging
import weakref

import pytest
import torch

from nanoflow_compiler.engine import assemble, build
from nanoflow_compiler.engine.engine_config import EngineConfig
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.memory import (
    MemoryBudget,
    explain_out_of_memory,
    measure_memory,
)
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.spec import EngineSpec
from nanoflow_compiler.engine.step_memory import StepMemory
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.models import load_decoder
from tiny_models import llama

QUICK = {"clusters": "eager", "gemms": "aten", "cache": False}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", "meta", ""])
def test_names_of_devices_are_checked(folder, device):
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N"):
        EngineSpec(model=str(folder), device=device)
    with pytest.raises(ConfigError, match="device must be"):
        LLM(folder, device=device)


@NO_GPU
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu_is_said(folder, device):
    spec = EngineSpec(model=str(folder), device=device)  # another machine may have one
    with pytest.raises(ConfigError, match="no CUDA device here; pass device='cpu'"):
        spec.build()


@NO_GPU
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_the_model_is_on_the_cpu(folder, device):
    with LLM(folder, device=device, enforce_eager=True) as llm:
        assert llm.facts["device"] == "cpu"
        assert llm.facts["dtype"] == "float32"
        assert llm.seconds.keys() == {"load", "compile"}


@pytest.mark.parametrize("given", [llama, lambda: load_decoder("qwen3-0.6b", **TINY)])
def test_a_model_stays_where_it_is(given):
    with pytest.raises(ConfigError, match=r"device='cuda', but the model is on .*: move it"):
        LLM(given(), device="cuda", enforce_eager=True)


TINY = {"load_format": "dummy", "num_hidden_layers": 1, "device": "meta"}


def test_a_model_that_is_there_may_be_named_with_its_device():
    with LLM(llama(), device="cpu", enforce_eager=True) as llm:
        assert llm.facts["device"] == "cpu"
    for given in ({"dummy_distribution": "uniform"}, {"hf_overrides": {"num_hidden_layers": 1}}):
        with pytest.raises(ConfigError, match="hf_overrides are for models given by name"):
            LLM(llama(), **given, enforce_eager=True)


def test_facts_count_the_memory(folder, caplog):
    num_bytes = sum(weight.nbytes for weight in llama().parameters())
    with (
        caplog.at_level(logging.INFO, logger=assemble.__name__),
        LLM(folder, device="cpu", enforce_eager=True, num_kv_blocks=3) as llm,
    ):
        assert llm.facts["weights_bytes"] == num_bytes
        assert llm.facts["kv_cache_bytes"] == 4 * 64 * 2 * 2 * 2 * 8 * 4
    assert "memory of cpu, GiB: weights 0.00, kv_cache 0.00" in caplog.text


def parameter_of(monkeypatch):
    """Weak references to the weights of the model that is loaded next."""
    found = []
    find = build.Served.find

    def spy(*args, **settings):
        served = find(*args, **settings)
        found.extend(weakref.ref(weight) for weight in served.model.parameters())
        return served

    monkeypatch.setattr(build.Served, "find", spy)
    return found


def test_weights_that_were_merged_are_let_go(folder, monkeypatch):
    expected = answer(folder, enforce_eager=True)
    weights = parameter_of(monkeypatch)
    with LLM(folder, device="cpu", options=QUICK) as llm:
        gc.collect()
        merged = [weight() for weight in weights].count(None)
        assert merged >= 2 * 5  # of each layer, those of queries, keys and values, gate and up
        assert tokens_of(llm) == expected


def test_weights_of_a_model_that_was_given_stay():
    model = llama()
    with LLM(model, options=QUICK) as llm:
        tokens_of(llm)
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def answer(model, **settings):
    with LLM(model, device="cpu", **settings) as llm:
        return tokens_of(llm)


def tokens_of(llm):
    params = SamplingParams(temperature=0, max_tokens=8)
    (output,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, params)
    return output.outputs[0].token_ids


def budget(**changes):
    sizes = {"limit_bytes": 72 * GIB, "weights_bytes": 16 * GIB, "other_bytes": GIB}
    sizes |= {"activation_bytes": 3 * GIB, "graph_bytes": 2 * GIB, "device": "cuda:0"}
    return MemoryBudget(**{**sizes, **changes})


def test_the_cache_gets_what_is_left():
    assert budget().spare_bytes == 50 * GIB
    budget().check(50 * GIB)
    assert MemoryBudget(limit_bytes=7, weights_bytes=9).spare_bytes == 7  # of a CPU: what is free


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"weights_bytes": 141 * GIB}, "a dtype of fewer bytes or a larger device"),
        ({"activation_bytes": 60 * GIB}, "lower max_num_batched_tokens or max_num_seqs"),
    ],
)
def test_too_small_a_budget_says_what_to_lower(changes, advice):
    with pytest.raises(ConfigError) as caught:
        budget(**changes).check(1)
    message = str(caught.value)
    assert "no memory is left for the KV cache on cuda:0: of 72.00 GiB" in message
    assert "weights" in message
    assert advice in message


def test_a_step_needs_memory_for_its_logits():
    model = load_decoder("llama-3-8b", load_format="dummy", device="meta").model
    sizes = EngineConfig().sizes(longest=8192, device_type="cuda")
    eager = StepMemory.estimate(model, sizes, is_captured=False)
    captured = StepMemory.estimate(model, sizes, is_captured=True)
    assert 2 * GIB < eager.activation_bytes == captured.activation_bytes < 5 * GIB
    assert (eager.graph_bytes, captured.graph_bytes > GIB) == (0, True)
    fewer = EngineConfig(max_num_seqs=64, max_num_batched_tokens=256)
    small = StepMemory.estimate(
        model, fewer.sizes(longest=8192, device_type="cuda"), is_captured=True
    )
    assert small.activation_bytes < eager.activation_bytes / 3


def test_a_gpu_is_asked_for_what_it_holds(monkeypatch):
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 18 * GIB)
    found = measure_memory(
        torch.device("cuda", 0),
        weights_bytes=GIB,
        step=StepMemory(activation_bytes=3 * GIB, graph_bytes=GIB),
        gpu_memory_utilization=None,
    )
    assert given_back
    assert found.facts == {
        "memory_limit_bytes": 72 * GIB,
        "weights_bytes": 18 * GIB,
        "activation_bytes": 3 * GIB,
        "graph_bytes": GIB,
        "other_bytes": 2 * GIB,
    }
    assert found.spare_bytes == 48 * GIB


def out_of_memory(*_, **__):
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
    raise torch.OutOfMemoryError(text + ". Of the allocated memory 70 GiB is allocated.")


@pytest.mark.parametrize(
    ("place", "when"),
    [
        ("served.load_decoder", "was loaded"),
        ("assemble._make_step", "while the model was compiled"),
        ("assemble.KVCache", "while the KV cache was made"),
    ],
)
def test_out_of_memory_at_the_start(folder, monkeypatch, place, when):
    out_of_memory.allocate = out_of_memory
    monkeypatch.setattr(f"nanoflow_compiler.engine.{place}", out_of_memory)
    with pytest.raises(ConfigError) as caught:
        LLM(folder, device="cpu", enforce_eager=True)
    message = str(caught.value)
    assert message.startswith("out of memory ")
    assert when in message
    assert "Tried to allocate 2.00 GiB" in message
    assert "Of the allocated" not in message
    for lowered in ("max_num_seqs", "max_model_len", "gpu_memory_utilization", "dtype"):
        assert lowered in message


def test_out_of_memory_in_a_step(monkeypatch):
    with LLM(llama(), enforce_eager=True) as llm:
        monkeypatch.setattr(llm._core.runner, "submit", out_of_memory)
        with pytest.raises(ConfigError, match="out of memory in a step: CUDA out of memory"):
            tokens_of(llm)


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), explain_out_of_memory("in a test"):
        raise ZeroDivisionError


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"options": QUICK}])
def test_a_model_by_its_name_runs_on_the_gpu(folder, options):
    expected = answer(folder, enforce_eager=True)
    with LLM(folder, max_num_seqs=4, **options) as llm:
        assert llm.facts["device"] == "cuda:0"
        assert llm.facts["weights_bytes"] > 0
        assert tokens_of(llm) == expected


@pytest.mark.gpu
def test_too_little_memory_is_said(folder):
    with pytest.raises(ConfigError, match="no memory is left for the KV cache on cuda"):
        LLM(folder, enforce_eager=True, gpu_memory_utilization=1e-6)
    with pytest.raises(ConfigError, match="out of memory while the KV cache was made"):
        LLM(folder, enforce_eager=True, kv_cache_memory_bytes=2**45)
