"""Requests of all kinds that come and go at random, and what must be so whatever they do."""

import gc
import math
import random

import torch

from mixed_requests import SETTINGS
from nanoflow_compiler.engine.sampling_params import SamplingParams

VOCAB_SIZE = 128
PREFIX_LENGTHS = (64, 70, 128, 140)
"""Of the beginnings that prompts share: whole blocks, and more."""
CROWDS = (0, 1, 3, 12, 40)
"""How many requests are to be open, for a while."""
CROWD_STEPS = 40
LONGEST, MOST = 100, 60
KEPT = 40
"""Answers that are asked for again when all is over."""


class Soak:
    """Drives an engine; checks each step's output, and every answer."""

    def __init__(self, llm, *, seed):
        self.core, self.processor = llm._core, llm._processor
        self.longest = llm.limits.max_model_len
        self.choice = random.Random(seed)
        self.prefixes = [self.tokens(length) for length in PREFIX_LENGTHS]
        self.open = {}
        """Answers by the keys of their requests that have not ended."""
        self.ended = []
        """Answers, with their parameters, that nobody cancelled."""
        self.params = {}
        self.num_arrived = self.num_ended = self.num_cancelled = self.num_steps = 0

    def tokens(self, length):
        return [self.choice.randrange(3, VOCAB_SIZE) for _ in range(length)]

    def run(self, num_steps):
        """So many turns of the engine's loop; requests stay open."""
        for at in range(num_steps):
            if at % CROWD_STEPS == 0:
                crowd = self.choice.choice(CROWDS)
            if len(self.open) < crowd and self.choice.random() < 0.7:
                self.arrive()
            if self.open and self.choice.random() < 0.03:
                self.cancel()
            self.step()

    def drain(self):
        """Until no request is open; what is held on a device then, in bytes."""
        while self.core.has_requests:
            self.step()
        assert not self.open
        gc.collect()
        if not torch.cuda.is_available():
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def arrive(self):
        own = self.choice.choice(SETTINGS)
        length = self.choice.choice([1, 2, 63, 64, self.choice.randint(1, LONGEST)])
        prompt = self.tokens(length)
        if self.choice.random() < 0.4:
            prompt = self.choice.choice(self.prefixes) + prompt
        params = SamplingParams(
            **own,
            n=self.choice.choice([1, 1, 1, 2, 4]),
            seed=self.num_arrived * 10,
            max_tokens=max(self.choice.randint(1, MOST), own.get("min_tokens", 0)),
        )
        self.num_arrived += 1
        answer = self.processor.answer(prompt, params, request_id=str(self.num_arrived))
        self.params[id(answer)] = params
        self.processor.open(answer)
        for request in answer.requests:
            self.open[request.key] = answer
            self.core.add(request)

    def cancel(self):
        answer = self.choice.choice(list(self.open.values()))
        keys = self.processor.close(answer)
        assert set(keys) <= self.open.keys()
        self.core.abort(keys)
        for key in keys:
            del self.open[key]
        del self.params[id(answer)]
        self.num_cancelled += 1

    def step(self):
        self.num_steps += 1
        output = self.core.step()
        if output is None:
            return
        assert not output.errors
        assert len({*output.keys}) == len(output.keys)
        # Nothing is told of what ended, or was cancelled.
        assert {*output.keys} <= self.open.keys()
        grown, stopped = self.processor.process(output)
        assert not stopped
        for key in output.finish_reasons:
            del self.open[key]
            self.num_ended += 1
        for answer in grown:
            if answer.finished:
                self.end(answer)

    def end(self, answer):
        params = self.params.pop(id(answer))
        output = answer.output()
        for one in output.outputs:
            sizes = {"num_prompt": len(answer.prompt_token_ids), "max_model_len": self.longest}
            check_completion(one, params, **sizes)
        for position in output.prompt_logprobs or ():
            check_logprobs(position)
        self.ended.append((answer, params))

    def check_again(self, llm):
        """Answers are those that the same requests get in other company."""
        chosen = self.choice.sample(self.ended, min(KEPT, len(self.ended)))
        prompts = [{"prompt_token_ids": answer.prompt_token_ids} for answer, _ in chosen]
        outputs = llm.generate(prompts, [params for _, params in chosen])
        for (answer, _), again in zip(chosen, outputs, strict=True):
            assert ends(answer.output()) == ends(again)


def ends(output):
    return [(one.token_ids, one.finish_reason, one.stop_reason) for one in output.outputs]


def check_completion(one, params, *, num_prompt, max_model_len):
    assert 1 <= len(one.token_ids) <= params.max_tokens
    assert all(0 <= token < VOCAB_SIZE for token in one.token_ids)
    assert one.finish_reason in ("stop", "length")
    if one.finish_reason == "length":
        assert len(one.token_ids) in (params.max_tokens, max_model_len - num_prompt)
    assert (one.logprobs is None) == (params.logprobs is None)
    for position in one.logprobs or ():
        check_logprobs(position)


def check_logprobs(position):
    if position is not None:
        assert all(math.isfinite(value) and value <= 1e-5 for value in position.logprobs)
