"""The benchmark of the host's work: that it runs the whole engine, and notices who waits for whom."""

import json
import os
import time

import torch
from typer.testing import CliRunner

from nanoflow_compiler.bench import host
from nanoflow_compiler.bench.host_settings import HostSettings
from nanoflow_compiler.cli import app

SMALL = {"max_num_seqs": 8, "input_len": 20, "output_len": 10, "num_steps": 40}


def measure(sampling=None, **settings):
    return host.measure_host(HostSettings(**(SMALL | settings)), sampling or {})


def test_as_many_requests_run_as_may():
    found = measure(step_time_ms=0)
    assert found["num_steps"] == 40
    assert 5 < found["mean_running"] <= 8
    assert 0.5 < found["mean_joined"] < 1.5
    assert found["mean_tokens"] > found["mean_running"]
    assert 0 < found["median_host_ms"] <= found["p99_host_ms"] <= found["max_host_ms"]


def test_a_slow_device_never_waits_and_its_time_is_not_the_hosts():
    found = measure(step_time_ms=30, num_steps=10)
    assert found["num_steps_waiting_for_host"] == 0
    assert found["ms_per_step"] > 25
    assert found["median_host_ms"] < 25


def test_a_slow_host_is_noticed(monkeypatch):
    step = host.EngineCore.step

    def slow(core):
        time.sleep(0.01)
        return step(core)

    monkeypatch.setattr(host.EngineCore, "step", slow)
    found = measure(step_time_ms=1, num_steps=10)
    assert found["num_steps_waiting_for_host"] == 10
    assert found["median_host_ms"] >= 10


def test_settings_of_requests_and_of_the_program_arrive(monkeypatch):
    seen = []
    submit = host.MeasuredRunner.submit

    def watched(runner, batch, sampling, **rest):
        seen.append((sampling, runner.forward.step.attention_parts))
        return submit(runner, batch, sampling, **rest)

    monkeypatch.setattr(host.MeasuredRunner, "submit", watched)
    sampling = {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 2}
    measure(sampling, step_time_ms=0, parts=2)
    last, parts = seen[-1]
    assert set(last.temperature.tolist()) == {0.5}
    assert len(last.penalty_rows) == len(last.temperature)
    assert set(last.num_logprobs.tolist()) == {2}
    assert parts == ((0, 2), (0, 1), (1, 2))


def test_cores_and_threads_are_given_back():
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    measure(step_time_ms=0, num_steps=2)
    assert os.sched_getaffinity(0) == cores
    assert torch.get_num_threads() == threads


def test_command(tmp_path):
    path = tmp_path / "host.json"
    flags = f"--max-num-seqs 4 --input-len 9 --output-len 5 --num-steps 5 --output-json {path}"
    flags += " --step-time-ms 1 --temperature 0"
    result = CliRunner().invoke(app, ["bench", "host", *flags.split()])
    assert result.exit_code == 0, result.output
    assert "Steps that waited for the host" in result.stdout
    report = json.loads(path.read_text())
    assert report["num_steps"] == 5
    assert report["settings"]["temperature"] == 0
    assert report["environment"]["threads"] == 1
