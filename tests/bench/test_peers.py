"""The scripts that measure other engines: the same requests, the same keys, clear words without them."""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from nanoflow_compiler.cli import app
from tiny_models import llama

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
FLAGS = "--num-prompts 3 --input-len 7 --output-len 4 --random-range-ratio 0.5 --seed 5"


@pytest.fixture
def script(monkeypatch):
    """Loads a script as its own folder's Python would."""
    monkeypatch.syspath_prepend(str(PEERS))
    monkeypatch.delitem(sys.modules, "common", raising=False)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"peer_{name}", PEERS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("common", None)


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """The report of a script on a tiny model that is nothing but its configuration."""
    folder = tmp_path / "model"
    llama(vocab_size=300, num_hidden_layers=1).config.save_pretrained(folder)

    def run(name, flags=""):
        path = tmp_path / f"{name}.json"
        words = [name, "--dummy-weights", str(folder), "--output-json", str(path)]
        monkeypatch.setattr(sys, "argv", [*words, *FLAGS.split(), *flags.split()])
        script(name).main()
        return json.loads(path.read_text())

    run.model = folder
    return run


class FakeVllm:
    """Stands for ``vllm.LLM``: tokens of the length that was asked for."""

    asked = ()

    def __init__(self, **settings):
        self.settings = settings
        FakeVllm.config = json.loads((Path(settings["model"]) / "config.json").read_text())
        FakeVllm.settings = settings

    def generate(self, prompts, params, *, use_tqdm):
        assert use_tqdm is False
        FakeVllm.asked = [prompt["prompt_token_ids"] for prompt in prompts]
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * one.max_tokens)])
            for one in params
        ]


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeVllm, SimpleNamespace
    module.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return FakeVllm


def test_vllm_gets_the_requests_and_reports_the_keys_of_ours(run, vllm, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0")
    theirs = run("vllm_throughput", "--max-num-seqs 8")
    assert vllm.config["vocab_size"] == 300
    assert vllm.settings["load_format"] == "dummy"
    assert vllm.settings["skip_tokenizer_init"] is True
    assert vllm.settings["async_scheduling"] is True
    assert vllm.settings["max_num_seqs"] == 8
    assert "max_model_len" not in vllm.settings
    path = tmp_path / "ours.json"
    words = ["bench", "throughput", "--dummy-weights", str(run.model), "--device", "cpu"]
    words += ["--enforce-eager", "--output-json", str(path), *FLAGS.split()]
    assert CliRunner().invoke(app, words).exit_code == 0
    ours = json.loads(path.read_text())
    assert theirs.keys() >= ours.keys() - {"peak_memory_bytes"}
    for name in ("num_requests", "total_input_tokens", "total_output_tokens"):
        assert theirs[name] == ours[name]
    assert [len(prompt) for prompt in vllm.asked] != [7, 7, 7]


def test_transformers_answers_the_requests(run):
    flags = "--device cpu --dtype float32 --num-blocks 8 --max-num-batched-tokens 64"
    report = run("transformers_throughput", flags)
    assert report["num_requests"] == 3
    assert report["total_output_tokens"] > 3
    assert report["engine"]["name"] == "transformers"
    assert report["seconds"]["start"] > 0


@pytest.mark.parametrize("name", ["vllm", "transformers"])
def test_an_engine_that_is_absent(script, monkeypatch, name):
    module = script(f"{name}_throughput")
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", [name, "--dummy-weights", "bench-1b"])
    with pytest.raises(SystemExit, match=f"{name} .*is not installed here"):
        module.main()


def test_a_model_that_is_in_no_catalog(script):
    common = script("common")
    with pytest.raises(SystemExit, match=r"neither a directory .* bench-1b"):
        common.read_config("no-such-model")
    assert common.read_config("llama-3.1-8b")["architectures"] == ["LlamaForCausalLM"]
