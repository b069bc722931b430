"""An engine in a process of its own: the same answers, and clear words whoever dies."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanoflow_compiler.engine.async_engine import AsyncEngine
from nanoflow_compiler.engine.engine_config import EngineConfig
from nanoflow_compiler.engine.engine_process import EngineProcess
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.process import ProcessLink
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.spec import EngineSpec
from nanoflow_compiler.errors import (
    ConfigError,
    EngineDeadError,
    ModelLoadError,
    PromptTooLongError,
)
from tiny_models import llama
from tiny_tokenizers import byte_tokenizer

PROMPT = [5, 6, 7, 8]
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, logprobs=1, prompt_logprobs=0, seed=2**70)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Of a tiny model on disk."""
    folder = tmp_path_factory.mktemp("model")
    model = llama(vocab_size=300, num_hidden_layers=1)
    model.generation_config.do_sample, model.generation_config.top_k = True, 7
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32)
    return EngineSpec(model=str(folder), config=config, enforce_eager=True)


async def last(engine, params, *, request_id="a", prompt=PROMPT):
    async for output in engine.generate(
        {"prompt_token_ids": prompt}, params, request_id=request_id
    ):
        last = output
    return last


async def first(engine, params, *, request_id):
    """Begins an answer, and returns what is left of it."""
    answer = engine.generate({"prompt_token_ids": PROMPT}, params, request_id=request_id)
    await anext(answer)
    return answer


async def until(is_so):
    while not is_so():  # noqa: ASYNC110 - there is nothing to wait for
        await asyncio.sleep(0.01)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), timeout=60))


def is_there(pid):
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pid):
    deadline = time.monotonic() + 30
    while is_there(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_life(spec):
    """Answers as an engine here gives them, callers who leave, signals of a terminal, an end."""
    with LLM(spec.model, enforce_eager=True) as llm:
        expected = llm.generate({"prompt_token_ids": PROMPT}, SHORT)[0].outputs[0]

    async def scenario():
        async with AsyncEngine.launch(spec) as engine:
            pid = engine.link.pid
            assert engine.sampling_defaults == {"top_k": 7}
            outputs = await asyncio.gather(
                *(
                    last(engine, SHORT, prompt=np.array(PROMPT), request_id=str(number))
                    for number in range(8)
                )
            )
            assert {output.outputs[0].token_ids for output in outputs} == {expected.token_ids}
            assert outputs[0].outputs[0].text == expected.text
            assert [each.token_ids[0] for each in outputs[0].prompt_logprobs[1:]] == PROMPT[1:]
            assert outputs[0].times.prefill_s > 0
            with pytest.raises(PromptTooLongError):
                await last(engine, SHORT, prompt=[5] * 10_000)
            await engine.abort("nobody")
            for answer in [await first(engine, LONG, request_id=str(n)) for n in range(6)]:
                await answer.aclose()
            await until(lambda: engine._stats.num_used_blocks == 0)
            stats = await engine.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            for left_to_parent in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, left_to_parent)
            assert (await last(engine, SHORT)).finished
            return pid

    wait_until_gone(run(scenario))


def test_a_process_that_was_started_before(spec):
    with EngineProcess.early() as early:
        link = ProcessLink(spec, early=early)
        assert link.pid == early.process.pid
        link.kill()
    wait_until_gone(link.pid)


def test_a_process_that_nobody_told_anything_ends_without_a_word(capfd):
    started = EngineProcess.start()
    started.lifeline.close()
    assert started.process.wait(30) == 1
    assert capfd.readouterr().err == ""


def test_a_killed_engine_ends_every_answer(spec):
    async def scenario():
        async with AsyncEngine.launch(spec) as engine:
            answers = [await first(engine, LONG, request_id=str(n)) for n in range(3)]
            os.kill(engine.link.pid, signal.SIGKILL)
            for answer in answers:
                with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
                    async for _ in answer:
                        pass
            assert engine.errored
            with pytest.raises(EngineDeadError):
                await last(engine, SHORT)
            with pytest.raises(EngineDeadError):
                await engine.stats()

    run(scenario)


def test_a_killed_engine_is_started_again(spec):
    async def scenario():
        async with AsyncEngine.launch(spec, max_restarts=1) as engine:
            before = await last(engine, SHORT)
            answer = await first(engine, LONG, request_id="b")
            os.kill(engine.link.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError):
                async for _ in answer:
                    pass
            await until(lambda: not engine.errored)
            after = await last(engine, SHORT)
            assert after.outputs[0].token_ids == before.outputs[0].token_ids
            os.kill(engine.link.pid, signal.SIGKILL)
            await until(lambda: engine.errored)
            await asyncio.sleep(0.2)
            assert engine.errored

    run(scenario)


def test_an_engine_that_fails_says_why(spec):
    async def scenario():
        async with AsyncEngine.launch(spec) as engine:
            answer = await first(engine, LONG, request_id="a")
            engine.link._commands.send(b"no command")
            with pytest.raises(EngineDeadError, match=r"the engine stopped: .*Error: "):
                async for _ in answer:
                    pass

    run(scenario)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "/nowhere/at/all"}, ModelLoadError, "/nowhere/at/all"),
        ({"config": EngineConfig(max_model_len=10**6)}, ConfigError, "max_model_len=1000000"),
    ],
)
def test_what_stands_against_a_start_is_told_here(spec, changes, error, message):
    settings = {"model": spec.model, "enforce_eager": True} | changes
    with pytest.raises(error, match=message):
        AsyncEngine.launch(EngineSpec(**settings))


def test_a_tokenizer_of_another_model(spec, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert replace(spec, tokenizer=str(tmp_path)).build().tokenizer.vocab_size == 259
    with pytest.raises(ModelLoadError):
        replace(spec, tokenizer=str(tmp_path / "none")).build()


def test_bad_options_cost_no_process(spec):
    with pytest.raises(ConfigError, match="partz"):
        EngineSpec(model=spec.model, options={"partz": 2})


PARENT = """
import asyncio, sys, time
from nanoflow_compiler.engine.async_engine import AsyncEngine
from nanoflow_compiler.engine.spec import EngineSpec

async def main():
    async with AsyncEngine.launch(EngineSpec(model=sys.argv[1], enforce_eager=True)) as engine:
        print(engine.link.pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_engine_ends_with_its_parent(spec):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, spec.model], stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        assert is_there(pid)
        parent.kill()
    wait_until_gone(pid)
