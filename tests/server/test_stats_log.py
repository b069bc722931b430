"""The line of every ten seconds."""

import asyncio
import time

import pytest

from nanoflow_compiler.server import stats_log
from nanoflow_compiler.server.metrics import Metrics
from nanoflow_compiler.server.stats_log import StatsLog
from server.fake_engine import FakeEngine, Stats
from server.live import serving, wait_until

pytestmark = pytest.mark.anyio


def test_what_it_says(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    metrics = Metrics(model_name="tiny", max_model_len=9, block_size=64)
    log = StatsLog(FakeEngine(), metrics)
    now = 110.0
    assert log.line(Stats(num_running=0, num_cache_queries=10, num_cache_hits=0)) is None
    metrics.counters["prompt_tokens"].inc(100)
    metrics.counters["generation_tokens"].inc(25)
    now = 120.0
    stats = Stats(3, num_waiting=4, num_used_blocks=2, num_cache_queries=30, num_cache_hits=15)
    assert log.line(stats) == (
        "3 running, 4 waiting, 10.0 prompt tokens/s, 2.5 generated tokens/s, "
        "KV cache 25.0% used, prefix cache 75.0% hit"
    )
    now = 130.0
    still = Stats(1, num_cache_queries=30, num_cache_hits=15)
    assert "0.0 prompt tokens/s" in log.line(still)
    assert log.line(Stats(0, num_cache_queries=30, num_cache_hits=15)) is None


@pytest.mark.parametrize("is_disabled", [False, True])
def test_a_busy_server_says_it_and_one_whose_engine_is_dead_goes_on(
    monkeypatch, caplog, is_disabled
):
    monkeypatch.setattr(stats_log, "INTERVAL_S", 0.05)
    caplog.set_level("INFO", "nanoflow_compiler.server.stats_log")
    with serving(FakeEngine(), disable_log_stats=is_disabled) as live:
        live.engine.errored = True
        time.sleep(0.1)
        live.engine.errored = False
        live.engine.active.add("one")
        if is_disabled:
            time.sleep(0.2)
        else:
            wait_until(lambda: "1 running" in caplog.text)
        live.engine.active.clear()
    assert ("1 running" in caplog.text) is not is_disabled
    assert "Task was destroyed" not in caplog.text


async def test_it_ends_with_the_app():
    task = asyncio.create_task(
        StatsLog(FakeEngine(), Metrics(model_name="tiny", max_model_len=9, block_size=64)).run()
    )
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
