"""What a run is compared with: GEMMs by shape, tokens by kind, and the sum of what was measured."""

import time

import pytest
import torch

from nanoflow_compiler.bench import wall
from nanoflow_compiler.bench.dataset import BenchRequest
from nanoflow_compiler.bench.gemms import Gemm, list_gemms
from nanoflow_compiler.bench.gpu_meter import GpuUse, Watch
from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.bench.sustained import Sustained
from nanoflow_compiler.bench.workload import Workload
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.models import load_decoder
from tiny_models import BUILDERS, llama

FACTS = {
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 1024,
    "num_kv_blocks": 16000,
    "block_size": 64,
}


def shapes_of(name):
    return load_decoder(name, load_format="dummy", device="meta").model


def requests(*lengths):
    return [
        BenchRequest(prompt_token_ids=[1] * prompt, output_len=answer) for prompt, answer in lengths
    ]


def test_gemms_of_a_tiny_model():
    gemms, head = list_gemms(llama(num_hidden_layers=3, vocab_size=300))
    config = llama().config
    wide, deep = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    stored = config.num_key_value_heads * config.head_dim
    assert gemms == {
        Gemm("q_proj+k_proj+v_proj", wide, heads + 2 * stored): 3,
        Gemm("o_proj", heads, wide): 3,
        Gemm("gate_proj+up_proj", wide, 2 * deep): 3,
        Gemm("down_proj", deep, wide): 3,
    }
    assert head == Gemm("lm_head", wide, 300)


def test_gemms_of_the_benchmark_model():
    gemms, head = list_gemms(shapes_of("bench-1b"))
    sizes = {(gemm.in_features, gemm.out_features): count for gemm, count in gemms.items()}
    assert sizes == {(2048, 4096): 16, (2048, 2048): 16, (2048, 16384): 16, (8192, 2048): 16}
    assert (head.in_features, head.out_features) == (2048, 128256)


def test_a_tied_head_is_not_counted_twice():
    gemms, head = list_gemms(shapes_of("qwen3-0.6b"))
    assert sum(gemms.values()) == 28 * 4
    assert head.out_features == 151936


@pytest.mark.parametrize("make", [BUILDERS["gpt2"], lambda: shapes_of("mixtral-8x7b")])
def test_weights_that_are_in_no_linear_are_refused(make):
    with pytest.raises(ConfigError, match="weights that are in no linear"):
        list_gemms(make())


def test_tokens_of_a_workload():
    found = Workload.of(requests((512, 512), (512, 512)), FACTS)
    assert (found.num_input, found.num_output, found.num_decodes) == (1024, 1024, 1022)
    assert found.num_tokens - found.num_computed == 2
    assert found.mean_context == 768
    assert (found.tokens_per_step, found.decode_rows) == (2048, 2)


@pytest.mark.parametrize(
    ("facts", "rows"),
    [
        ({}, 1024),
        ({"max_num_seqs": 500}, 500),
        ({"max_num_batched_tokens": 512}, 256),
        ({"num_kv_blocks": 768}, 64),
    ],
)
def test_as_many_decodes_as_the_limits_allow(facts, rows):
    found = Workload.of(requests(*[(512, 512)] * 3000), FACTS | facts)
    assert found.decode_rows == rows


def test_answers_of_one_token_decode_nothing():
    found = Workload.of(requests((8, 1), (9, 1)), FACTS)
    assert (found.num_decodes, found.mean_context) == (0, 1)


def taken(us):
    return Sustained(us=us, joules=us * 1e-4, watts=100.0, sm_mhz=1500.0, num_calls=9)


def test_the_wall_is_the_sum_of_its_parts(monkeypatch):
    monkeypatch.setattr(wall, "_gemm", lambda gemm, **of: part(gemm.name, us=100.0, **of))
    attention = wall.Part(name="decode_attention", rows=64, calls=10.0, time=taken(500.0))
    monkeypatch.setattr(wall, "_attention", lambda *_: attention)
    workload = Workload.of(requests(*[(512, 512)] * 256), FACTS)
    found = wall.measure_wall(shapes_of("bench-1b"), workload).results()
    steps = workload.num_computed / 2048
    turns = workload.num_output / workload.decode_rows
    seconds = (64 * steps + turns) * 100e-6 + 10 * 500e-6
    assert found["tokens_per_second"] == pytest.approx(workload.num_tokens / seconds)
    joules = seconds * 1e6 * 1e-4
    expected = joules / workload.num_tokens * 1e3
    assert found["joules_per_1000_tokens"] == pytest.approx(expected)
    names = [one["name"] for one in found["parts"]]
    assert names[-2:] == ["lm_head", "decode_attention"]
    assert len(names) == 6
    keys = {"rows", "calls", "seconds", "us", "joules", "watts", "sm_mhz", "num_calls"}
    assert all(one.keys() >= keys for one in found["parts"])
    assert sum(one["seconds"] for one in found["parts"]) == pytest.approx(seconds)


def part(name, *, us, rows, calls, dtype):
    assert dtype == torch.bfloat16
    return wall.Part(name=name, rows=rows, calls=calls, time=taken(us))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_the_wall_needs_a_gpu():
    with pytest.raises(ConfigError, match="--wall needs a GPU"):
        wall.check_wall(ModelSettings(dummy_weights="bench-1b"))


class Card:
    """Takes 300 W at a clock that falls."""

    def __init__(self):
        self.start, self.num_read = time.perf_counter(), 0

    def energy_j(self):
        return 300 * (time.perf_counter() - self.start)

    def sm_mhz(self):
        self.num_read += 1
        return 2000.0 - 10 * self.num_read


def test_a_watch_reads_power_and_clock():
    card = Card()
    with Watch(card, interval_s=0.01) as watch:
        time.sleep(0.1)
    assert watch.use.watts == pytest.approx(300, rel=0.05)
    assert card.num_read > 2
    assert watch.use.mean_sm_mhz == pytest.approx(2000 - 5 * (card.num_read + 1))
    num_read = card.num_read
    time.sleep(0.03)
    assert card.num_read == num_read


def test_use_by_tokens():
    found = GpuUse(seconds=2.0, joules=1200.0, mean_sm_mhz=1500.0).results(num_tokens=4000)
    assert found["joules_per_1000_tokens"] == 300
    assert found["mean_power_watts"] == 600


@pytest.mark.gpu
def test_the_wall_of_a_small_model():
    settings = ModelSettings(dummy_weights="bench-1b")
    shapes = wall.check_wall(settings)
    workload = Workload.of(requests(*[(512, 512)] * 64), FACTS)
    found = wall.measure_wall(shapes, workload).results()
    assert found["tokens_per_second"] > 1000
    assert {one["name"] for one in found["parts"]} > {"lm_head", "decode_attention", "o_proj"}
