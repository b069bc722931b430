"""Every field of OpenAI's and vLLM's requests is declared, refused by name, or known to be harmless."""

from typing import get_type_hints

import pytest
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming as OpenAIChat,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as OpenAICompletion,
)

from nanoflow_compiler.server.fields import HARMLESS, REFUSED
from nanoflow_compiler.server.protocol import CompletionRequest
from nanoflow_compiler.server.protocol_chat import ChatRequest
from server.answers import error_of

pytestmark = pytest.mark.anyio

# As of vLLM 0.33, with names that older versions had.
VLLM = """
    add_special_tokens allowed_token_ids bad_words cache_salt data_parallel_rank early_stopping
    ec_transfer_params guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
    guided_whitespace_pattern ignore_eos include_stop_str_in_output kv_transfer_params
    length_penalty logits_processors logprob_token_ids min_p min_tokens priority prompt_logprobs
    repetition_detection repetition_penalty request_id response_format return_mm_kwargs
    return_token_ids return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start
    session_id skip_special_tokens spaces_between_special_tokens stop_token_ids stream_interval
    structured_outputs thinking_token_budget top_k truncate_prompt_tokens truncation_side
    use_beam_search vllm_xargs watermarking
"""
VLLM_CHAT = """
    add_generation_prompt chat_template chat_template_kwargs continue_final_message documents
    include_reasoning media_io_kwargs mm_processor_kwargs reasoning_effort return_prompt_text
"""


@pytest.mark.parametrize(
    ("request_type", "names"),
    [
        (CompletionRequest, get_type_hints(OpenAICompletion).keys()),
        (CompletionRequest, [*VLLM.split(), "prompt_embeds"]),
        (ChatRequest, get_type_hints(OpenAIChat).keys()),
        (ChatRequest, [*VLLM.split(), *VLLM_CHAT.split()]),
    ],
)
def test_what_becomes_of_a_field_is_decided(request_type, names):
    declared = request_type.model_fields.keys()
    assert set(names) <= declared | REFUSED.keys() | HARMLESS
    assert not declared & REFUSED.keys()
    assert not declared & HARMLESS
    assert not REFUSED.keys() & HARMLESS


@pytest.mark.parametrize("name", sorted(REFUSED))
async def test_refused_fields_are_named_unless_they_change_nothing(api, name):
    for value in (None, *REFUSED[name]):
        await api.complete(**{name: value})
        await api.chat(**{name: value})
    for call in (api.complete, api.chat):
        error = error_of(await call(**{name: {"some": "value"}}, status=400))
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


async def test_harmless_fields_pass(api):
    fields = {name: {"some": ["value"]} for name in HARMLESS}
    await api.complete(**fields)
    await api.chat(**fields)


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("best_of", 4, "best_of"),
        ("suffix", "end", "suffix"),
        ("bad_words", ["x"], "bad_words"),
        ("spaces_between_special_tokens", False, "spaces_between_special_tokens"),
        ("structured_outputs", {"structural_tag": "x"}, "structured_outputs.structural_tag"),
        ("structured_outputs", {"regex": "a", "whitespace_pattern": " "}, None),
    ],
)
async def test_declared_fields_without_support_are_named(api, name, value, param):
    error = error_of(await api.complete(**{name: value}, status=400))
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == param or param is None
    assert name in error["message"]


async def test_nulls_and_unknown_fields_pass(api):
    for names, call in ((CompletionRequest, api.complete), (ChatRequest, api.chat)):
        optional = names.model_fields.keys() - {"prompt", "messages"}
        await call(**dict.fromkeys(optional), no_such_field={"deep": [1]})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("prompt", {"a": 1}, "a list of token ids"),
        ("prompt", [1, "a"], "a list of token ids"),
        ("stop", 5, "at most 128"),
        ("temperature", "hot", "valid number"),
    ],
)
async def test_a_value_of_the_wrong_type_is_one_clear_line(api, name, value, words):
    error = error_of(await api.complete(**{"prompt": "x"} | {name: value}, status=400))
    assert error["param"] == name
    assert words in error["message"]


async def test_a_tool_choice_that_does_not_exist(api):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for choice in ("any", {"type": "allowed_tools", "allowed_tools": {}}):
        error = error_of(await api.chat(tools=tools, tool_choice=choice, status=400))
        assert '"required"' in error["message"]
