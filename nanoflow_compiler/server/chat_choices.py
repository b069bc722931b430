"""One completion of a chat, written at once or in pieces."""

from msgspec import UNSET

from nanoflow_compiler.server.chat_call import ChatCall
from nanoflow_compiler.server.deltas import Delta, DeltaCursor
from nanoflow_compiler.server.engine_client import Completion
from nanoflow_compiler.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessageOut,
    FunctionOut,
    ToolCallOut,
)
from nanoflow_compiler.server.tool_calls import ParsedCall, new_call_id

__all__ = ["ChatChoiceWriter"]


class ChatChoiceWriter:
    """Turns text into content and tool calls."""

    def __init__(self, call: ChatCall) -> None:
        self._call = call
        self._cursor = DeltaCursor(call.job.params, interval=call.context.interval(call.body))
        self._text = ""
        self._num_content = 0
        self._num_calls = 0

    def first(self, index: int) -> ChatChunkChoice:
        """Says who speaks."""
        return ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))

    def advance(self, completion: Completion) -> ChatChunkChoice | None:
        """None where there is nothing new."""
        delta = self._cursor.advance(completion)
        if delta is None:
            return None
        content, calls = self._read(delta)
        return ChatChunkChoice(
            index=completion.index,
            delta=ChatDelta(content=content, tool_calls=calls or UNSET),
            logprobs=self._logprobs(delta),
            finish_reason=self._finish_reason(delta),
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._call.body.return_token_ids else UNSET,
        )

    def whole(self, completion: Completion) -> ChatChoice:
        delta = self._cursor.advance(completion)
        assert delta is not None
        content, calls = self._read(delta)
        listed = [ToolCallOut(id=one.id, type=one.type, function=one.function) for one in calls]
        return ChatChoice(
            index=completion.index,
            message=ChatMessageOut(
                content=None if calls and not content else content, tool_calls=listed or UNSET
            ),
            logprobs=self._logprobs(delta),
            finish_reason=self._finish_reason(delta),
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._call.body.return_token_ids else UNSET,
        )

    def _read(self, delta: Delta) -> tuple[str, list[ToolCallOut]]:
        """New content, and calls that are complete (of a named function: the next piece of it)."""
        if name := self._call.named_function:
            return "", [self._piece_of_call(name, delta.text)]
        parser = self._call.parser
        if parser is None:
            return delta.text, []
        self._text += delta.text
        parsed = parser.parse(self._text, is_finished=delta.finish_reason is not None)
        content = parsed.content[self._num_content :]
        self._num_content = len(parsed.content)
        most = None if self._call.body.parallel_tool_calls else 1
        calls = [
            _whole_call(index, call)
            for index, call in enumerate(parsed.calls[:most])
            if index >= self._num_calls
        ]
        self._num_calls += len(calls)
        return content, calls

    def _piece_of_call(self, name: str, arguments: str) -> ToolCallOut:
        self._num_calls += 1
        if self._num_calls > 1:
            return ToolCallOut(index=0, function=FunctionOut(arguments=arguments))
        return ToolCallOut(
            index=0, id=new_call_id(), type="function", function=FunctionOut(name, arguments)
        )

    def _finish_reason(self, delta: Delta) -> str | None:
        # A named function was the client's decision, not the model's: that ends with "stop".
        called = self._num_calls and not self._call.named_function
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return self._call.writer.chat(delta.logprobs) if self._call.body.logprobs else None


def _whole_call(index: int, call: ParsedCall) -> ToolCallOut:
    return ToolCallOut(
        index=index,
        id=new_call_id(),
        type="function",
        function=FunctionOut(call.name, call.arguments),
    )
