"""A real model through both entries: the greedy tokens of transformers, batched, chunked and cut."""

import pytest
import torch

from nanoflow_compiler import LLM, SamplingParams

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "List three primary colours:\n1.",
    "In 1969, astronauts of the Apollo 11 mission landed on the Moon. The commander of the mission, "
    "Neil Armstrong, was the first person to walk on its surface, followed by",
    "Q: What is 2 + 2?\nA:",
    "A",
]
CUT = ({"parts": 2}, {"max_num_batched_tokens": 24, "device": "cpu"})
CUDA = {"device": "cuda", "max_num_seqs": 16}
ON_GPU = [
    pytest.mark.gpu,
    # Inductor's advice on a reduction that it splits.
    pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled"),
]


@pytest.fixture(scope="module")
def prompt_ids(smollm2):
    return [smollm2.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def generate(model, ids, **options):
    """New tokens of a left-padded batch, on past any end of text."""
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    output = model.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS, **options
    )
    model.generation_config.eos_token_id = ends
    assert output.shape[1] == longest + NUM_TOKENS
    return output[:, longest:].tolist()


@pytest.fixture(scope="module")
def expected(smollm2, prompt_ids):
    return [generate(smollm2.model, [ids])[0] for ids in prompt_ids]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        pytest.param({}, {"device": "cpu"}, id="defaults"),
        pytest.param(*CUT, id="cut-and-chunked"),
        pytest.param({}, CUDA, id="gpu", marks=ON_GPU),
        pytest.param(CUT[0], CUT[1] | CUDA, id="gpu-cut-and-chunked", marks=ON_GPU),
        pytest.param({}, CUDA | {"enforce_eager": True}, id="gpu-eager", marks=ON_GPU),
    ],
)
def test_llm_generates_what_transformers_does(smollm2, prompt_ids, expected, options, settings):
    prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
    with LLM(smollm2.path, options=options, **settings) as llm:
        outputs = llm.generate(prompts, GREEDY)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert outputs[0].outputs[0].text.startswith(" Paris")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_of_a_compiled_model_is_unchanged(smollm2, prompt_ids, expected, cache):
    torch._dynamo.reset()
    model, forward = smollm2.model, smollm2.model.forward
    model.forward = torch.compile(forward, backend="nanoflow", options={"parts": 2})
    try:
        assert generate(model, prompt_ids, cache_implementation=cache) == expected
    finally:
        model.forward = forward
