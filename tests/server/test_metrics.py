"""Metrics, read as Prometheus reads them."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanoflow_compiler import EngineDeadError, RequestError
from nanoflow_compiler.server.metric_names import up_to
from server.fake_engine import FakeEngine
from server.live import serving

pytestmark = pytest.mark.anyio


async def samples(api):
    """By name: the value, or a mapping by whatever labels there are beside the model's name."""
    found = {}
    for family in text_string_to_metric_families((await api.get("/metrics")).text):
        assert family.documentation
        for sample in family.samples:
            labels = {**sample.labels}
            if "nanoflow:" in sample.name:
                assert labels.pop("model_name") == "tiny"
            name = sample.name.removeprefix("nanoflow:")
            if labels:
                label = " ".join(value for _, value in sorted(labels.items()))
                found.setdefault(name, {})[label] = sample.value
            else:
                found[name] = sample.value
    return found


async def test_what_the_engine_tells(api):
    api.engine.active = {"a"}
    found = await samples(api)
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (1, 0)
    assert found["kv_cache_usage_perc"] == 0.25
    assert found["cache_config_info"] == {"64 8": 1}
    assert found["num_preemptions_total"] == 5
    assert (found["prefix_cache_queries_total"], found["prefix_cache_hits_total"]) == (70, 30)


async def test_sizes_of_steps_are_a_histogram(api):
    found = await samples(api)
    assert found["iteration_tokens_total_sum"] == 3009
    assert found["iteration_tokens_total_count"] == 4
    buckets = found["iteration_tokens_total_bucket"]
    assert (buckets["1.0"], buckets["8.0"], buckets["16.0"]) == (2, 2, 3)
    assert (buckets["1024.0"], buckets["2048.0"], buckets["+Inf"]) == (3, 4, 4)


async def test_what_requests_leave(api):
    await api.complete("hello", max_tokens=4, n=2)
    stops = ["a", "b", "c", "d", "e", "f"]
    await api.complete("hello", max_tokens=40, stop=stops, seed=1)
    found = await samples(api)
    ends = found["request_success_total"]
    assert (ends["length"] + ends["stop"], ends["abort"], ends["error"]) == (3, 0, 0)
    assert found["prompt_tokens_total"] == found["request_prompt_tokens_sum"] == 10
    assert found["generation_tokens_total"] == found["request_generation_tokens_sum"]
    assert found["request_params_n_sum"] == 3
    assert found["request_params_max_tokens_sum"] == 44
    for name in ("e2e_request_latency", "request_decode_time", "request_inference_time"):
        assert found[f"{name}_seconds_count"] == 3
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time"):
        assert found[f"{name}_seconds_count"] == 2
    assert found["request_max_num_generation_tokens_count"] == 2
    assert found["request_queue_time_seconds_sum"] == 1
    assert found["request_prefill_time_seconds_sum"] == 4
    decode, inference = (found[f"request_{n}_time_seconds_sum"] for n in ("decode", "inference"))
    assert inference == pytest.approx(decode + 3 * 2)
    tokens = found["generation_tokens_total"]
    assert found["inter_token_latency_seconds_count"] == tokens - 3


async def test_a_refused_request_is_no_end_and_a_failed_one_is_an_error(api):
    await api.complete("x" * 3000, status=400)
    assert sum((await samples(api))["request_success_total"].values()) == 0
    for error, status in ((RequestError("no such grammar"), 400), (EngineDeadError("died"), 503)):
        api.engine.generate = failing_after_one(api.engine, error)
        await api.complete("x", max_tokens=9, n=2, status=status)
    found = await samples(api)
    assert found["request_success_total"] == {"abort": 0, "error": 4, "length": 0, "stop": 0}
    assert found["generation_tokens_total"] == 4


def failing_after_one(engine, error):
    async def generate(*args, **options):
        async for output in FakeEngine.generate(engine, *args, **options):
            yield output
            raise error

    return generate


async def test_buckets_of_tokens_end_at_the_length_of_the_model(make_api):
    api = make_api(FakeEngine(max_model_len=300))
    await api.complete("x")
    buckets = (await samples(api))["request_prompt_tokens_bucket"]
    assert [*buckets] == ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "200.0", "+Inf"]
    assert up_to(0) == [1]


async def test_another_prefix(make_api):
    api = make_api(metrics_prefix="vllm")
    await api.complete("x")
    text = (await api.get("/metrics")).text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text
    assert "nanoflow" not in text


def test_a_live_server_tells_how_long_it_took_to_start_and_its_memory():
    with serving(FakeEngine()) as live:
        text = live.get("/metrics").text
    (startup,) = re.findall(r'nanoflow:startup_time_seconds\{model_name="tiny"\} (\S+)', text)
    assert 0 < float(startup) < 10_000
    assert "process_resident_memory_bytes" in text
