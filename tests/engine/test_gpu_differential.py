"""Three programs for one model: the compiled one on its device, the reference backend, and transformers.

In bfloat16 they round differently, so that tokens are compared up to near misses; in float32 parts of a
program, and captured steps, must find the same tokens. The CPU runs small cases of the same tests.
"""

import pytest
import torch

from differential import (
    TOP,
    check_every_token,
    check_first_difference,
    greedy_tokens,
    make_prompts,
    transformers_tokens,
)
from mixed_requests import SETTINGS, answers, check_same, make_requests
from nanoflow_compiler.engine import assemble
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.models import load_decoder
from tiny_models import BUILDERS
from watched_steps import Logits
from wide_models import VOCAB_SIZE, wide

# Inductor's advice on a reduction that it splits.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled")

SIZES = {"max_num_seqs": 16, "max_num_batched_tokens": 192, "max_model_len": 256}
QUICK = {"clusters": "eager", "gemms": "aten"}
"""Options on a CPU, where Inductor takes longer than the test."""
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
TOP_OF_MIXTURES = 20
"""Where two experts are almost equally likely, rounding chooses another one, and logits change more."""
STRAYS_OF_MIXTURES = 1
"""Of 8 prompts, those whose logits change so much."""


def on_gpu(*values):
    return pytest.param("cuda", *values, marks=pytest.mark.gpu)


@pytest.fixture
def launched(monkeypatch):
    """Engines that are made from now on capture no steps."""

    def launched():
        monkeypatch.setattr(assemble, "_capture", lambda *_: None)

    return launched


def check_close(model, llm, prompts, found, expected, *, top=TOP, strays=0):
    shares, strayed = [], []
    for prompt, one, other in zip(prompts, found, expected, strict=True):
        try:
            check_first_difference(model, llm, prompt, one, other, top=top)
            shares.append(check_every_token(model, prompt, one, top=top))
        except AssertionError as error:
            strayed.append(str(error))
    assert len(strayed) <= strays, "\n".join(strayed)
    assert sum(shares) > 0.9 * len(shares)


@pytest.mark.parametrize(("device", "name"), [("cpu", "llama"), *map(on_gpu, BUILDERS)])
def test_the_program_the_reference_and_transformers(device, name, launched):
    model = wide(name, dtype=torch.bfloat16, device=device)
    number, num_tokens, longest = (8, 48, 180) if device == "cuda" else (2, 8, 70)
    prompts = make_prompts(number, vocab_size=VOCAB_SIZE, longest=longest)
    is_mixture = name in MIXTURES
    bounds = {
        "top": TOP_OF_MIXTURES if is_mixture else TOP,
        "strays": STRAYS_OF_MIXTURES if is_mixture else 0,
    }
    expected = transformers_tokens(model, prompts, num_tokens=num_tokens)
    options = {} if device == "cuda" else QUICK
    with LLM(model, options=options, **SIZES) as llm:
        found = greedy_tokens(llm, prompts, num_tokens=num_tokens)
        check_close(model, llm, prompts, found, expected, **bounds)
    launched()
    with LLM(model, options={"backend": "reference", "gemms": "aten"}, **SIZES) as reference:
        checked = greedy_tokens(reference, prompts, num_tokens=num_tokens)
        check_close(model, reference, prompts, checked, expected, **bounds)
        check_close(model, reference, prompts, found, checked, **bounds)


@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", "llama"), *map(on_gpu, ("llama", "qwen3", "gemma2", "gpt_oss", "mixtral"))],
)
def test_parts_find_the_same_in_float32(device, name):
    model = wide(name, device=device)
    number = 12 if device == "cuda" else 3
    requests = make_requests(number, seed=5, settings=[{"temperature": 0, "ignore_eos": True}])
    runs = []
    for parts in (1, 2, 4) if device == "cuda" else (1, 2):
        options = {"parts": parts} | ({} if device == "cuda" else QUICK)
        with LLM(model, options=options, **SIZES) as llm:
            assert llm._core.runner.forward.step.num_cells == parts
            runs.append(Logits(llm).of(requests))
    (expected, expected_logits), *others = runs
    for found, found_logits in others:
        assert found[0] == expected[0]
        assert len(found_logits) == len(expected_logits)
        for one, other in zip(found_logits, expected_logits, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "name"),
    [on_gpu("qwen3"), on_gpu("gemma2"), on_gpu("gpt_oss"), on_gpu("mixtral"), on_gpu("gpt2")],
)
def test_replayed_steps_equal_launched_ones(device, name, launched):
    """In float32, seeds and several completions of a prompt included; Llama has tests of its own."""
    model = BUILDERS[name]().to(device)
    settings = [one | {"n": 1 + at % 3} for at, one in enumerate(SETTINGS)]
    requests = make_requests(24, seed=12, settings=settings)
    with LLM(model, **SIZES) as captured:
        assert captured._core.runner.graphs.buckets.all
        found, found_all = answers(captured, requests), completions(captured, requests)
    launched()
    with LLM(model, **SIZES) as llm:
        assert llm._core.runner.graphs is None
        check_same(found, answers(llm, requests))
        assert found_all == completions(llm, requests)


def completions(llm, requests):
    outputs = llm.generate(*requests)
    return [[one.token_ids for one in output.outputs] for output in outputs]


NUM_TOKENS = 64
TEXT = (
    "The engine forms a batch of requests and asks the device for one step of all of them. Between "
    "two steps requests may come and go. A prompt that is longer than a step is computed in several. "
) * 5


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_smollm2_in_bfloat16(parts):
    """A trained model, whose likeliest token is rarely a matter of rounding."""
    decoder = load_decoder("smollm2-135m", dtype="bfloat16", device="cuda")
    ids = decoder.tokenizer(TEXT)["input_ids"]
    prompts = [ids[at : at + length] for at, length in enumerate(range(1, 192, 12))]
    expected = transformers_tokens(decoder.model, prompts, num_tokens=NUM_TOKENS)
    with LLM(decoder, options={"parts": parts}, max_model_len=512, max_num_seqs=16) as llm:
        found = greedy_tokens(llm, prompts, num_tokens=NUM_TOKENS)
        check_close(decoder.model, llm, prompts, found, expected)


@pytest.mark.gpu
def test_smollm2_answers_with_a_seed_whatever_else_runs():
    """In float32, so that other sizes of a step round too little to matter."""
    decoder = load_decoder("smollm2-135m", device="cuda")
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=32, ignore_eos=True)
    prompts = [{"prompt_token_ids": decoder.tokenizer(TEXT)["input_ids"][:n]} for n in (3, 50, 90)]
    with LLM(decoder, max_model_len=512, max_num_seqs=16) as llm:
        together = [output.outputs[0].token_ids for output in llm.generate(prompts * 5, params)]
        alone = [llm.generate(one, params)[0].outputs[0].token_ids for one in prompts]
    assert together == alone * 5
