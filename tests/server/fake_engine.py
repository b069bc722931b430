"""An engine without a model: tokens follow from the prompt and the seed, or from a script."""

import asyncio
import hashlib
from dataclasses import dataclass

from nanoflow_compiler.engine.messages import RequestTimes
from nanoflow_compiler.errors import EmptyPromptError, EngineDeadError, PromptTooLongError
from tiny_tokenizers import byte_tokenizer

FIRST_BYTE = 3
EOS = 2
MOST_TOKENS = 200
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TIMES = RequestTimes(queued_s=0.5, prefill_s=2.0)
CHAT_TEMPLATE = """
{%- if tools %}{{ "<tool_call> tools: " ~ (tools | tojson) ~ "\\n" }}{% endif %}
{%- for message in messages %}
{%- if message.role == "forbidden" %}{{ raise_exception("no such role") }}{% endif %}
{{- message.role ~ ": " ~ message.content }}
{%- for call in message.tool_calls or [] %}
{{- "calls " ~ call.function.name ~ " in " ~ call.function.arguments.city }}
{%- endfor %}
{{- "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "assistant:" }}{% endif %}"""


@dataclass(frozen=True)
class Logprobs:
    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(frozen=True)
class Completion:
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[Logprobs] | None


@dataclass(frozen=True)
class Output:
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    num_cached_tokens: int | None
    prompt_logprobs: list[Logprobs | None] | None
    times: RequestTimes | None


@dataclass(frozen=True)
class Stats:
    num_running: int
    num_waiting: int = 0
    num_blocks: int = 8
    num_used_blocks: int = 0
    num_preemptions: int = 5
    num_cache_queries: int = 70
    num_cache_hits: int = 30
    num_batched_tokens: int = 3009
    step_tokens: tuple[int, ...] = (2, 0, 1, *[0] * 6, 1, *[0] * 4)


def make_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class FakeEngine:
    model_name = "tiny"
    block_size = 64

    def __init__(self, *, script=None, delay_s=0.0, max_model_len=2048, tokenizer=None):
        self.tokenizer = make_tokenizer() if tokenizer is None else tokenizer
        self.letters = self.tokenizer(LETTERS, add_special_tokens=False)["input_ids"]
        self.max_model_len = max_model_len
        self.script = script
        self.delay_s = delay_s
        self.sampling_defaults = {}
        self.errored = False
        self.active = set()
        self.aborted = set()
        self.seen = []

    async def generate(self, prompt, params, *, request_id):
        tokens = tuple(prompt["prompt_token_ids"])
        self._check(tokens)
        assert request_id not in self.active
        self.active.add(request_id)
        self.seen.append((request_id, tokens, params))
        rows = [_Row(self, tokens, params, index=index) for index in range(params.n)]
        try:
            while not all(row.finish_reason for row in rows):
                await asyncio.sleep(self.delay_s)
                if self.errored:
                    raise EngineDeadError("the engine process died; its log says why")
                for row in rows:
                    row.advance(is_aborted=request_id in self.aborted)
                outputs = tuple(row.completion() for row in rows)
                yield Output(tokens, outputs, 4, _prompt_logprobs(tokens, params), TIMES)
        finally:
            self.active.discard(request_id)

    async def abort(self, request_id):
        self.aborted.add(request_id)

    async def stats(self):
        if self.errored:
            raise EngineDeadError("the engine process died; its log says why")
        return Stats(num_running=len(self.active), num_used_blocks=2 * len(self.active))

    def _check(self, tokens):
        if self.errored:
            raise EngineDeadError("the engine process died; its log says why")
        if not tokens:
            raise EmptyPromptError("the prompt has no tokens, so there is nothing to continue")
        if len(tokens) >= self.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(tokens)} tokens, and max_model_len={self.max_model_len}"
            )


class _Row:
    """One completion; everything that ends it is here."""

    def __init__(self, engine, prompt, params, *, index):
        self.engine, self.params, self.index = engine, params, index
        self.script = None
        if engine.script is not None:
            text = engine.script(engine.tokenizer.decode(list(prompt)))
            self.script = [*engine.tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
        self.source = repr((prompt, params.seed, index)).encode()
        room = engine.max_model_len - len(prompt)
        self.most = min(room, MOST_TOKENS if params.max_tokens is None else params.max_tokens)
        self.tokens, self.text = [], ""
        self.finish_reason = self.stop_reason = None

    def advance(self, *, is_aborted):
        if self.finish_reason:
            return
        if is_aborted:
            self.finish_reason = "abort"
            return
        token = self._next()
        self.tokens.append(token)
        self._end(token)

    def completion(self):
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = [_logprobs(token, self.params.logprobs) for token in self.tokens]
        return Completion(
            self.index,
            self.text,
            tuple(self.tokens),
            self.finish_reason,
            self.stop_reason,
            logprobs,
        )

    def _next(self):
        position = len(self.tokens)
        if self.script is not None:
            return self.script[min(position, len(self.script) - 1)]
        digest = hashlib.blake2b(self.source + b"%d" % position, digest_size=1).digest()
        return self.engine.letters[digest[0] % 26]

    def _end(self, token):
        params = self.params
        is_eos = token == EOS and not params.ignore_eos
        if token in params.stop_token_ids or is_eos:
            self.finish_reason, self.stop_reason = "stop", None if is_eos else token
            return
        if self.script is None:
            self.text += LETTERS[self.engine.letters.index(token)]
        else:
            text = self.engine.tokenizer.decode(
                self.tokens, skip_special_tokens=params.skip_special_tokens
            )
            # A character whose bytes are not all there is held back.
            self.text = self.text if text.endswith("\N{REPLACEMENT CHARACTER}") else text
        if len(self.tokens) >= self.most:
            self.finish_reason = "length"
        for stop in params.stop_strings:
            start = self.text.find(stop)
            if start >= 0 and len(self.tokens) >= params.min_tokens:
                end = start + (len(stop) if params.include_stop_str_in_output else 0)
                self.text, self.finish_reason, self.stop_reason = self.text[:end], "stop", stop


def _logprobs(token, num):
    others = [token, *(FIRST_BYTE + (token + i) % 200 for i in range(1, 30))][:num]
    return Logprobs([token, *others], [-0.5, *(-0.5 - i for i in range(num))], 1)


def _prompt_logprobs(tokens, params):
    if params.prompt_logprobs is None:
        return None
    return [None, *(_logprobs(token, params.prompt_logprobs) for token in tokens[1:])]
