"""Request bodies: fields of OpenAI and vLLM that all generating endpoints share, and ``/v1/completions``."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "ApiModel",
    "CompletionRequest",
    "Count",
    "GenerationRequest",
    "StreamOptions",
    "StructuredOutputs",
    "TokenIds",
]

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
"""As all lists here that may be long: a million bad entries are one error, not a million."""
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Stop = Annotated[list[str], Field(max_length=128)]


class ApiModel(BaseModel):
    """Fields that we don't know are kept, for ``fields.refuse_unsupported`` to look at."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A null means the default: many clients send all that they know of."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(ApiModel):
    """Whether a stream tells the number of tokens: at its end, or with each chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(ApiModel):
    """The schema under ``response_format``; its name is only for people."""

    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)


class ResponseFormat(ApiModel):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StructuredOutputs(ApiModel):
    """vLLM's way to say what the text must be: one of these."""

    json_: str | dict[str, Any] | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False


class GenerationRequest(ApiModel):
    """What completions and chats have in common; defaults change nothing."""

    model: str = ""
    request_id: str = ""

    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1

    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 0
    min_p: float = 0.0
    seed: Seed | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] | None = None
    bad_words: Texts | None = None
    allowed_token_ids: TokenIds | None = None

    stop: str | Stop | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Count = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    truncation_side: Literal["left", "right"] = "left"
    prompt_logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: Count = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    best_of: int | None = None
    suffix: str = ""
    add_special_tokens: bool = True
