"""The engine on compiled steps: the tokens of eager ones, wherever the token axis is cut."""

import random

import pytest
import torch

from nanoflow_compiler.engine import lengths
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.sampling_params import SamplingParams
from tiny_models import BUILDERS, llama

GREEDY = SamplingParams(temperature=0, max_tokens=12)
NAMES = ["llama", "gemma2", "gpt2", "deepseek_v3", "gpt_oss"]


def make_prompts():
    generator = torch.Generator().manual_seed(3)
    lengths = (60, 1, 13, 62, 5)
    return [
        {"prompt_token_ids": torch.randint(3, 128, (n,), generator=generator).tolist()}
        for n in lengths
    ]


def tokens_of(llm):
    return [output.outputs[0].token_ids for output in llm.generate(make_prompts(), GREEDY)]


def eager_tokens(model):
    with LLM(model, enforce_eager=True) as llm:
        return tokens_of(llm)


def random_cut(num_tokens, num_cells):
    """Any cut, with empty cells too."""
    draw = random.Random(num_tokens)
    return [0, *sorted(draw.randint(0, num_tokens) for _ in range(num_cells - 1)), num_tokens]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "parts"), [("codegen", 2), ("reference", 3)])
def test_tokens_equal_eager(name, backend, parts):
    check_tokens(name, backend=backend, parts=parts, clusters="eager")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(
    ("backend", "clusters"),
    [("codegen", "inductor"), ("codegen", "eager"), ("reference", "eager")],
)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_architecture(name, backend, clusters, parts):
    check_tokens(name, backend=backend, parts=parts, clusters=clusters)


def check_tokens(name, **options):
    model = BUILDERS[name]()
    expected = eager_tokens(model)
    with LLM(model, options=options, max_num_batched_tokens=33) as llm:
        assert llm._core.runner.forward.step.num_cells == options["parts"]
        assert tokens_of(llm) == expected
        llm._core.runner.cut = random_cut
        assert tokens_of(llm) == expected


def test_preemption_of_a_compiled_engine(monkeypatch):
    monkeypatch.setattr(lengths, "FIRST_GUESS", 1)  # too bold, so that the cache runs full
    model = llama(eos_token_id=None)
    expected = eager_tokens(model)
    options = {"parts": 2, "clusters": "eager"}
    with LLM(model, options=options, num_kv_blocks=2) as llm:
        assert tokens_of(llm) == expected
        assert llm._core.batcher.num_preemptions > 0


def test_the_default_options():
    model = llama()
    with LLM(model) as llm:
        assert tokens_of(llm) == eager_tokens(model)
