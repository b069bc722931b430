"""The benchmark of servers, against a live one without a model."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from nanoflow_compiler.bench.arrivals import arrival_times
from nanoflow_compiler.bench.dataset import BenchRequest, DatasetSettings
from nanoflow_compiler.bench.openai_client import Answer
from nanoflow_compiler.bench.serve_settings import ServeSettings
from nanoflow_compiler.bench.serving import measure_serving
from nanoflow_compiler.bench.serving_metrics import metrics, table
from nanoflow_compiler.cli import app
from nanoflow_compiler.errors import ConfigError, NanoflowError
from server.fake_engine import FakeEngine
from server.live import serving
from tiny_tokenizers import byte_tokenizer

DATASET = DatasetSettings(num_prompts=6, input_len=20, output_len=5)


@pytest.fixture(scope="module")
def live():
    with serving(FakeEngine(delay_s=0.002), api_keys=("secret",)) as live:
        yield live


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "config.json").write_text("{}")
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def measure(live, *, dataset=DATASET, sampling=None, **settings):
    given = {"base_url": live.url, "api_key": "secret"} | settings
    return measure_serving(ServeSettings(**given), dataset=dataset, sampling=sampling or {})


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_every_token_is_counted(live, tokenizer, backend):
    found = measure(live, tokenizer=tokenizer, backend=backend, num_warmups=2)
    assert (found["completed"], found["failed"]) == (6, 0)
    assert found["total_output_tokens"] == 30
    assert [len(itls) for itls in found["itls"]] == [4] * 6
    assert found["model_id"] == "tiny"
    for request in range(6):
        since_first = found["latencies"][request] - found["ttfts"][request]
        assert since_first == pytest.approx(sum(found["itls"][request]))
    assert found["output_throughput"] == pytest.approx(30 / found["duration"])


def test_prompts_are_texts_of_the_length_that_was_asked_for(live, tokenizer):
    live.engine.seen.clear()
    found = measure(live, tokenizer=tokenizer)
    assert found["total_input_tokens"] == 120
    assert {len(tokens) for _, tokens, _ in live.engine.seen} == {20}


def test_prompts_are_token_ids_without_a_tokenizer(live):
    live.engine.seen.clear()
    extra = {"sampling": {"temperature": 0.5}, "extra_body": '{"top_k": 7}'}
    found = measure(live, skip_tokenizer_init=True, ready_check_timeout_sec=0, **extra)
    assert found["tokenizer_id"] is None
    assert len(live.engine.seen) == 6
    for _, tokens, params in live.engine.seen:
        assert len(tokens) == 20
        assert params.ignore_eos
        assert (params.max_tokens, params.temperature, params.top_k) == (5, 0.5, 7)


def test_requests_wait_for_those_before_them(live):
    found = measure(live, skip_tokenizer_init=True, max_concurrency=2)
    assert found["max_concurrent_requests"] == 2
    assert found["completed"] == 6


def test_requests_come_when_they_are_due(live):
    found = measure(live, skip_tokenizer_init=True, request_rate=100.0, burstiness=1e9)
    assert found["duration"] > 0.06  # that is when the last of them is due
    assert found["request_rate"] == 100


def test_failures_are_counted_and_told(live):
    found = measure(
        live,
        skip_tokenizer_init=True,
        ready_check_timeout_sec=0,
        model="tiny",
        extra_body='{"n": 0}',
    )
    assert (found["completed"], found["failed"]) == (0, 6)
    assert all(error.startswith("status 400") for error in found["errors"])
    assert found["mean_ttft_ms"] is None


def test_a_first_request_that_fails_ends_the_run(live):
    with pytest.raises(NanoflowError, match="fails a first request: status 400"):
        measure(live, skip_tokenizer_init=True, extra_body='{"n": 0}')


def test_a_key_that_is_wrong(live):
    with pytest.raises(NanoflowError, match="401"):
        measure(live, skip_tokenizer_init=True, api_key="other")


def test_a_server_that_is_not_there():
    settings = ServeSettings(port=1, ready_check_timeout_sec=0)
    with pytest.raises(NanoflowError, match="cannot be reached"):
        measure_serving(settings, dataset=DATASET, sampling={})


def test_a_model_without_a_tokenizer(live):
    with pytest.raises(NanoflowError, match=r"no tokenizer: .*--skip-tokenizer-init"):
        measure(live)


@pytest.mark.parametrize(
    "settings",
    [
        {"request_rate": 0.0},
        {"burstiness": -1.0},
        {"percentile_metrics": "ttft,tttf"},
        {"metric_percentiles": "99,x"},
        {"metric_percentiles": "101"},
        {"goodput": ["itl:3"]},
        {"goodput": ["ttft"]},
        {"header": ["x"]},
        {"extra_body": "[1]"},
        {"extra_body": "{"},
        {"backend": "openai-chat", "skip_tokenizer_init": True},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(ConfigError):
        ServeSettings(**settings).check()


def answer(start_s, *times_s, error=""):
    """Tokens came at these times after the start."""
    return Answer(
        prompt_len=10,
        start_s=start_s,
        ttft_s=times_s[0],
        itls_s=np.diff(times_s).tolist(),
        latency_s=times_s[-1],
        output_len=len(times_s),
        error=error,
    )


def test_metrics_of_three_answers():
    answers = [
        answer(0.0, 0.1, 0.2, 0.4),
        answer(0.5, 0.3),
        answer(0.0, 9.0, error="lost"),
    ]
    settings = ServeSettings(
        percentile_metrics="ttft,tpot,itl,e2el",
        metric_percentiles="50,99.9",
        goodput=["ttft:200 tpot:151", "e2el:1000"],
    )
    found = metrics(answers, duration_s=2.0, settings=settings)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 4)
    assert (found["request_throughput"], found["output_throughput"]) == (1.0, 2.0)
    assert found["total_token_throughput"] == 12.0
    assert found["request_goodput"] == 0.5
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx(150)
    assert found["p50_itl_ms"] == pytest.approx(150)
    assert found["p99.9_e2el_ms"] == pytest.approx(400, rel=1e-3)
    assert found["max_concurrent_requests"] == 1
    assert found["max_output_tokens_per_s"] == 4
    lines = list(table(found, settings))
    assert lines[1].split() == ["Successful", "requests:", "2"]
    assert "P99.9 E2EL (ms):" in "\n".join(lines)
    assert {len(line) for line in lines if line[0] in "=-"} == {50}


def test_peak_counts_those_that_are_there_together():
    answers = [answer(0.0, 0.5), answer(0.4, 0.5), answer(0.5, 0.1), answer(0.95, 0.1)]
    found = metrics(answers, duration_s=1.0, settings=ServeSettings())
    assert found["max_concurrent_requests"] == 2


def requests(*arrivals_s):
    return [BenchRequest(prompt_token_ids=[1], output_len=1, arrival_s=at) for at in arrivals_s]


def test_arrivals_without_a_rate_are_those_of_the_dataset():
    due = arrival_times(requests(0.0, 1.5, None), rate=math.inf, burstiness=1, seed=0)
    assert due == [0.0, 1.5, 0.0]


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 20.0])
def test_arrivals_keep_the_rate_and_the_spread(burstiness):
    due = arrival_times(requests(*[None] * 4000), rate=10, burstiness=burstiness, seed=0)
    gaps = np.diff(due)
    assert due[-1] == pytest.approx(400)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.1)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def test_command_prints_the_table_and_writes_the_file(live, tmp_path):
    flags = f"--base-url {live.url} --api-key secret --skip-tokenizer-init --num-prompts 3"
    flags += f" --input-len 4 --output-len 2 --save-result --result-dir {tmp_path}"
    result = run(*flags.split(), "--result-filename", "out.json")
    assert result.exit_code == 0, result.output
    assert "============ Serving Benchmark Result ============" in result.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["completed"] == 3
    assert report["total_output_tokens"] == 6
    assert report["request_rate"] == "inf"
    assert report["settings"]["num_prompts"] == 3
    assert "itls" not in report
    assert "secret" not in (tmp_path / "out.json").read_text()


def test_command_names_its_file_and_keeps_details(live, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    flags = f"--base-url {live.url} --skip-tokenizer-init --num-prompts 2 --output-len 2"
    flags += f" --input-len 4 --save-result --save-detailed --result-dir {tmp_path}"
    assert run(*flags.split()).exit_code == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("openai-infqps-tiny-")
    assert len(json.loads(path.read_text())["itls"]) == 2


def test_command_fails_if_all_requests_do(live):
    flags = f"--base-url {live.url} --api-key secret --skip-tokenizer-init --num-prompts 2"
    flags += " --ready-check-timeout-sec 0"
    result = run(*flags.split(), "--extra-body", '{"n": 0}')
    assert result.exit_code == 1
    assert "failed: status 400" in result.stderr
