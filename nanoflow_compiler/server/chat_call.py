"""A chat that is ready to run: its prompt, its sampling, and what its tools ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, UnsetType, structs

from nanoflow_compiler.server.chat_prompt import ChatPrompt
from nanoflow_compiler.server.context import Job, ServerContext
from nanoflow_compiler.server.errors import ApiError
from nanoflow_compiler.server.fields import refuse_unsupported, refused
from nanoflow_compiler.server.logprobs import LogprobWriter
from nanoflow_compiler.server.prompts import chat_tokens, truncated
from nanoflow_compiler.server.protocol_chat import ChatRequest, Tool, ToolChoice
from nanoflow_compiler.server.responses import ChatChunk, ChatChunkChoice, Usage
from nanoflow_compiler.server.sampling import make_params, structured_outputs
from nanoflow_compiler.server.tool_calls import RequiredParser, ToolParser

__all__ = ["ChatCall", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """One request to ``/v1/chat/completions``."""

    context: ServerContext
    body: ChatRequest
    model: str
    job: Job
    parser: ToolParser | None
    """Finds tool calls in the text; None where there can be none."""
    writer: LogprobWriter

    @property
    def named_function(self) -> str | None:
        """The function that must be called: the whole text is its arguments."""
        choice = self.body.tool_choice
        return choice.function.name if isinstance(choice, ToolChoice) else None

    def chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType = UNSET) -> ChatChunk:
        return ChatChunk(
            id=self.job.request_id,
            created=self.job.created,
            model=self.model,
            choices=choices,
            usage=usage,
        )

    def first_chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        """Says who speaks, and what was read if the client asked for that."""
        chunk = self.chunk([choice])
        if not self.body.return_token_ids or choice.index:
            return chunk
        return structs.replace(chunk, prompt_token_ids=self.job.prompts[0])


async def prepare(context: ServerContext, body: ChatRequest, request_id: str) -> ChatCall:
    """400 or 404 where the request cannot run."""
    _check(body)
    _check_tools(context, body)
    model = context.check_model(body.model)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = make_params(
        body,
        defaults=context.sampling_defaults,
        max_tokens=limit,
        logprobs=body.top_logprobs if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        structured=_structured(body),
    )
    tools = [] if body.tool_choice == "none" else body.tools or []
    with context.admission.reserve(params.n):
        tokens = await chat_tokens(
            context, _chat_prompt(body, tools), add_special_tokens=body.add_special_tokens
        )
    tokens = truncated(tokens, body, max_tokens=limit, most=context.engine.max_model_len)
    return ChatCall(
        context=context,
        body=body,
        model=model,
        job=Job(request_id=request_id, prompts=[tokens], params=params),
        parser=_parser(context, body) if tools else None,
        writer=LogprobWriter(
            context.codec,
            num_top=body.top_logprobs,
            as_token_ids=body.return_tokens_as_token_ids,
        ),
    )


def _check(body: ChatRequest) -> None:
    extra = body.model_extra or {}
    refuse_unsupported(extra)
    if extra.get("echo"):
        raise refused("echo")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")


def _check_tools(context: ServerContext, body: ChatRequest) -> None:
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        raise ApiError("tool_choice needs tools to choose from", param="tool_choice")
    if body.tools and body.tool_choice in (None, "auto") and context.tool_parser is None:
        raise ApiError(
            "this server does not know how the model writes tool calls: start it with "
            "--tool-call-parser hermes or llama3_json, or send tool_choice required or none",
            param="tools",
            code="unsupported_parameter",
        )


def _chat_prompt(body: ChatRequest, tools: Sequence[Tool]) -> ChatPrompt:
    return ChatPrompt(
        messages=body.messages,
        tools=tools,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=_effort(body) | (body.chat_template_kwargs or {}),
    )


def _effort(body: ChatRequest) -> dict[str, Any]:
    """Under the names that templates of reasoning models know; to others they are nothing."""
    effort = body.reasoning_effort
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"} if effort else {}


def _parser(context: ServerContext, body: ChatRequest) -> ToolParser | None:
    if isinstance(body.tool_choice, ToolChoice):
        return None
    return RequiredParser() if body.tool_choice == "required" else context.tool_parser


def _structured(body: ChatRequest) -> dict[str, Any]:
    """A choice that must be made is a grammar; it takes the place of ``response_format``."""
    wanted = structured_outputs(body)
    if body.tool_choice in (None, "none", "auto"):
        return wanted
    if wanted:
        raise ApiError(
            "tool_choice and response_format exclude each other: send one", param="tool_choice"
        )
    tools = body.tools or []
    if isinstance(body.tool_choice, ToolChoice):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
        if not tools:
            raise ApiError(f"tool_choice names {name!r}, which tools lack", param="tool_choice")
        return {"json": _parameters(tools[0]), "disable_any_whitespace": True}
    calls = {"type": "array", "minItems": 1, "items": _any_call(tools)}
    calls |= {} if body.parallel_tool_calls else {"maxItems": 1}
    return {"json": calls, "disable_any_whitespace": True}


def _any_call(tools: Sequence[Tool]) -> dict[str, Any]:
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [tool.function.name]},
                    "parameters": _parameters(tool),
                },
                "required": ["name", "parameters"],
            }
            for tool in tools
        ]
    }


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}
