"""From the fields of a request to ``SamplingParams`` of the engine."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.structured import StructuredOutputsParams
from nanoflow_compiler.server.errors import ApiError
from nanoflow_compiler.server.fields import refused
from nanoflow_compiler.server.protocol import GenerationRequest, StructuredOutputs

__all__ = ["make_params", "structured_outputs"]

PASSED = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "prompt_logprobs",
)
"""Fields that mean the same to the engine; a default is not passed, so an engine may lack it."""

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
CONSTRAINTS = ("json", "json_object", "regex", "choice", "grammar", "disable_any_whitespace")


def make_params(
    request: GenerationRequest,
    *,
    defaults: Mapping[str, float],
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    structured: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """400 that names the field where the engine lacks it; ConfigError where a value is bad."""
    wanted = {name: getattr(request, name) for name in PASSED}
    declared = type(request).model_fields
    given = {name: value for name, value in wanted.items() if value != declared[name].default}
    given |= {k: v for k, v in defaults.items() if k not in request.model_fields_set}
    if request.logit_bias:
        given["logit_bias"] = _token_biases(request.logit_bias)
    if structured is None:
        structured = structured_outputs(request)
    if structured:
        given["structured_outputs"] = StructuredOutputsParams(**structured)
    asked = {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    given |= {name: value for name, value in asked.items() if value is not None}
    known = {field.name for field in fields(SamplingParams)}
    if unknown := sorted(given.keys() - known):
        raise refused(unknown[0])
    return SamplingParams(**given, max_tokens=max_tokens)


def structured_outputs(request: GenerationRequest) -> dict[str, Any]:
    """What the text must be, from whichever of the three spellings; empty if anything goes."""
    found = [
        {short: getattr(request, name)} for name, short in GUIDED.items() if getattr(request, name)
    ]
    found += [_from_response_format(request)] if request.response_format else []
    found += [_from_vllm(request.structured_outputs)] if request.structured_outputs else []
    given = [constraint for constraint in found if constraint]
    if len(given) > 1:
        raise ApiError(
            "response_format, structured_outputs and guided_* exclude each other: send one",
            param="structured_outputs",
        )
    return given[0] if given else {}


def _from_response_format(request: GenerationRequest) -> dict[str, Any]:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.json_schema is None:
        raise ApiError("response_format.json_schema is missing", param="response_format")
    return {"json": wanted.json_schema.schema_}


def _from_vllm(wanted: StructuredOutputs) -> dict[str, Any]:
    for name in ("structural_tag", "whitespace_pattern"):
        if (wanted.model_extra or {}).get(name):
            raise refused(f"structured_outputs.{name}")
    given = wanted.model_dump(by_alias=True, exclude_defaults=True)
    return {name: given[name] for name in CONSTRAINTS if name in given}


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    if all(key.isdecimal() and len(key) <= 10 for key in biases):
        return {int(key): bias for key, bias in biases.items()}
    raise ApiError("logit_bias maps token ids to numbers", param="logit_bias")
