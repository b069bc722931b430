import subprocess
import sys
from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

import nanoflow_compiler
from nanoflow_compiler.cli import app, check
from nanoflow_compiler.errors import NanoflowError

NANOFLOW = [sys.executable, "-c", "from nanoflow_compiler.cli import main; main()"]


@dataclass
class Completion:
    text: str
    token_ids: tuple[int, ...] = (1, 2, 3)
    finish_reason: str = "stop"


@dataclass
class Output:
    outputs: tuple[Completion, ...]


class Tokenizer:
    chat_template = "a template"

    def apply_chat_template(self, conversations, *, add_generation_prompt, return_dict):
        assert add_generation_prompt
        assert not return_dict
        return [[len(messages[0]["content"])] for messages in conversations]


class FakeLLM:
    """Keeps what it was called with; answers each prompt with its number."""

    calls: list["FakeLLM"]
    tokenizer: object = Tokenizer()

    def __init__(self, model, **engine):
        self.model, self.engine, self.closed = model, engine, False
        self.calls.append(self)

    def generate(self, prompts, params):
        self.prompts, self.params = prompts, params
        return [Output((Completion(f"answer {index}"),)) for index in range(len(prompts))]

    def close(self):
        self.closed = True


@pytest.fixture
def llm(monkeypatch):
    fake = type("Fake", (FakeLLM,), {"calls": []})
    monkeypatch.setattr(nanoflow_compiler, "LLM", fake)
    return fake


def run(*arguments, **kwargs):
    return CliRunner().invoke(app, list(arguments), **kwargs)


def test_answer_is_all_of_standard_output(llm):
    result = run("generate", "m", "--prompt", "hello")
    assert (result.exit_code, result.stdout) == (0, "answer 0\n")
    assert "3 tokens" in result.stderr
    assert "tokens/s" in result.stderr
    assert llm.calls[0].closed


@pytest.mark.usefixtures("llm")
def test_several_prompts_are_told_apart(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("second\n\nthird\n")
    result = run("generate", "m", "--prompt", "first", "--prompt-file", str(file))
    assert result.stdout == "> first\nanswer 0\n> second\nanswer 1\n> third\nanswer 2\n"


def test_prompts_from_standard_input(llm):
    run("generate", "m", "--raw", "--prompt-file", "-", input="one\ntwo\n")
    assert llm.calls[0].prompts == ["one", "two"]


def test_chat_template_is_the_default(llm):
    run("generate", "m", "--prompt", "hello")
    run("generate", "m", "--prompt", "hello", "--raw")
    assert llm.calls[0].prompts == [{"prompt_token_ids": [5]}]
    assert llm.calls[1].prompts == ["hello"]


def test_model_without_a_template(llm):
    llm.tokenizer = object()
    run("generate", "m", "--prompt", "hello")
    assert llm.calls[0].prompts == ["hello"]
    result = run("generate", "m", "--prompt", "hello", "--chat")
    assert result.exit_code == 2
    assert "no chat template; use --raw" in result.stderr
    assert llm.calls[1].closed


def test_defaults_are_those_of_the_engine(llm):
    run("generate", "m", "--prompt", "x")
    engine = llm.calls[0].engine
    options = {}
    assert engine == {
        "dtype": "auto",
        "device": "auto",
        "enforce_eager": False,
        "options": options,
    }
    assert llm.calls[0].params.temperature == 0


def test_settings_arrive(llm, tmp_path):
    settings = "--max-tokens 7 --temperature 0.5 --top-k 9 --top-p 0.8 --seed 3 --dtype float32 --device cpu"
    settings += " --max-model-len 99 --max-num-seqs 2 --max-num-batched-tokens 64 --enforce-eager"
    settings += f" --parts 4 --backend reference --dump {tmp_path}"
    result = run("generate", "m", "--prompt", "x", *settings.split())
    assert result.exit_code == 0
    (call,) = llm.calls
    assert call.model == "m"
    assert call.engine == {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 99,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 64,
        "enforce_eager": True,
        "options": {"parts": 4, "backend": "reference", "dump": tmp_path},
    }
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    assert [getattr(call.params, name) for name in names] == [7, 0.5, 9, 0.8, 3]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "no prompt"),
        (["--prompt-file", "/no/such/file"], "cannot be read"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
    ],
)
@pytest.mark.usefixtures("llm")
def test_bad_arguments(arguments, word):
    result = run("generate", "m", *arguments)
    assert result.exit_code == 2
    assert word in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_our_errors_are_one_line(llm, monkeypatch):
    def fail(_self, _model, **_engine):
        raise NanoflowError("first\n  second")

    monkeypatch.setattr(llm, "__init__", fail)
    result = run("generate", "m", "--prompt", "x")
    assert (result.exit_code, result.stderr) == (2, "nanoflow: first second\n")
    verbose = run("generate", "m", "--prompt", "x", "--verbose")
    assert verbose.exit_code == 2
    assert verbose.stderr.startswith("Traceback")
    assert verbose.stderr.endswith("nanoflow: first second\n")


def test_other_errors_keep_their_traceback(llm, monkeypatch):
    monkeypatch.setattr(llm, "close", lambda _self: 1 / 0)
    assert isinstance(run("generate", "m", "--prompt", "x").exception, ZeroDivisionError)


def test_check_names_what_is_there_and_what_is_not(monkeypatch):
    monkeypatch.setattr(check, "OPTIONAL_PACKAGES", {"no-such-package": "some use"})
    monkeypatch.setattr(check.shutil, "which", lambda _name: None)
    result = run("check", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "absent (some use)" in result.stdout
    assert "absent (Inductor needs one" in result.stdout
    for name in ("torch", "transformers", "CPU cores", "GPUs", "cache"):
        assert name in result.stdout


def test_check_of_a_model_that_is_not_there():
    result = run("check", "/no/such/model")
    assert result.exit_code == 2
    assert result.stderr == "nanoflow: /no/such/model: no such file or directory; check the path\n"


def test_help_imports_no_torch():
    code = "import nanoflow_compiler.cli, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n"


def test_real_model_in_a_process(smollm2):
    command = [*NANOFLOW, "generate", str(smollm2.path), "--max-tokens", "16"]
    command += ["--prompt", "What is the capital of France?"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "The capital of France is Paris.\n"
    # torch says so itself where CUDA is installed and its GPUs are hidden.
    lines = [line for line in result.stderr.splitlines() if "No CUDA runtime" not in line]
    assert len(lines) == 1


def test_real_model_report_in_a_process(smollm2):
    command = [*NANOFLOW, "check", str(smollm2.path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "gemm" in result.stdout.lower()
