"""What a user gets wrong: one line that names the cause and the fix, and nothing half-written.

Details of single files and fields are tested where they are read, in ``tests/models``; here each
mistake goes through the whole of both front doors.
"""

import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nanoflow_compiler import LLM, SamplingParams
from nanoflow_compiler.cli import app
from nanoflow_compiler.errors import (
    ConfigError,
    EmptyPromptError,
    ModelLoadError,
    NanoflowError,
    PromptTooLongError,
    RequestError,
    UnsupportedGraphError,
)
from tiny_models import llama
from tiny_tokenizers import byte_tokenizer

MAX_TOKENS = 64
SHORT = SamplingParams(temperature=0, max_tokens=2)


@pytest.fixture(scope="module")
def good_dir(tmp_path_factory):
    """A decoder with a tokenizer that makes one token of each byte."""
    folder = tmp_path_factory.mktemp("good")
    llama(vocab_size=300, num_hidden_layers=1, max_position_embeddings=MAX_TOKENS).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model_dir(good_dir, tmp_path):
    """A copy that the test may damage."""
    return shutil.copytree(good_dir, tmp_path / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("NANOFLOW_CACHE", str(folder))
    return folder


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def answer(model, prompt="Hello", **settings):
    """Python's front door."""
    with LLM(str(model), options={"clusters": "eager"}, **settings) as llm:
        return llm.generate(prompt, SHORT)


def run(*arguments):
    """The command's."""
    return CliRunner().invoke(app, [*map(str, arguments)])


def assert_refused(result, *words):
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("nanoflow: ")
    for word in words:
        assert word in line
    assert result.stdout == ""


def test_the_model_that_is_damaged_below_works(good_dir):
    result = run("generate", good_dir, "--prompt", "Hello", "--max-tokens", "2", "--enforce-eager")
    assert result.exit_code == 0, result.output
    assert answer(good_dir)[0].outputs[0].finish_reason == "length"


OTHER_MODELS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(num_hidden_layers=1, hidden_size=24, vocab_size=64)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(num_layers=1, d_model=16, d_ff=16, num_heads=2, vocab_size=64)
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(num_hidden_layers=1, hidden_size=24)),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_model_that_is_not_a_decoder(kind, tmp_path, cache):
    model = OTHER_MODELS[kind]()
    folder = tmp_path / "other"
    model.save_pretrained(folder)
    words = f"{kind} is not a decoder"
    with pytest.raises(ModelLoadError, match=words):
        answer(folder)
    for command in (["generate", folder, "--prompt", "x"], ["check", folder]):
        assert_refused(run(*command), words)
    with pytest.raises(NanoflowError, match=r"only decoders|causal language model") as caught:
        LLM(model)
    assert "\n" not in str(caught.value)
    assert not files_in(cache)


class ReadsData(hf.LlamaForCausalLM):
    """Asks for a value, which is not there when the graph is captured."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        output = super().forward(input_ids, position_ids=position_ids, **kwargs)
        if output.logits.amax().item() > 1e9:
            output.logits = output.logits / 2
        return output


class CountsTokens(hf.LlamaForCausalLM):
    """Computes something else for long inputs."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        output = super().forward(input_ids, position_ids=position_ids, **kwargs)
        if input_ids.shape[-1] > 100:
            output.logits = output.logits / 2
        return output


@pytest.mark.parametrize(
    ("kind", "why"),
    [(ReadsData, "cannot be captured as one graph"), (CountsTokens, "the number of tokens")],
)
def test_a_step_that_is_not_one_graph(kind, why, cache):
    model = kind(llama(num_hidden_layers=1).config).eval()
    prompt = {"prompt_token_ids": [5, 6, 7]}
    with pytest.raises(
        UnsupportedGraphError, match=f"{kind.__name__}.*{why}.*enforce_eager=True"
    ) as caught:
        LLM(model, options={"clusters": "eager"})
    assert "\n" not in str(caught.value)
    assert not files_in(cache)
    with LLM(model, enforce_eager=True) as llm:
        assert llm.generate(prompt, SHORT)[0].outputs[0].token_ids


def test_weights_of_a_model_in_memory_that_are_not_numbers():
    model = llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(
        ModelLoadError, match=r"LlamaForCausalLM: the weight model.norm.weight .* NaN"
    ):
        LLM(model, enforce_eager=True)


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2)], ids=["none", "module"])
def test_what_is_no_model(model):
    with pytest.raises(ConfigError, match=f"not {type(model).__name__}"):
        LLM(model)


@pytest.mark.parametrize("options", [3, ["parts"]])
def test_options_that_are_no_mapping(options):
    with pytest.raises(ConfigError, match="options must be a mapping"):
        LLM(llama(num_hidden_layers=1), options=options)


def test_data_in_python_breaks_the_graph_of_torch_compile_and_nothing_else():
    model = ReadsData(llama(num_hidden_layers=1).config).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="nanoflow", options={"clusters": "eager", "parts": 2})
    ids = torch.arange(3, 15).view(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_an_empty_prompt(good_dir):
    with pytest.raises(EmptyPromptError, match="no tokens"):
        answer(good_dir, prompt={"prompt_token_ids": []})
    result = run("generate", good_dir, "--prompt", "", "--enforce-eager")
    assert_refused(result, "prompt", "no tokens")


def test_a_prompt_that_is_too_long(good_dir):
    prompt = "x" * MAX_TOKENS
    with pytest.raises(PromptTooLongError, match=f"max_model_len={MAX_TOKENS}"):
        answer(good_dir, prompt=prompt)
    result = run("generate", good_dir, "--prompt", prompt, "--enforce-eager")
    assert_refused(result, f"max_model_len={MAX_TOKENS}")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": [5, 128]}, "holds 128, but the model's tokens are 0 to 127"),
        ({"prompt_token_ids": [5, -1]}, "holds -1, but"),
        ({"prompt_token_ids": [5, 1.5]}, "must be a list of integers"),
        ({"prompt_token_ids": [[5]]}, "must be a list of integers"),
        ({"prompt_token_ids": "abc"}, "must be a list of integers"),
        ({"prompt": "abc"}, "a prompt is text or {'prompt_token_ids': .*}, not dict"),
        ([1, 2, 3], "a prompt is text or .*, not int"),
    ],
)
def test_a_prompt_that_no_model_can_read(prompt, message):
    """One bad request is refused and leaves the engine to the others."""
    good = {"prompt_token_ids": [5, 6]}
    with LLM(llama(num_hidden_layers=1), enforce_eager=True) as llm:
        with pytest.raises(RequestError, match=message):
            llm.generate([good, *(prompt if isinstance(prompt, list) else [prompt])], SHORT)
        assert llm.generate(good, SHORT)[0].outputs[0].finish_reason == "length"


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_weights(folder):
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def cut_configuration(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:50])


DAMAGES = {
    remove_weights: ["safetensors"],
    truncate_weights: ["model.safetensors", "download"],
    spoil_weights: ["model.norm.weight", "NaN"],
    cut_configuration: ["config.json"],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files(damage, model_dir, cache):
    damage(model_dir)
    words = DAMAGES[damage]
    with pytest.raises(ModelLoadError) as caught:
        answer(model_dir)
    assert "\n" not in str(caught.value)
    for command in (["generate", model_dir, "--prompt", "x"], ["check", model_dir]):
        assert_refused(run(*command), str(model_dir), *words)
    assert not files_in(cache)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parts", "zorp"], ["parts", "'auto' or an integer from 1 to 16", "'zorp'"]),
        (["--parts", "99"], ["parts", "99"]),
        (["--backend", "stone"], ["backend must be one of auto, codegen, streams", "'stone'"]),
        (["--dtype", "int3"], ["dtype must be auto or one of", "'int3'"]),
        (["--max-model-len", "100000"], ["max_model_len=100000", str(MAX_TOKENS)]),
        (["--max-num-seqs", "0"], ["max_num_seqs"]),
        (["--top-p", "3"], ["top_p"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_broken_options(flags, words, good_dir, cache):
    assert_refused(run("generate", good_dir, "--prompt", "x", *flags), *words)
    assert not files_in(cache)


def test_a_dump_that_cannot_be_written(good_dir, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "dump"
    assert_refused(run("generate", good_dir, "--prompt", "x", "--dump", place), str(place), "dump")
    with pytest.raises(ConfigError, match=re.escape(str(place))):
        LLM(str(good_dir), options={"dump": place})


@pytest.mark.parametrize("damage", [truncate_weights, cut_configuration], ids=lambda d: d.__name__)
def test_the_process_says_no_more_than_that(damage, model_dir):
    damage(model_dir)
    code = "from nanoflow_compiler.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", str(model_dir), "--prompt", "x"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"nanoflow: {model_dir}")
