"""Greedy tokens of two programs for one model, compared as far as rounding lets them agree."""

import random

import torch

from nanoflow_compiler.engine.sampling_params import SamplingParams

TOP = 5


def make_prompts(number, *, vocab_size, longest, seed=0):
    """Token ids; lengths from one token to ``longest``, and those around a block of the KV cache."""
    choice = random.Random(seed)
    lengths = [length for length in (1, 63, 64, 65, longest) if length <= longest]
    lengths += [choice.randint(1, longest) for _ in range(number)]
    return [[choice.randrange(3, vocab_size) for _ in range(n)] for n in lengths[:number]]


def greedy_tokens(llm, prompts, *, num_tokens):
    """By an engine, past any end token."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.inference_mode()
def transformers_tokens(model, prompts, *, num_tokens):
    """By ``generate`` of transformers, one prompt at a time, past any end token."""
    settings = {"do_sample": False, "max_new_tokens": num_tokens, "pad_token_id": 0}
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        found = [
            model.generate(
                (given := torch.tensor([ids], device=model.device)),
                attention_mask=torch.ones_like(given),
                **settings,
            )
            for ids in prompts
        ]
    finally:
        model.generation_config.eos_token_id = ends
    return [out[0, len(ids) :].tolist() for out, ids in zip(found, prompts, strict=True)]


@torch.inference_mode()
def next_logits(model, ids):
    """Of every position of one sequence, by one forward of transformers without a cache."""
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()


def likeliest_of_engine(llm, ids, *, top):
    """The tokens that an engine would choose first after these."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=top)
    (output,) = llm.generate([{"prompt_token_ids": ids}], params)
    return output.outputs[0].logprobs[0].token_ids


def check_first_difference(model, llm, prompt, found, expected, *, top=TOP):
    """Where two continuations part, each side's token is among the likeliest of the other.

    What follows depends on the first difference, and is not compared. Returns its place.
    """
    pairs = zip(found, expected, strict=True)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if at is not None:
        ids = [*prompt, *expected[:at]]
        theirs = next_logits(model, ids)[-1].topk(top).indices.tolist()
        assert found[at] in theirs, (at, found[at], theirs)
        ours = likeliest_of_engine(llm, ids, top=top)
        assert expected[at] in ours, (at, expected[at], ours)
    return at


def check_every_token(model, prompt, found, *, top=TOP):
    """Each token is among the likeliest after those before it; returns the share of the very first."""
    logits = next_logits(model, [*prompt, *found])[len(prompt) - 1 : -1]
    tokens = torch.tensor(found, device=logits.device)[:, None]
    rank = (logits > logits.gather(1, tokens)).sum(-1)
    assert int(rank.max()) < top, rank.tolist()
    return float((rank == 0).double().mean())
