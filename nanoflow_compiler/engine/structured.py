"""Structured outputs: what a request's text must look like, and which tokens may come next.

xgrammar does the work; it is imported at the first request that asks for a structure.
"""

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.json_schema import check_schema
from nanoflow_compiler.errors import ConfigError, RequestError

if TYPE_CHECKING:  # to import it takes a second, and SamplingParams need this file
    from transformers import PreTrainedTokenizerBase

__all__ = ["Grammar", "GrammarCompiler", "StructuredOutputsParams", "num_mask_words"]

Kind = Literal["json", "regex", "choice", "grammar", "json_object"]

CACHE_BYTES = 512 * 2**20
NUM_COMPILE_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one field is given; names are vLLM's."""

    json: Mapping[str, object] | str | None = None
    """A JSON schema, kept as text. Properties that it does not name are not generated."""
    regex: str | None = None
    """Matches the whole text."""
    choice: Sequence[str] | None = None
    grammar: str | None = None
    """EBNF as llama.cpp writes it (GBNF), with a rule called ``root``."""
    json_object: bool = False
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """JSON on one line: a small model may write line breaks until it has no tokens left."""

    def __post_init__(self) -> None:
        """Refuse none or several kinds, and what is no JSON; store plain text and tuples."""
        if len(self._given()) != 1:
            raise ConfigError(
                "structured_outputs takes exactly one of json, regex, choice, grammar and "
                f"json_object, not {' and '.join(self._given()) or 'none'}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _checked_choice(self.choice))

    @property
    def kind(self) -> Kind:
        return self._given()[0]

    def _given(self) -> list[Kind]:
        kinds: tuple[Kind, ...] = ("json", "regex", "choice", "grammar")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        return [*given, "json_object"] if self.json_object else given


class Grammar:
    """Where one request's text is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def accept(self, token: int) -> None:
        """Go on by a token; :class:`RequestError` if the last mask barred it."""
        if not self._matcher.accept_token(token):
            raise RequestError(
                f"token {token} does not fit the structured output; no bias or bar of tokens may "
                "leave the grammar without a token to choose"
            )

    def fill(self, bitmask_row: npt.NDArray[np.int32]) -> None:
        """Write the tokens that may come next, one bit each; after the end, all of them."""
        if self.is_terminated:
            bitmask_row.fill(-1)
        else:
            # Writes nothing less than the whole row, also where it says that all tokens fit.
            self._matcher.fill_next_token_bitmask(bitmask_row)

    @property
    def is_terminated(self) -> bool:
        """Whether the end token was accepted."""
        return bool(self._matcher.is_terminated())


class GrammarCompiler:
    """Makes grammars for one model; what was compiled once is kept while memory allows."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        """``vocab_size`` is the width of the logits; the end tokens are those that end a text."""
        if tokenizer is None:
            raise ConfigError("structured outputs need a tokenizer; pass one with the model")
        self._xgrammar = _import_xgrammar()
        ends = sorted(token for token in eos_token_ids if 0 <= token < vocab_size)
        if not ends:
            raise ConfigError("structured outputs need a model with an end token (eos_token_id)")
        info = _tokenizer_info(self._xgrammar, tokenizer, vocab_size=vocab_size, ends=ends)
        self._compiler = self._xgrammar.GrammarCompiler(
            info, max_threads=NUM_COMPILE_THREADS, cache_limit_bytes=CACHE_BYTES
        )

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """A grammar at its beginning; :class:`RequestError` for one that cannot be compiled.

        May be called from several threads; a large schema takes seconds.
        """
        if isinstance(params.json, str):
            check_schema(params.json)
        try:
            compiled = self._compiled(params)
        except (RuntimeError, ValueError, TypeError) as error:
            raise RequestError(
                f"structured_outputs.{params.kind} cannot be compiled: {_one_line(error)}"
            ) from error
        return Grammar(self._xgrammar.GrammarMatcher(compiled))

    def _compiled(self, params: StructuredOutputsParams) -> Any:
        match params.kind:
            case "json":
                return self._compiler.compile_json_schema(
                    params.json, any_whitespace=not params.disable_any_whitespace
                )
            case "regex":
                return self._compiler.compile_regex(params.regex)
            case "choice":
                return self._compiler.compile_grammar(_choice_grammar(params.choice or ()))
            case "grammar":
                return self._compiler.compile_grammar(params.grammar)
            case "json_object":
                return self._compiler.compile_json_schema(
                    _ANY_OBJECT, any_whitespace=not params.disable_any_whitespace
                )


_ANY_OBJECT = '{"type": "object", "additionalProperties": true}'


def num_mask_words(vocab_size: int) -> int:
    """Columns of the bitmask: one bit per token in 32-bit words."""
    return -(-vocab_size // 32)


def _tokenizer_info(
    xgrammar: Any, tokenizer: "PreTrainedTokenizerBase", *, vocab_size: int, ends: list[int]
) -> Any:
    """The vocabulary as bytes. Special tokens are none: the text leaves them out."""
    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab_size, stop_token_ids=ends
    )
    special = frozenset(tokenizer.all_special_ids)
    texts = [b"" if i in special else text for i, text in enumerate(info.decoded_vocab)]
    return xgrammar.TokenizerInfo(
        texts,
        xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=ends,
        add_prefix_space=info.add_prefix_space,
    )


def _schema_text(schema: object) -> str:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        parsed = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"structured_outputs.json is no JSON schema: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(
            f"structured_outputs.json must be a JSON object, not {type(parsed).__name__}"
        )
    return text


def _checked_choice(choice: Sequence[str]) -> tuple[str, ...]:
    listed = () if isinstance(choice, str) else tuple(choice)
    if not listed or not all(isinstance(text, str) and text for text in listed):
        raise ConfigError("structured_outputs.choice must be a list of texts, none of them empty")
    return listed


def _choice_grammar(choice: Sequence[str]) -> str:
    return "root ::= " + " | ".join(f'"{_escaped(text)}"' for text in choice)


def _escaped(text: str) -> str:
    r"""As a literal of the grammar, where ``\U`` takes a character by its eight digits."""
    return "".join(
        character if character.isalnum() else f"\\U{ord(character):08X}" for character in text
    )


def _one_line(error: Exception) -> str:
    """The message of xgrammar without the time and the place in its source that it begins with."""
    text = " ".join(str(error).split())
    _, found, message = text.partition(".cc:")
    return (message.partition(": ")[2] if found else text)[:500]


def _import_xgrammar() -> Any:
    try:
        return importlib.import_module("xgrammar")
    except ImportError as error:
        raise ConfigError(
            "structured outputs need xgrammar: pip install nanoflow-compiler[structured]"
        ) from error
