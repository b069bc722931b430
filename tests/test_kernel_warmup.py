"""The process that compiles kernels beside a model: a help that may fail, and no more than that."""

import json
import logging
import os
from dataclasses import asdict

import pytest
import torch

from nanoflow_compiler import kernel_warmup
from nanoflow_compiler.kernel_warmup import (
    AttentionLayer,
    KernelWarmup,
    Warmup,
    choose_kernel_cache,
)
from nanoflow_compiler.models.hf import PackedDecoder
from tiny_models import MAX_LENGTH, llama


def test_kinds_of_layers_are_listed_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    packed = PackedDecoder(llama(num_hidden_layers=3), max_length=MAX_LENGTH)
    warmup = Warmup.of(packed)
    layer = AttentionLayer(4, 2, 8, 8, "float32", 0.0)
    assert warmup == Warmup(90, "a GPU", 32, 128, "float32", (layer,))
    assert json.loads(json.dumps(asdict(warmup)))["layers"][0]["num_kv_heads"] == 2


def test_there_is_none_on_a_cpu():
    assert KernelWarmup.start(PackedDecoder(llama(), max_length=MAX_LENGTH)) is None


def test_a_process_that_fails_is_logged_and_nothing_else(caplog):
    with caplog.at_level(logging.INFO, logger=kernel_warmup.__name__):
        assert not KernelWarmup.run("this is no JSON").wait()
    assert "compiled when they are first launched" in caplog.text
    assert "Error" in caplog.text


def test_a_process_that_takes_too_long_is_ended(monkeypatch, caplog):
    monkeypatch.setattr(kernel_warmup, "TIMEOUT_S", 0.0)
    warmup = KernelWarmup.run("{}")
    with caplog.at_level(logging.INFO, logger=kernel_warmup.__name__):
        assert not warmup.wait()
    assert "not compiled within" in caplog.text
    assert warmup._process.returncode is not None


def set_no_kernel_cache(monkeypatch):
    """Set before it is deleted, so that it is deleted again when the test ends."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")


def test_the_cache_of_kernels_is_chosen_once(monkeypatch, tmp_path):
    set_no_kernel_cache(monkeypatch)
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path))
    choose_kernel_cache()
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path / "other"))
    choose_kernel_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


def test_what_cannot_be_guessed_is_no_error(monkeypatch, caplog):
    def refuse(_) -> tuple[int, int]:
        raise RuntimeError("no such device")

    class Packed:
        device = torch.device("cuda")

    monkeypatch.setattr(Warmup, "of", refuse)
    with caplog.at_level(logging.INFO, logger=kernel_warmup.__name__):
        assert KernelWarmup.start(Packed()) is None
    assert "no such device" in caplog.text


NUM_KEPT = {
    "_append": 1,
    "_rotate": 1,
    "_attend_tiles": 1,
    "_read_pages": 2,
    "_scan": 1,
    "_draw": 2,
}
"""Kernels, and how often each is compiled."""


@pytest.mark.gpu
def test_the_process_compiles_what_a_step_launches(monkeypatch, tmp_path):
    """After a step ran, the cache holds of each kernel what the process had left there and no more.

    Kernels that chain are there twice: for steps that are captured, and for others.
    """
    from nanoflow_compiler import LLM, SamplingParams

    set_no_kernel_cache(monkeypatch)
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path))
    with LLM("bench-1b", load_format="dummy", device="cuda", max_model_len=256) as llm:
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(temperature=0, max_tokens=2))
    for kernel, number in NUM_KEPT.items():
        kept = [path.read_text() for path in (tmp_path / "triton").rglob(f"{kernel}.ttir")]
        signatures = [line for text in kept for line in text.splitlines() if "tt.func pub" in line]
        assert len(signatures) == number, "\n".join(signatures)
