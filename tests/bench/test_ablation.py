"""``bench ablation``: the plans of a step, on a model so small that a CPU runs it for a GPU."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fake_graphs import fake_cuda
from nanoflow_compiler.bench import ablation, one_step
from nanoflow_compiler.bench.ablation import measure_ablation, plans
from nanoflow_compiler.bench.ablation_settings import AblationSettings
from nanoflow_compiler.bench.one_step import make_step
from nanoflow_compiler.bench.sustained import Sustained
from nanoflow_compiler.cli import app
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.models.decoder import Decoder
from tiny_models import llama

SMALL = AblationSettings(
    decodes=6, context=70, prompt_tokens=10, prompt_len=4, memory_sms="40", device="cpu"
)


@pytest.fixture
def faked(monkeypatch):
    """A CPU that captures graphs, and whose time is known."""
    fake_cuda(monkeypatch)
    model = llama()

    def load(name, **loading):
        assert name == "tiny"
        assert loading["load_format"] == "dummy"
        return Decoder(model, None, model.config, None, name, 128, frozenset())

    def measure(replay, *, seconds):
        replay()
        return Sustained(us=seconds * 1e6, joules=1.0, watts=2.0, sm_mhz=3.0, num_calls=1)

    monkeypatch.setattr(ablation, "load_decoder", load)
    monkeypatch.setattr(ablation, "CompileConfig", partial(CompileConfig, clusters="eager"))
    monkeypatch.setattr(ablation, "measure_replays", measure)
    monkeypatch.setattr(ablation, "_check_device", lambda _: None)


@pytest.mark.usefixtures("faked")
def test_all_plans_find_the_logits_of_the_sequence():
    found = measure_ablation("tiny", SMALL)
    names = [(result["name"], result["order"]) for result in found["plans"]]
    assert names[0] == ("sequence", "decodes-first")
    assert names[-1] == ("sequence again", "decodes-first")
    assert len(names) == len(set(names)) == 2 + 2 * 4
    for result in found["plans"]:
        assert "error" not in result
        assert result["same_top_1"] == 1
        assert result["max_difference"] < 1e-4
        assert result["predicted_us"] > 0


@pytest.mark.usefixtures("faked")
def test_what_is_printed_and_written(tmp_path):
    path = tmp_path / "found.json"
    flags = "--decodes 4 --context 9 --prompt-tokens 4 --prompt-len 4 --memory-sms 40"
    call = ["bench", "ablation", "tiny", *flags.split(), "--device", "cpu", "--output", str(path)]
    result = CliRunner().invoke(app, [*call, "--order", "mixed"])
    assert result.exit_code == 0, result.output
    assert "Fastest: sequence" in result.output
    written = json.loads(path.read_text())
    assert [plan["order"] for plan in written["plans"]] == ["mixed"] * 6
    assert written["settings"]["context"] == 9


@pytest.mark.usefixtures("faked")
def test_a_plan_that_is_not_captured_says_why(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(ablation.StepGraphs, "_capture", refuse)
    found = measure_ablation("tiny", SMALL)
    assert found["fastest"] is None
    assert all("no such luck" in result["error"] for result in found["plans"])
    ablation.print_ablation(found)


@pytest.mark.parametrize("order", ["decodes-first", "mixed"])
def test_a_step_by_hand(order):
    """Nobody writes where another one reads, and each request has its tokens in any order."""
    step = make_step(SMALL, order, num_blocks=30, vocab_size=100)
    batch = step.batch
    assert batch.num_tokens == 16
    assert batch.query_lens.sum() == 16
    assert sorted(batch.query_lens) == [1] * 6 + [2, 4, 4]
    assert list(batch.context_lens[batch.query_lens == 1]) == [69] * 6
    written = [
        set(table[start // 64 : (start + count - 1) // 64 + 1].tolist())
        for table, start, count in zip(
            batch.block_tables, batch.context_lens, batch.query_lens, strict=True
        )
    ]
    assert len(set().union(*written)) == sum(map(len, written))
    read = [set(table[:1]) for table in batch.block_tables[batch.query_lens == 1]]
    assert not set().union(*read) & set().union(*written)
    first = make_step(SMALL, "decodes-first", num_blocks=30, vocab_size=100).batch
    starts = np.cumsum(batch.query_lens) - batch.query_lens
    own = {
        request: batch.token_ids[start : start + count].tolist()
        for request, start, count in zip(step.requests, starts, batch.query_lens, strict=True)
    }
    assert [token for at in range(9) for token in own[at]] == first.token_ids.tolist()


def test_cells_of_one_kind():
    step = make_step(SMALL, "decodes-first", num_blocks=30, vocab_size=100)
    assert tuple(step.cut(16, 2)) == (0, 6, 16)
    assert tuple(step.cut(16, 1)) == (0, 16)
    assert tuple(step.cut(16, 4)) == (0, 4, 8, 12, 16)
    mixed = make_step(SMALL, "mixed", num_blocks=30, vocab_size=100)
    assert tuple(mixed.cut(16, 2)) == (0, 8, 16)


def test_blocks_are_shared_where_memory_is_short():
    enough = make_step(SMALL, "mixed", num_blocks=30, vocab_size=100).batch
    short = make_step(SMALL, "mixed", num_blocks=1 + 9 + 1, vocab_size=100).batch
    decodes = enough.query_lens == 1
    assert len(set(enough.block_tables[decodes, 0])) == 6
    assert len(set(short.block_tables[decodes, 0])) == 1
    assert len(set(short.block_tables[decodes, 1])) == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory_sms": "40,many"}, "--memory-sms must be numbers"),
        ({"decodes": 0, "prompt_tokens": 0}, "a token for each part"),
        ({"prompt_tokens": 1}, "one token is a decode"),
    ],
)
def test_settings_that_make_no_step(given, message):
    with pytest.raises(ConfigError, match=message):
        AblationSettings(**given).check()


def test_prompts_have_all_tokens():
    for tokens in (0, 2, 512, 513, 1024, 1100):
        lens = AblationSettings(prompt_tokens=tokens).prompt_lens
        assert sum(lens) == tokens
        assert all(length >= 2 for length in lens)


def test_budgets_that_are_compared():
    found = list(plans(AblationSettings(order="mixed", memory_sms="24,40")))
    assert [plan.name for plan in found] == [
        "sequence",
        "split",
        "overlapped, 24 SMs",
        "overlapped, 40 SMs",
        "overlapped, blocks",
        "overlapped, no budgets",
        "sequence again",
    ]
    assert [plan.config.memory_sms for plan in found[2:4]] == [24, 40]


def test_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="on a GPU; there is none here"):
        measure_ablation("tiny", SMALL)


def test_the_cache_is_as_large_as_the_step_needs():
    shape = one_step.LayerShape(2, 8, 8, torch.float32)
    cache = one_step.fill_cache([shape], SMALL, device=torch.device("cpu"))
    assert cache.num_blocks == 1 + 6 + 3 + 6
    assert cache.keys[0].abs().min() > 0
