"""``LLM`` against transformers' generate: same tokens alone, batched, chunked, preempted."""

import json
import re
import threading
from dataclasses import replace

import pytest
import torch

from nanoflow_compiler.engine import lengths
from nanoflow_compiler.engine import llm as llm_module
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.structured import StructuredOutputsParams
from nanoflow_compiler.errors import (
    ConfigError,
    EmptyPromptError,
    EngineClosedError,
    OutOfBlocksError,
    PromptTooLongError,
    RequestError,
    UnsupportedGraphError,
)
from tiny_models import BUILDERS, MAX_LENGTH, llama
from tiny_tokenizers import byte_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PACKABLE = sorted(BUILDERS)


def make_prompts(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


def as_prompts(ids):
    return [{"prompt_token_ids": tokens} for tokens in ids]


def tokens_of(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def reference(model, prompts, *, max_tokens):
    """Greedy continuations, one prompt at a time, through transformers."""
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    return expected


@pytest.mark.parametrize("name", PACKABLE)
def test_greedy_tokens_equal_transformers(name):
    model = BUILDERS[name]()
    prompts = make_prompts(70, 1, 13, 30, 5)
    expected = reference(model, prompts, max_tokens=12)
    for settings in ({}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 2}):
        with LLM(model, enforce_eager=True, **settings) as llm:
            assert tokens_of(llm.generate(as_prompts(prompts), GREEDY)) == expected
    # The model itself is untouched by the engines that shared its weights.
    assert reference(model, prompts[:1], max_tokens=12) == expected[:1]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("budget", [5, 2048])
def test_preemption_changes_no_token(name, budget, monkeypatch):
    monkeypatch.setattr(lengths, "FIRST_GUESS", 1)  # too bold, so that the cache runs full
    model = BUILDERS[name](eos_token_id=None)
    prompts = make_prompts(60, 62, 58, 3)
    params = SamplingParams(temperature=0, max_tokens=40)
    with LLM(model, enforce_eager=True, num_kv_blocks=3, max_num_batched_tokens=budget) as llm:
        outputs = llm.generate(as_prompts(prompts), params)
        assert llm._core.batcher.num_preemptions > 0
        assert llm._core.batcher.allocator.num_free == 3
    assert tokens_of(outputs) == reference(model, prompts, max_tokens=40)


def test_a_model_that_cannot_be_packed_is_refused():
    model = BUILDERS["falcon"](alibi=True, new_decoder_architecture=False)
    with pytest.raises(UnsupportedGraphError, match="FalconForCausalLM with alibi"):
        LLM(model, enforce_eager=True)


@pytest.fixture(scope="module")
def llm():
    with LLM(llama(vocab_size=300), tokenizer=byte_tokenizer(), enforce_eager=True) as llm:
        yield llm


def generate(llm, prompt="Hello", **params):
    (output,) = llm.generate(prompt, SamplingParams(**({"temperature": 0} | params)))
    return output.prompt_token_ids, output.outputs[0]


def test_shapes_of_prompts_and_outputs(llm):
    one = llm.generate("Hi", GREEDY)
    ids = tuple(llm.tokenizer("Hi")["input_ids"])
    assert one[0].prompt == "Hi"
    assert one[0].prompt_token_ids == ids
    assert one == llm.generate(["Hi"], [GREEDY])
    tokens = llm.generate({"prompt_token_ids": list(ids)}, GREEDY)
    assert tokens[0].prompt is None
    assert tokens[0].outputs == one[0].outputs
    assert llm.generate([]) == []
    assert llm.model_path is None


def test_length_and_end_tokens(llm):
    _, output = generate(llm, max_tokens=8, ignore_eos=True)
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 8
    assert output.text == llm.tokenizer.decode(output.token_ids, skip_special_tokens=True)
    end = output.token_ids[3]
    first = output.token_ids.index(end)
    _, stopped = generate(llm, max_tokens=8, ignore_eos=True, stop_token_ids=[end])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == output.token_ids[: first + 1]
    assert stopped.text == llm.tokenizer.decode(output.token_ids[:first], skip_special_tokens=True)
    _, kept = generate(llm, max_tokens=8, min_tokens=6, ignore_eos=True, stop_token_ids=[end])
    assert len(kept.token_ids) >= 6
    assert end not in kept.token_ids[:6]


def test_stop_strings(llm):
    text = generate(llm, max_tokens=30, ignore_eos=True)[1].text
    stop = text[5:8]
    _, output = generate(llm, max_tokens=30, ignore_eos=True, stop=stop)
    assert output.finish_reason == "stop"
    assert output.text == text[: text.index(stop)]
    _, output = generate(
        llm, max_tokens=30, ignore_eos=True, stop=stop, include_stop_str_in_output=True
    )
    assert output.text == text[: text.index(stop) + len(stop)]


def test_seeds_hold_in_any_company(llm):
    params = SamplingParams(seed=5, max_tokens=12, ignore_eos=True)
    other = SamplingParams(max_tokens=12, top_k=5, ignore_eos=True)
    (alone,) = llm.generate("Hello", params)
    among = llm.generate(["Hello", "abc", "a longer prompt"], [params, other, other])
    assert among[0].outputs == alone.outputs
    assert generate(llm, temperature=1.0, seed=6, ignore_eos=True)[1] != alone.outputs[0]
    assert among[1].outputs[0].token_ids != among[2].outputs[0].token_ids


@pytest.mark.parametrize("number", [1, 7])
def test_prompts_that_are_added_between_steps(llm, monkeypatch, number):
    prompts = [{"prompt_token_ids": list(range(3, 4 + at % 11))} for at in range(24)]
    params = [
        SamplingParams(temperature=at % 2, seed=at, n=1 + at % 3, max_tokens=1 + at % 5)
        for at in range(24)
    ]
    expected = llm.generate(prompts, params)
    monkeypatch.setattr(llm_module, "_MOST_ADDED", number)
    finished = []
    found = llm.generate(prompts, params, on_finished=finished.append)
    assert sum(finished) == len(prompts)
    for one, other in zip(found, expected, strict=True):
        assert one.request_id == other.request_id
        assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]


def test_the_context_bounds_the_output(llm):
    prompt = "x" * (MAX_LENGTH - 3)
    _, output = generate(llm, prompt, max_tokens=None, ignore_eos=True)
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 3


def test_prompts_are_checked_before_any_runs(llm):
    with pytest.raises(EmptyPromptError):
        llm.generate(["fine", ""])
    with pytest.raises(PromptTooLongError, match=f"max_model_len={MAX_LENGTH}"):
        llm.generate(["fine", "x" * MAX_LENGTH])
    with pytest.raises(ConfigError, match="2 sampling_params for 1 prompts"):
        llm.generate(["fine"], [GREEDY, GREEDY])
    assert not llm._core.has_requests


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7}, {"num_kv_blocks": 4}])
def test_logprobs_of_prompts_are_those_of_the_model(settings, monkeypatch):
    """However the prompt is cut, what is in the prefix cache, and whoever is preempted."""
    monkeypatch.setattr(lengths, "FIRST_GUESS", 0)
    model = llama()
    prompts = make_prompts(62, 61, 1, 66)
    prompts.append(prompts[3][:65])
    params = SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=2, ignore_eos=True)
    with LLM(model, enforce_eager=True, **settings) as llm:
        outputs = [llm.generate(as_prompts(prompts), params) for _ in range(2)][1]
        assert bool(llm._core.stats().num_preemptions) == ("num_kv_blocks" in settings)
    for prompt, output in zip(prompts, outputs, strict=True):
        first, *others = output.prompt_logprobs
        assert first is None
        assert output.num_cached_tokens == 0
        with torch.no_grad():
            rows = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        assert len(others) == len(rows)
        for row, token, found in zip(rows, prompt[1:], others, strict=True):
            assert found.token_ids[0] == token
            assert found.token_ids[1:] == row.topk(2).indices.tolist()
            assert found.rank == (row > row[token]).sum() + 1
            torch.testing.assert_close(torch.tensor(found.logprobs), row[found.token_ids])


def test_structured_outputs(llm):
    """Beside a request without a grammar, which is not disturbed."""
    pytest.importorskip("xgrammar", reason="structured outputs need xgrammar")
    structures = [
        {"choice": ["first one", "second"]},
        {"regex": "[a-c]{3}-[0-9]{2}"},
        {"json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
    ]
    params = [
        SamplingParams(
            seed=seed, max_tokens=80, structured_outputs=StructuredOutputsParams(**structure)
        )
        for structure in structures
        for seed in range(3)
    ]
    free = SamplingParams(seed=5, max_tokens=30)
    (alone,) = llm.generate("Hello there", free)
    *outputs, beside = llm.generate(["Hello there"] * (len(params) + 1), [*params, free])
    assert beside.outputs == alone.outputs
    texts = [output.outputs[0].text for output in outputs]
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs), texts
    assert set(texts[:3]) <= {"first one", "second"}
    assert all(re.fullmatch("[a-c]{3}-[0-9]{2}", text) for text in texts[3:6])
    assert all(type(json.loads(text)["a"]) is bool for text in texts[6:])


def test_a_slow_grammar_holds_nobody_back(llm, monkeypatch):
    """Nor those that are not added yet: here it is compiled when another one has finished."""
    pytest.importorskip("xgrammar", reason="structured outputs need xgrammar")
    grammars = llm._core.grammars
    compile_grammar, finished = grammars._compile, threading.Event()

    def compile_late(params):
        assert finished.wait(20)
        return compile_grammar(params)

    monkeypatch.setattr(llm_module, "_MOST_ADDED", 1)
    monkeypatch.setattr(grammars, "_compile", compile_late)
    structure = StructuredOutputsParams(choice=["one", "other"])
    settings = [SamplingParams(max_tokens=20, structured_outputs=structure), GREEDY]
    outputs = llm.generate(
        as_prompts(make_prompts(3, 4)),
        settings,
        on_finished=lambda number: finished.set() if number else None,
    )
    assert outputs[0].outputs[0].text in structure.choice


def test_a_grammar_that_cannot_be_compiled_is_refused(llm):
    with pytest.raises((RequestError, ConfigError), match=r"regex cannot be compiled|pip install"):
        llm.generate("a", SamplingParams(structured_outputs=StructuredOutputsParams(regex="(((")))
    assert not llm._core.has_requests


def test_several_completions_of_a_prompt(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=6, ignore_eos=True)
    (output,) = llm.generate("Hello there", params)
    assert [each.index for each in output.outputs] == [0, 1, 2]
    assert output.finished
    for index, each in enumerate(output.outputs):
        alone = replace(params, n=1, seed=5 + index)
        assert llm.generate("Hello there", alone)[0].outputs[0].token_ids == each.token_ids
    assert len({each.token_ids for each in output.outputs}) > 1


def test_penalties_and_biases(llm):
    _, plain = generate(llm, max_tokens=8, ignore_eos=True)
    first = plain.token_ids[0]
    _, biased = generate(llm, max_tokens=8, ignore_eos=True, logit_bias={first: -100})
    assert first not in biased.token_ids
    _, forced = generate(llm, max_tokens=4, ignore_eos=True, logit_bias={77: 100})
    assert forced.token_ids == (77,) * 4
    settings = {"logit_bias": {77: 10, 78: 9}, "max_tokens": 6, "ignore_eos": True}
    _, again = generate(llm, presence_penalty=2, frequency_penalty=2, **settings)
    assert {77, 78} <= set(again.token_ids)


def test_logprobs_are_those_of_the_model(llm):
    prompt_ids, output = generate(llm, max_tokens=5, ignore_eos=True, logprobs=3)
    ids = torch.tensor([[*prompt_ids, *output.token_ids]])
    model = llama(vocab_size=300)
    with torch.no_grad():
        expected = model(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    assert len(output.logprobs) == 5
    for found, token, row in zip(output.logprobs, output.token_ids, expected, strict=True):
        assert found.token_ids[:2] == [token, token]  # itself, then the most likely: greedy
        assert found.rank == 1
        torch.testing.assert_close(torch.tensor(found.logprobs), row[found.token_ids])
    total = sum(found.logprobs[0] for found in output.logprobs)
    assert output.cumulative_logprob == pytest.approx(total)
    assert generate(llm)[1].logprobs is None


def test_a_prompt_that_was_seen_is_not_computed_again(llm):
    prompt = "a prompt that is long enough to fill a block of sixty-four tokens, "
    first, second = (llm.generate(prompt + end, GREEDY)[0] for end in ("one", "two"))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 64
    (again,) = llm.generate(prompt + "one", GREEDY)
    assert again.outputs == first.outputs
    with LLM(
        llama(vocab_size=300),
        tokenizer=byte_tokenizer(),
        enforce_eager=True,
        enable_prefix_caching=False,
    ) as other:
        for _ in range(2):
            (output,) = other.generate(prompt + "one", GREEDY)
            assert output.num_cached_tokens == 0
            assert output.outputs == first.outputs


def test_an_error_inside_a_step_leaves_no_request_behind(llm, monkeypatch):
    def fail(*_):
        raise RuntimeError("boom")

    prompts = [
        "a prompt of more than one block, of which nothing is stored when the step fails",
        "b",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(llm._core.runner.forward.step, "model", fail)
        with pytest.raises(RuntimeError, match="boom"):
            llm.generate(prompts, GREEDY)
    assert not llm._core.has_requests
    allocator = llm._core.batcher.allocator
    assert allocator.num_free == allocator.num_usable
    # Nor what looks like the start of a prompt in the prefix cache.
    outputs = llm.generate(prompts, GREEDY)
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    ids = [list(output.prompt_token_ids) for output in outputs]
    assert tokens_of(outputs) == reference(llama(vocab_size=300), ids, max_tokens=12)


def test_settings_are_checked():
    model = llama()
    for settings, message in (
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": MAX_LENGTH + 1}, "max_model_len"),
        ({"num_kv_blocks": 1, "kv_cache_memory_bytes": 10**6}, "not both"),
        ({"kv_cache_memory_bytes": 10}, "holds no block"),
        ({"gpu_memory_utilization": 0.5}, "for a GPU"),
        ({"gpu_memory_utilization": 1.5}, "at most 1"),
        ({"gpu_memory_utilization": 0.5, "num_kv_blocks": 3}, "not both"),
        ({"dtype": "bfloat16"}, "given by name"),
        ({"options": {"partz": 2}}, "partz"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(model, enforce_eager=True, **settings)


def test_a_prompt_beyond_the_cache_is_refused():
    with LLM(llama(), enforce_eager=True, num_kv_blocks=1) as llm:
        with pytest.raises(OutOfBlocksError, match="kv_cache_memory_bytes"):
            llm.generate({"prompt_token_ids": [5] * 60}, GREEDY)
        llm.generate({"prompt_token_ids": [5] * 50}, GREEDY)


def test_without_a_tokenizer():
    with LLM(llama(), enforce_eager=True) as llm:
        with pytest.raises(ConfigError, match="prompt_token_ids"):
            llm.generate("text")
        with pytest.raises(ConfigError, match="stop_token_ids"):
            llm.generate({"prompt_token_ids": [5]}, SamplingParams(stop="x"))
        (output,) = llm.generate({"prompt_token_ids": [5]}, GREEDY)
        assert output.outputs[0].text == ""


def test_a_closed_engine_refuses():
    llm = LLM(llama(), enforce_eager=True)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate({"prompt_token_ids": [5]})


def test_kv_cache_memory_bytes_sets_the_blocks():
    # Two layers, two heads of 8 for keys and for values, 4 bytes each.
    bytes_per_block = 64 * 2 * 2 * 2 * 8 * 4
    with LLM(llama(), enforce_eager=True, kv_cache_memory_bytes=5 * bytes_per_block + 1) as llm:
        assert llm._core.batcher.allocator.num_usable == 5
