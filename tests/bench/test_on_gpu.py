"""What a benchmark on a GPU reports: rates, energy, clock, gaps between steps, and the wall."""

import json

import pytest
from typer.testing import CliRunner

from nanoflow_compiler.bench.gpu_meter import has_meter
from nanoflow_compiler.cli import app

pytestmark = [
    pytest.mark.gpu,
    # Inductor's advice on a reduction that it splits.
    pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled"),
]

OVERRIDES = json.dumps({"num_hidden_layers": 2})
RATES = ("tokens_per_second", "output_tokens_per_second", "requests_per_second")
METERED = ("joules_per_1000_tokens", "mean_power_watts", "mean_sm_clock_mhz", "energy_joules")


def run(tmp_path, verb, *flags):
    path = tmp_path / "out.json"
    words = ["bench", verb, "--dummy-weights", "bench-1b", "--hf-overrides", OVERRIDES]
    result = CliRunner().invoke(app, [*words, *flags, "--output-json", str(path)])
    assert result.exit_code == 0, result.output
    return result, json.loads(path.read_text())


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_throughput_and_its_wall(tmp_path, distribution):
    assert has_meter(), "install nvidia-ml-py"
    flags = "--num-prompts 128 --max-num-seqs 64 --input-len 128 --output-len 64 --temperature 0"
    flags += f" --num-warmups 8 --max-model-len 256 --wall --dummy-distribution {distribution}"
    result, report = run(tmp_path, "throughput", *flags.split())
    assert all(report[name] > 0 for name in RATES)
    assert report["total_num_tokens"] == 128 * 192
    assert all(report[name] > 0 for name in METERED)
    assert 50 < report["mean_power_watts"] < 1500
    assert report["step_us"]["num"] == report["step_gaps_us"]["num"] + 1
    assert report["step_us"]["mean"] > 0
    assert 0 < report["fraction_of_wall"] < 1
    assert report["wall"]["joules_per_1000_tokens"] > 0
    assert report["seconds"].keys() >= {"load", "compile", "capture"}
    assert report["settings"]["hf_overrides"] == {"num_hidden_layers": 2}
    assert report["settings"]["dummy_distribution"] == distribution
    assert "W" in report["environment"]["gpus"][0]
    assert "Fraction of the wall" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [[], ["--server"]], ids=["engine", "server"])
def test_startup(tmp_path, kind):
    flags = "--num-iters-cold 1 --num-iters-warm 1 --max-model-len 256 --max-num-seqs 16"
    _, report = run(tmp_path, "startup", *kind, *flags.split())
    assert [start["caches"] for start in report["starts"]] == ["cold", "warm"]
    for start in report["starts"]:
        stages = [value for name, value in start.items() if name not in ("caches", "total")]
        assert start["total"] == pytest.approx(sum(stages))
        assert all(value > 0 for value in stages)
