"""Many callers at once: each gets its answer, leaves when it likes, and hears when the engine dies."""

import asyncio
import threading

import pytest

from nanoflow_compiler.engine.async_engine import AsyncEngine
from nanoflow_compiler.engine.limits import RequestLimits
from nanoflow_compiler.engine.link import ThreadLink
from nanoflow_compiler.engine.messages import EngineRequest
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.structured import StructuredOutputsParams
from nanoflow_compiler.errors import (
    EmptyPromptError,
    EngineClosedError,
    EngineDeadError,
    RequestError,
)
from stub_device import alone, make_core
from tiny_tokenizers import byte_tokenizer

LONG = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


def run(scenario, **settings):
    """``scenario(engine)`` in an open engine, which afterwards holds nothing."""

    async def main():
        link = ThreadLink(make_core(num_blocks=60, **settings))
        async with AsyncEngine(link, model_name="stub", tokenizer=byte_tokenizer()) as engine:
            result = await asyncio.wait_for(scenario(engine), timeout=30)
            await settled(engine)
        assert not link._thread.is_alive()
        return result

    return asyncio.run(main())


async def settled(engine):
    """Nothing runs, nothing waits, every block is free."""
    while not engine.errored and (  # noqa: ASYNC110 - there is nothing to wait for
        engine.link.core.has_requests or not engine.link._commands.empty() or engine._streams
    ):
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)  # for the last event
    if not engine.errored:
        stats = await engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)


async def last(engine, prompt, params, *, request_id):
    """The last of the outputs, which only grow."""
    output, known = None, 0
    async for output in engine.generate(
        {"prompt_token_ids": prompt}, params, request_id=request_id
    ):
        assert len(output.outputs[0].token_ids) >= known
        known = len(output.outputs[0].token_ids)
    assert output.finished
    return output


def expected_tokens(prompt, params):
    request = EngineRequest(key=1, request_id="", prompt_token_ids=prompt, params=params, group=1)
    return tuple(alone(request, most=40)[0])


def test_answers_under_load_are_those_alone():
    prompts = [[number % 40 + 1, 7, number % 11] for number in range(60)]

    async def scenario(engine):
        return await asyncio.gather(
            *(last(engine, p, LONG, request_id=str(i)) for i, p in enumerate(prompts))
        )

    outputs = run(scenario)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == expected_tokens(prompt, LONG)
        assert output.outputs[0].finish_reason == "length"


def test_several_completions_end_together():
    async def scenario(engine):
        params = SamplingParams(n=3, temperature=0, max_tokens=4, ignore_eos=True)
        return await last(engine, [5, 6], params, request_id="a")

    output = run(scenario)
    assert [each.index for each in output.outputs] == [0, 1, 2]
    assert all(len(each.token_ids) == 4 for each in output.outputs)


def test_leaving_early_aborts():
    async def scenario(engine):
        answer = engine.generate({"prompt_token_ids": [5, 6]}, LONG, request_id="a")
        async for _ in answer:
            break
        await answer.aclose()
        await settled(engine)

    run(scenario)


def test_a_cancelled_caller_aborts():
    async def scenario(engine):
        held = hold(engine)
        task = asyncio.ensure_future(last(engine, [5, 6], LONG, request_id="a"))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.set()
        await settled(engine)

    run(scenario)


def test_abort_by_name():
    async def scenario(engine):
        held = hold(engine)
        task = asyncio.ensure_future(last(engine, [5, 6], LONG, request_id="a"))
        await asyncio.sleep(0.01)
        await engine.abort("a")
        await engine.abort("unknown")
        held.set()
        return await task

    output = run(scenario)
    assert output.outputs[0].finish_reason == "abort"


def hold(engine):
    """Steps wait until the event that is returned is set."""
    event, step = threading.Event(), engine.link.core.step

    def held():
        event.wait(10)
        return step()

    engine.link.core.step = held
    return event


def test_refusals_come_before_the_first_output():
    async def scenario(engine):
        with pytest.raises(EmptyPromptError):
            await last(engine, [], LONG, request_id="a")
        held = hold(engine)
        task = asyncio.ensure_future(last(engine, [5], LONG, request_id="b"))
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="request id 'b' is in use"):
            await last(engine, [5], LONG, request_id="b")
        held.set()
        await task

    run(scenario)


def test_when_the_engine_dies_every_caller_hears_it():
    async def scenario(engine):
        def fail():
            raise RuntimeError("the device is gone")

        engine.link.core.step = fail
        tasks = [
            asyncio.ensure_future(last(engine, [5], LONG, request_id=str(i))) for i in range(3)
        ]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
            assert "the device is gone" in str(result)
        assert engine.errored
        assert not engine.is_running
        with pytest.raises(EngineDeadError):
            await last(engine, [5], LONG, request_id="x")
        with pytest.raises(EngineDeadError):
            await engine.stats()

    run(scenario)


def test_a_request_that_fails_inside_is_refused():
    async def scenario(engine):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="no"))
        with pytest.raises(RequestError, match="no cannot be compiled"):
            await last(engine, [5, 6], params, request_id="a")

    run(scenario)


def test_a_request_that_nobody_checked_ends_alone(monkeypatch):
    monkeypatch.setattr(RequestLimits, "check", checked_twice(RequestLimits.check))

    async def scenario(engine):
        with pytest.raises(RequestError, match="no tokens"):
            await last(engine, [], LONG, request_id="a")
        assert (await last(engine, [5], LONG, request_id="b")).finished

    run(scenario)


def checked_twice(check):
    """Passes everything the first time, as a client would that does not check."""
    seen = set()

    def second(limits, request):
        if request.key in seen:
            return check(limits, request)
        seen.add(request.key)
        return 0

    return second


def test_a_closed_engine_refuses():
    async def main():
        engine = AsyncEngine(ThreadLink(make_core()), model_name="stub")
        with pytest.raises(EngineClosedError):
            await last(engine, [5], LONG, request_id="a")

    asyncio.run(main())
