"""Sends requests when they are due, and waits for all answers."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from uuid import uuid4

from nanoflow_compiler.bench.dataset import BenchRequest
from nanoflow_compiler.bench.openai_client import Answer, OpenAIClient

__all__ = ["send_all"]


async def send_all(
    client: OpenAIClient,
    requests: Sequence[BenchRequest],
    *,
    due_s: Sequence[float],
    max_concurrency: int | None,
    on_answer: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """The answers in the order of the requests, which is that of the times at which they are due."""
    limit = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    run = uuid4().hex[:8]

    async def ask(index: int, request: BenchRequest) -> Answer:
        async with limit:
            answer = await client.ask(request, request_id=f"bench-{run}-{index}")
        on_answer(1)
        return answer

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, (request, due) in enumerate(zip(requests, due_s, strict=True)):
            if (wait_s := start + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(ask(index, request)))
    return [task.result() for task in tasks]
