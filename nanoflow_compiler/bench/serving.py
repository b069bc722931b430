"""``nanoflow bench serve``: load on a server that runs, and what its users would see."""

import asyncio
import resource
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoflow_compiler.bench.arrivals import arrival_times
from nanoflow_compiler.bench.dataset import BenchRequest, DatasetSettings, Vocabulary
from nanoflow_compiler.bench.garbage import frozen_garbage
from nanoflow_compiler.bench.http import HttpClient
from nanoflow_compiler.bench.load import send_all
from nanoflow_compiler.bench.openai_client import OpenAIClient
from nanoflow_compiler.bench.progress import progress
from nanoflow_compiler.bench.requests import make_requests, with_texts
from nanoflow_compiler.bench.serve_settings import ServeSettings
from nanoflow_compiler.bench.serving_metrics import details, metrics
from nanoflow_compiler.bench.target import Target, find_target
from nanoflow_compiler.errors import NanoflowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["measure_serving"]

FIRST_IDS = 1000
"""Without a tokenizer, prompts are made of as many token ids, which all real models have."""
NUM_SPECIAL_IDS = 3
"""The first of them often have a meaning."""


def measure_serving(
    settings: ServeSettings, *, dataset: DatasetSettings, sampling: dict[str, Any]
) -> dict[str, Any]:
    """The results with vLLM's keys, details of every request included."""
    settings.check()
    dataset.check()
    _allow_connections()
    return asyncio.run(_measure(settings, dataset, sampling))


async def _measure(
    settings: ServeSettings, dataset: DatasetSettings, sampling: dict[str, Any]
) -> dict[str, Any]:
    http = HttpClient(settings.url, headers=settings.headers)
    target = await find_target(
        http,
        model=settings.model,
        served_name=settings.served_model_name,
        patience_s=settings.ready_check_timeout_sec,
    )
    tokenizer_name = None if settings.skip_tokenizer_init else settings.tokenizer or target.root
    requests = _requests(dataset, target, tokenizer_name=tokenizer_name)
    is_open_ended = dataset.name == "sharegpt" and not settings.ignore_eos
    client = OpenAIClient(
        http,
        path=settings.path,
        model=target.name,
        is_chat=settings.backend == "openai-chat",
        fields={**({} if is_open_ended else {"ignore_eos": True}), **sampling, **settings.extra},
    )
    await _warm_up(client, requests[0], settings)
    found = await _run(client, requests, settings, seed=dataset.seed)
    return {
        "backend": settings.backend,
        "model_id": target.name,
        "tokenizer_id": tokenizer_name,
        "num_prompts": len(requests),
        "request_rate": settings.rate_as_json,
        "burstiness": settings.burstiness,
        "max_concurrency": settings.max_concurrency,
        **found,
    }


def _requests(
    dataset: DatasetSettings, target: Target, *, tokenizer_name: str | None
) -> list[BenchRequest]:
    """With texts, as people send them, if there is a tokenizer; else with token ids."""
    if tokenizer_name is None:
        vocabulary = Vocabulary(np.arange(NUM_SPECIAL_IDS, FIRST_IDS))
        return make_requests(
            dataset, vocabulary=vocabulary, tokenizer=None, longest=target.max_model_len
        )
    tokenizer = _load_tokenizer(tokenizer_name)
    vocabulary = Vocabulary.of(tokenizer.vocab_size, tokenizer)
    requests = make_requests(
        dataset, vocabulary=vocabulary, tokenizer=tokenizer, longest=target.max_model_len
    )
    return with_texts(requests, tokenizer=tokenizer, vocabulary=vocabulary, seed=dataset.seed)


def _load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    from nanoflow_compiler.models.load import load_tokenizer

    try:
        return load_tokenizer(name)
    except NanoflowError as error:
        raise NanoflowError(
            f"no tokenizer: {error}. Pass --tokenizer DIRECTORY, or --skip-tokenizer-init"
        ) from error


async def _warm_up(client: OpenAIClient, request: BenchRequest, settings: ServeSettings) -> None:
    """A server that cannot answer the first request would fail all of them."""
    if settings.ready_check_timeout_sec:
        answer = await client.ask(request, request_id="bench-ready")
        if answer.error:
            raise NanoflowError(f"the server fails a first request: {answer.error}")
    await send_all(
        client,
        [request] * settings.num_warmups,
        due_s=[0.0] * settings.num_warmups,
        max_concurrency=settings.max_concurrency,
    )


async def _run(
    client: OpenAIClient, requests: list[BenchRequest], settings: ServeSettings, *, seed: int
) -> dict[str, Any]:
    due_s = arrival_times(
        requests, rate=settings.request_rate, burstiness=settings.burstiness, seed=seed
    )
    with progress("requests", total=len(requests)) as advance, frozen_garbage():
        start = time.perf_counter()
        answers = await send_all(
            client,
            requests,
            due_s=due_s,
            max_concurrency=settings.max_concurrency,
            on_answer=advance,
        )
        duration_s = time.perf_counter() - start
    found = metrics(answers, duration_s=duration_s, settings=settings)
    return {**found, **details(answers)}


def _allow_connections() -> None:
    """As many open files as this user may have: each request is a connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
