"""Throughput, latency and start-up of a tiny model, through the commands."""

import json
import re
from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from nanoflow_compiler.bench.startup_server import serve_flags
from nanoflow_compiler.cli import app
from nanoflow_compiler.engine import assemble
from nanoflow_compiler.engine.device_times import DeviceTimes, StepTimes

LAST_LINE = re.compile(
    r"Throughput: ([\d.]+) requests/s, ([\d.]+) total tokens/s, ([\d.]+) output tokens/s\n$"
)


@pytest.fixture
def run(tiny_model, tmp_path):
    """Runs a command on the tiny model; what it prints, and its JSON."""

    def run(verb, flags):
        path = tmp_path / "out.json"
        words = ["bench", verb, "--model", str(tiny_model), *flags.split()]
        result = CliRunner().invoke(app, [*words, "--output-json", str(path)])
        if result.exit_code:
            return result, None
        return result, json.loads(path.read_text())

    return run


@pytest.mark.parametrize(
    "backend", ["--max-num-seqs 2 --enforce-eager", "--backend hf --hf-max-batch-size 2"]
)
def test_throughput_counts_all_tokens(run, backend):
    result, report = run("throughput", f"{backend} --num-prompts 5 --input-len 7 --output-len 3")
    assert report["num_requests"] == 5
    assert report["total_num_tokens"] == 50
    assert report["total_output_tokens"] == 15
    assert report["tokens_per_second"] == pytest.approx(50 / report["elapsed_time"])
    figures = [float(text) for text in LAST_LINE.search(result.stdout).groups()]
    keys = ("requests_per_second", "tokens_per_second", "output_tokens_per_second")
    assert figures == pytest.approx([report[key] for key in keys], abs=0.01)
    assert report["settings"]["input_len"] == 7
    assert report["environment"]["versions"]["torch"]


KEYS = {
    *("elapsed_time", "num_requests", "total_num_tokens", "requests_per_second"),
    *(
        "tokens_per_second",
        "output_tokens_per_second",
        "seconds",
        "step_us",
        "step_gaps_us",
        "engine",
    ),
}


def test_throughput_of_dummy_weights_needs_no_tokenizer(tiny_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    path = tmp_path / "out.json"
    flags = "--num-prompts 3 --input-len 5 --output-len 2 --enforce-eager --temperature 0"
    words = ["bench", "throughput", "--dummy-weights", str(folder), "--device", "cpu"]
    words += ["--dummy-distribution", "uniform", "--output-json", str(path), *flags.split()]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert "Seconds to load" in result.stdout
    assert "Seconds to compile" in result.stdout
    report = json.loads(path.read_text())
    assert report.keys() >= KEYS
    assert report["seconds"].keys() == {"load", "compile"}
    assert report["engine"]["device"] == "cpu"
    assert report["step_gaps_us"] is None
    assert "joules_per_1000_tokens" not in report
    assert report["settings"]["dummy_weights"] == str(folder)


class Timed(DeviceTimes):
    """Says what a GPU would."""

    def __init__(self):
        super().__init__()
        self.capture_s = 0.25

    def step(self):
        return nullcontext()

    def take(self):
        return StepTimes(durations_us=[5.0, 7.0], gaps_us=[1.0, 2.0, 3.0])


def test_times_of_steps_and_captures_are_reported(run, monkeypatch):
    make = assemble.ModelRunner

    def timed(*args, **rest):
        runner = make(*args, **rest)
        runner.times = Timed()
        return runner

    monkeypatch.setattr(assemble, "ModelRunner", timed)
    flags = "--device cpu --num-prompts 2 --input-len 3 --output-len 2 --enforce-eager"
    result, report = run("throughput", flags)
    assert report["step_gaps_us"] == {
        "mean": 2.0,
        "p50": 2.0,
        "p99": pytest.approx(2.98),
        "num": 3,
    }
    assert report["step_us"]["mean"] == 6.0
    assert report["seconds"]["capture"] == 0.25
    assert "Gap between steps, p99 (us)" in result.stdout


def test_one_model_is_named_once():
    for flags in ([], ["--model", "a", "--dummy-weights", "b"]):
        result = CliRunner().invoke(app, ["bench", "throughput", *flags])
        assert result.exit_code == 2
        assert "--dummy-weights NAME" in result.stderr


def test_throughput_of_a_trace(run, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,5,2\nXXX,600,9\nXXX,8,4\n")
    _, report = run("throughput", f"--trace {trace} --num-prompts 2 --enforce-eager")
    assert report["total_input_tokens"] == 13
    assert report["total_output_tokens"] == 6


def test_throughput_of_conversations(run, tmp_path):
    path = tmp_path / "sharegpt.json"
    turns = [{"value": "hello there"}, {"value": "good day"}]
    path.write_text(json.dumps([{"conversations": turns}]))
    flags = f"--dataset-name sharegpt --dataset-path {path} --num-prompts 1 --enforce-eager"
    _, report = run("throughput", flags)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (11, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--backend hf", "needs --hf-max-batch-size"),
        ("--backend hf --hf-max-batch-size 2 --wall", "--wall "),
        ("--hf-max-batch-size 2", "is for --backend hf"),
        ("--backend hf --hf-max-batch-size 2 --max-num-seqs 3", "are for --backend nanoflow"),
        ("--dataset-name sharegpt", "needs a file"),
        (
            "--input-len 4000 --num-prompts 2 --enforce-eager",
            "longer than 256 tokens were left out",
        ),
    ],
)
def test_throughput_refuses_what_it_cannot_do(run, flags, message):
    result, _ = run("throughput", flags)
    assert result.exit_code == 2
    assert message in result.stderr


def test_latency_counts_rounds_after_the_warm_up(run):
    flags = "--enforce-eager --input-len 4 --output-len 3 --batch-size 2"
    result, report = run("latency", f"{flags} --num-iters-warmup 1 --num-iters 3")
    assert len(report["latencies"]) == 3
    assert report["avg_latency"] == pytest.approx(sum(report["latencies"]) / 3)
    assert list(report["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert result.stdout.startswith(f"Avg latency: {report['avg_latency']:.4f} seconds\n")


def test_startup_of_processes_of_their_own(run):
    flags = "--enforce-eager --num-iters-cold 1 --num-iters-warm 1"
    result, report = run("startup", flags)
    assert [start["caches"] for start in report["starts"]] == ["cold", "warm"]
    for start in report["starts"]:
        stages = ("python", "import", "load", "compile", "first_answer")
        assert start["total"] == pytest.approx(sum(start[stage] for stage in stages))
        assert all(start[stage] > 0 for stage in stages)
        assert start["capture"] == 0.0
        assert start["parts"] == {}  # of an eager engine
    assert report["avg_cold_startup_time"] == report["starts"][0]["total"]
    assert "first_answer" in result.stdout
    assert f"{report['avg_warm_startup_time']:.2f}" in result.stdout


@pytest.mark.slow
def test_startup_of_a_server(run):
    flags = "--server --enforce-eager --num-iters-cold 1 --num-iters-warm 0 --device cpu"
    result, report = run("startup", f"{flags} --max-num-seqs 4 --no-enable-prefix-caching")
    (start,) = report["starts"]
    assert start.keys() == {"caches", "other", "load", "compile", "first_answer", "total", "parts"}
    assert start["total"] == pytest.approx(sum(report["cold_stages"].values()))
    assert all(start[stage] > 0 for stage in ("other", "load", "first_answer"))
    assert "first_answer" in result.stdout


def test_flags_of_a_server_that_starts():
    given = {"model": "m", "dtype": "auto", "hf_overrides": {"num_hidden_layers": 2}}
    given |= {"max_num_seqs": None, "enforce_eager": False, "enable_prefix_caching": False}
    words = serve_flags(given | {"options": {"parts": 2}})
    assert words == [
        *("m", "--served-model-name", "startup", "--dtype", "auto"),
        *("--hf-overrides", '{"num_hidden_layers": 2}', "--no-enable-prefix-caching"),
        *("--compile-options", '{"parts": 2}'),
    ]
    assert "--enforce-eager" in serve_flags(given | {"enforce_eager": True, "options": {}})


@pytest.mark.parametrize("kind", ["", pytest.param("--server", marks=pytest.mark.slow)])
def test_startup_that_fails_says_why(run, kind):
    result, _ = run("startup", f"{kind} --num-iters-cold 1 --num-iters-warm 0 --max-num-seqs 0")
    assert result.exit_code == 2
    assert "max_num_seqs must be" in result.stderr
