"""Tool calls in the text of a model: the formats of Hermes (and Qwen) and of Llama 3."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nanoflow_compiler.server.settings import ToolCallParser

__all__ = [
    "HermesParser",
    "LlamaParser",
    "ParsedCall",
    "RequiredParser",
    "ToolParser",
    "make_parser",
    "new_call_id",
]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A function and its arguments, which are JSON in a string."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """Text before a position that is settled: content for the user, and whole calls."""

    content: str
    calls: tuple[ParsedCall, ...]


class ToolParser(Protocol):
    """Reads the whole text so far; what it returned once, it returns again as a beginning."""

    def parse(self, text: str, *, is_finished: bool) -> Parsed: ...


class HermesParser:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` between text."""

    def parse(self, text: str, *, is_finished: bool) -> Parsed:
        content, position = "", 0
        calls: list[ParsedCall] = []
        while (start := text.find(OPEN, position)) >= 0:
            end = text.find(CLOSE, start)
            if end < 0 and not is_finished:
                return Parsed(content + _before(text[position:start]), tuple(calls))
            end = len(text) if end < 0 else end
            call = _read_call(text[start + len(OPEN) : end])
            after = end + len(CLOSE)
            if call is None:
                # Not a call after all: the user sees what the model wrote.
                content += text[position:after]
            else:
                content += _before(text[position:start])
                calls.append(call)
            position = after
        rest = text[position:]
        if not is_finished:
            rest = rest[: len(rest) - _overlap(rest, OPEN)]
            # Space may turn out to stand before a call.
            rest = rest.rstrip() if rest.strip() else ""
        elif calls and not rest.strip():
            rest = ""
        return Parsed(content + rest, tuple(calls))


class LlamaParser:
    """``{"name": ..., "parameters": {...}}`` as the whole answer; several are parted by ``;``."""

    def parse(self, text: str, *, is_finished: bool) -> Parsed:
        body = text.lstrip()
        if not is_finished and (not body or PYTHON_TAG.startswith(body)):
            return Parsed("", ())
        if not body.startswith(("{", PYTHON_TAG)):
            return Parsed(text, ())
        if not is_finished:
            return Parsed("", ())
        calls = _read_sequence(body.removeprefix(PYTHON_TAG))
        return Parsed("", tuple(calls)) if calls else Parsed(text, ())


class RequiredParser:
    """A JSON list of calls, which the grammar enforced; it may be cut before its end."""

    def parse(self, text: str, *, is_finished: bool) -> Parsed:
        found = _read_sequence(text.strip().removeprefix("["), parted_by=",", may_be_cut=True)
        calls = tuple(found)
        return Parsed(text if is_finished and not calls else "", calls)


def make_parser(kind: ToolCallParser, *, template: str) -> ToolParser | None:
    """``auto`` asks the template, which tells the model how to write a call."""
    if kind == "auto":
        kind = (
            "hermes"
            if OPEN in template
            else "llama3_json"
            if '"parameters"' in template
            else "none"
        )
    parsers: dict[str, type[HermesParser | LlamaParser]] = {
        "hermes": HermesParser,
        "llama3_json": LlamaParser,
    }
    return parsers[kind]() if kind in parsers else None


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _read_call(text: str) -> ParsedCall | None:
    try:
        return _as_call(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _read_sequence(
    text: str, *, parted_by: str = ";", may_be_cut: bool = False
) -> Sequence[ParsedCall]:
    """All of the text is calls, or none of it is; unless it is cut, where whole calls count."""
    decoder, rest = json.JSONDecoder(), text.strip()
    calls: list[ParsedCall] = []
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return calls if may_be_cut else []
        call = _as_call(value)
        if call is None:
            return calls if may_be_cut else []
        calls.append(call)
        rest = rest[end:].strip().removeprefix(parted_by).strip()
    return calls


def _as_call(value: Any) -> ParsedCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ParsedCall(value["name"], arguments)


def _before(text: str) -> str:
    """Text before a call, without the line break that leads to it."""
    return text.rstrip() if text.strip() else ""


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    most = min(len(text), len(marker) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(marker[:size])), 0)
