"""Compiled steps on disk: found again when nothing changed, and only then."""

import json
import logging

import pytest
import torch

from nanoflow_compiler import packed as packed_module
from nanoflow_compiler import step_cache
from nanoflow_compiler.backends import gemms
from nanoflow_compiler.backends.gemm_timing import GemmTiming
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.step_cache import step_folder
from tiny_models import MAX_LENGTH, gpt_oss, llama

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = [{"prompt_token_ids": [5, 6, 7, 8, 9]}, {"prompt_token_ids": [11]}]
EAGER_CLUSTERS = {"clusters": "eager"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "steps"


@pytest.fixture
def checkpoint(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def tokens(model, **settings):
    with LLM(model, **settings) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def forbid_tracing(monkeypatch):
    def refuse(*_):
        raise AssertionError("the step was traced again")

    monkeypatch.setattr(packed_module, "capture_step", refuse)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clusters": "eager", "parts": 2, "gemms": "packed"},
        {"kernels": "own", "parts": 2},
    ],
)
def test_a_second_start_traces_nothing(checkpoint, cache, monkeypatch, options):
    expected = tokens(checkpoint, enforce_eager=True)
    assert tokens(checkpoint, options=options) == expected
    (folder,) = cache.iterdir()
    forbid_tracing(monkeypatch)
    assert tokens(checkpoint, options=options) == expected
    assert list(cache.iterdir()) == [folder]


def test_other_weights_use_the_same_step(checkpoint, monkeypatch):
    tokens(checkpoint, options=EAGER_CLUSTERS)
    torch.manual_seed(9)
    other = llama()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    other.save_pretrained(checkpoint)
    expected = tokens(checkpoint, enforce_eager=True)
    forbid_tracing(monkeypatch)
    assert tokens(checkpoint, options=EAGER_CLUSTERS) == expected


def test_the_folder_depends_on_what_was_compiled(monkeypatch):
    def folder(model, *, max_length=MAX_LENGTH, **options):
        packed = PackedDecoder(model, max_length=max_length)
        return step_folder(packed, CompileConfig(**options))

    model = llama()
    assert folder(model) == folder(llama())
    assert folder(model) == folder(model, dump="anywhere")
    different = [
        folder(model),
        folder(model, parts=2),
        folder(model, kernels="own"),
        folder(model, max_length=MAX_LENGTH // 2),
        folder(llama(num_hidden_layers=1)),
        folder(llama(rms_norm_eps=0.1)),
        folder(llama(tie_word_embeddings=True)),
        folder(llama().to(torch.bfloat16)),
        folder(gpt_oss()),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    different.append(folder(model))
    torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "__version__", "2.999")
    different.append(folder(model))
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("damage", ["step.json", "program_0.py", "binding.py"])
def test_a_damaged_step_is_compiled_anew(checkpoint, cache, caplog, damage):
    expected = tokens(checkpoint, options=EAGER_CLUSTERS)
    (folder,) = cache.iterdir()
    (folder / damage).write_text("][")
    with caplog.at_level(logging.WARNING):
        assert tokens(checkpoint, options=EAGER_CLUSTERS) == expected
    assert "compiled anew" in caplog.text
    assert (folder / damage).read_text() != "]["


def test_what_was_packed_on_a_busy_machine_is_measured_later(checkpoint, cache, monkeypatch):
    def measure(share, *, is_steady):
        timing = GemmTiming(share, is_steady)
        for module in (gemms, step_cache):
            monkeypatch.setattr(module, "time_packed", lambda _: timing)

    def is_packed():
        expected = tokens(checkpoint, enforce_eager=True)
        assert tokens(checkpoint, options=EAGER_CLUSTERS) == expected
        (folder,) = cache.iterdir()
        return "packed_mm" in (folder / "program_0.py").read_text()

    monkeypatch.setattr(gemms, "_FEWEST_BYTES", 0)
    measure(1.5, is_steady=False)
    assert is_packed()
    assert is_packed()
    measure(1.5, is_steady=True)
    assert not is_packed()
    measure(0.5, is_steady=True)
    assert not is_packed()  # what was measured stays


def test_a_choice_that_proved_right_is_kept(checkpoint, cache, monkeypatch):
    monkeypatch.setattr(gemms, "_FEWEST_BYTES", 0)
    for is_steady in (False, True):
        for module in (gemms, step_cache):
            monkeypatch.setattr(
                module, "time_packed", lambda _, is_steady=is_steady: GemmTiming(0.5, is_steady)
            )
        tokens(checkpoint, options=EAGER_CLUSTERS)
        (folder,) = cache.iterdir()
        assert bool(json.loads((folder / "step.json").read_text())["unmeasured"]) is not is_steady
        forbid_tracing(monkeypatch)


@pytest.mark.parametrize("option", [{"cache": False}, {"backend": "reference"}])
def test_what_is_not_kept(checkpoint, cache, option):
    tokens(checkpoint, options=EAGER_CLUSTERS | option)
    assert not cache.exists()


def test_modules_of_the_user_are_not_kept(cache):
    tokens(llama(), options=EAGER_CLUSTERS)
    assert not cache.exists()


def test_a_dump_is_of_a_compilation(checkpoint, tmp_path):
    tokens(checkpoint, options=EAGER_CLUSTERS)
    tokens(checkpoint, options=EAGER_CLUSTERS | {"dump": tmp_path / "dump"})
    (graph,) = (tmp_path / "dump").iterdir()
    assert list(graph.glob("*_normalize.txt"))
