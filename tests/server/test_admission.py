"""Who is let in."""

import asyncio

import pytest

from nanoflow_compiler.server.admission import Admission
from nanoflow_compiler.server.errors import ApiError
from server.answers import error_of
from server.fake_engine import FakeEngine
from server.live import until

pytestmark = pytest.mark.anyio


def enter(admission, num=1):
    with admission.reserve(num):
        pass


def assert_full(admission, num=1):
    with pytest.raises(ApiError, match="queue is full") as error:
        enter(admission, num)
    assert error.value.headers["retry-after"]


def test_reservations_and_requests_count_alike():
    admission = Admission(max_reqs=4)
    with admission.open(["a", "b"]), admission.reserve(1):
        assert admission.num_open == 3
        assert_full(admission, 2)
        enter(admission)
    assert (admission.num_open, admission.num_rejected) == (0, 1)


def test_more_than_ever_fit_need_not_come_back():
    with pytest.raises(ApiError, match="fewer prompts") as error:
        enter(Admission(max_reqs=4), 5)
    assert error.value.status_code == 400


def test_prompts_without_a_first_token_may_hold_so_many_tokens():
    admission = Admission(max_reqs=100, max_tokens=10)
    with admission.queued_tokens([6, 3]) as begin:
        enter(admission)
        with admission.queued_tokens([1]):
            assert_full(admission)
        with admission.queued_tokens([5]):
            assert_full(admission)
            begin(0)
            begin(0)
            enter(admission)
    assert admission.num_tokens == 0


async def test_a_long_prompt_that_waits_keeps_others_out_until_it_has_begun(make_api):
    api = make_api(FakeEngine(delay_s=0.05), max_num_queued_tokens=20)
    waiting = asyncio.create_task(api.complete("x" * 30, max_tokens=20))
    await until(lambda: api.engine.active)
    error = error_of(await api.complete("y", status=503))
    assert error["code"] == "queue_full"
    await until(lambda: not api.context.admission.num_tokens)
    await api.complete("y", max_tokens=1)
    assert not waiting.done()
    await waiting


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_crowd_is_refused_before_its_prompts_are_tokenized(make_api, path):
    api = make_api(max_num_queued_reqs=2)
    num_encoded, is_open = 0, asyncio.Event()

    async def encode(*_, **__):
        nonlocal num_encoded
        num_encoded += 1
        await is_open.wait()
        return [5]

    api.context.codec.encode = encode
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    posts = [asyncio.create_task(api.http.post(path, json=body)) for _ in range(10)]
    await until(lambda: sum(post.done() for post in posts) == 8)
    is_open.set()
    answers = await asyncio.gather(*posts)
    assert num_encoded == 2
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [503] * 8
    assert api.context.admission.num_open == 0


async def test_it_says_when_it_is_empty():
    admission = Admission(max_reqs=4)
    await admission.empty()
    with admission.reserve(2):
        waiter = asyncio.create_task(admission.empty())
        with admission.open(["a"]):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiter.done()
    await waiter
