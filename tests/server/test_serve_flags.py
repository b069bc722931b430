"""What users type after ``nanoflow serve``, those of vLLM included."""

import json
from contextlib import nullcontext
from dataclasses import fields

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import nanoflow_compiler.serve
from nanoflow_compiler.cli import app
from nanoflow_compiler.cli.server_flags import PLURALS
from nanoflow_compiler.cli.vllm_flags import UNSUPPORTED
from nanoflow_compiler.engine.engine_process import EngineProcess
from nanoflow_compiler.server.settings import ServerSettings


@pytest.fixture(autouse=True)
def _no_process(monkeypatch):
    monkeypatch.setattr(EngineProcess, "early", nullcontext)


@pytest.fixture
def serve(monkeypatch):
    """Runs the command as far as the server would start; returns how it was told to."""
    configs = []

    def take(config, *, early):
        assert early is None
        configs.append(config)

    monkeypatch.setattr(nanoflow_compiler.serve, "serve_model", take)

    def run(*arguments):
        result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
        assert result.exit_code == 0, result.stderr
        return configs.pop()

    return run


def refused(*arguments):
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2
    return " ".join(result.stderr.split())


def flags():
    return {one.name: one for one in get_command(app).commands["serve"].params}


def test_every_setting_has_a_flag_with_its_default():
    for field in fields(ServerSettings):
        singular = {many: one for one, many in PLURALS.items()}.get(field.name, field.name)
        flag = flags()[singular]
        assert flag.opts == [f"--{singular.replace('_', '-')}"]
        assert flag.default == (None if isinstance(field.default, tuple) else field.default)


def test_defaults_are_those_of_the_settings(serve):
    assert serve("m").server == ServerSettings()


def test_settings_arrive(serve):
    text = "--host 0.0.0.0 --port 0 --root-path /llm --api-key a --api-key b --stream-interval 4"
    text += " --served-model-name x --max-num-queued-reqs 9 --max-num-queued-tokens 99"
    text += (
        " --request-timeout 5 --shutdown-timeout 1.5 --tool-call-parser hermes --allow-credentials"
    )
    text += " --enable-auto-tool-choice --no-enable-log-requests --disable-log-stats"
    text += " --uvicorn-log-level error --metrics-prefix vllm --disable-fastapi-docs"
    text += " --generation-config vllm --max-request-bytes 1000 --allowed-origins * --allowed-methods GET"
    assert serve("m", *text.split()).server == ServerSettings(
        host="0.0.0.0",
        port=0,
        root_path="/llm",
        api_keys=("a", "b"),
        stream_interval=4,
        served_model_names=("x",),
        max_num_queued_reqs=9,
        max_num_queued_tokens=99,
        request_timeout=5.0,
        shutdown_timeout=1.5,
        tool_call_parser="hermes",
        allow_credentials=True,
        enable_auto_tool_choice=True,
        enable_log_requests=False,
        disable_log_stats=True,
        uvicorn_log_level="error",
        metrics_prefix="vllm",
        disable_fastapi_docs=True,
        generation_config="vllm",
        max_request_bytes=1000,
        allowed_origins=("*",),
        allowed_methods=("GET",),
    )


def test_as_users_of_vllm_type_them(serve):
    server = serve(
        "m",
        *("--served-model-name", "one", "two", "--api_key=a", "--api-key", "b", "c"),
        *("--allowed-origins", '["https://a.example", "*"]', "--max_num_queued_reqs", "7"),
        *("--tensor-parallel-size", "1", "-pp", "1", "--enable-chunked-prefill"),
        *("--block_size=64", "--async-scheduling", "--port", "1"),
    ).server
    assert server.served_model_names == ("one", "two")
    assert server.api_keys == ("a", "b", "c")
    assert server.allowed_origins == ("https://a.example", "*")
    assert (server.max_num_queued_reqs, server.port) == (7, 1)
    # Before the model, a list would not know where it ends.
    assert serve("--api-key", "a", "m").server.api_keys == ("a",)


@pytest.mark.parametrize("flag", UNSUPPORTED.split())
def test_flags_of_vllm_alone_are_refused_by_name(flag):
    assert f"--{flag}" not in [name for one in flags().values() for name in one.opts]
    line = refused("m", f"--{flag}", "1")
    assert line.startswith(f"nanoflow: --{flag} is a flag of vLLM that nanoflow does not have; ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size must be 1 here, not '2'"),
        (["-tp", "2"], "--tensor-parallel-size must be 1"),
        (["--kv-cache-dtype=fp8"], "--kv-cache-dtype must be auto"),
        (["--disable-log-requests"], "give --no-enable-log-requests"),
        (["--lora_modules", "x"], "--lora-modules is a flag of vLLM"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--port", "99999"], "port must be"),
        (["--hf-overrides", "{"], "is no JSON object"),
        (["--hf-overrides", "[2]"], "is no JSON object"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        (["--tool-call-parser", "pythonic"], "tool_call_parser must be one of"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, words):
    assert words in refused("m", *arguments)


CONFIG = """
model: from-file
port: 7
served_model_name: name
api-key: [a, b]
enable-auto-tool-choice: true
enable-log-requests: false
dtype: float32
device: cuda:1
max-num-seqs: 5
max-engine-restarts: 2
tokenizer: another
load-format: dummy
dummy-distribution: uniform
hf-overrides: {num_hidden_layers: 2}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return file

    return write


def test_options_of_the_compiler(serve):
    given = '{"kernels": "aten", "parts": 2, "backend": "reference"}'
    flags = ("m", "--compile-options", given)
    assert serve("m").engine.options == {}
    assert serve(*flags).engine.options == json.loads(given)
    expected = {"kernels": "aten", "parts": 4, "backend": "codegen"}
    assert serve(*flags, "--parts", 4, "--backend", "codegen").engine.options == expected
    expected = {"kernels": "aten", "parts": "auto", "backend": "reference"}
    assert serve(*flags, "--parts", "auto").engine.options == expected


def test_a_file_of_flags(serve, write):
    config = serve("--config", write(CONFIG))
    assert config.server == ServerSettings(
        port=7,
        served_model_names=("name",),
        api_keys=("a", "b"),
        enable_auto_tool_choice=True,
        enable_log_requests=False,
    )
    engine = config.engine
    assert (engine.model, engine.tokenizer) == ("from-file", "another")
    assert (engine.dtype, engine.load_format) == ("float32", "dummy")
    assert (engine.device, engine.dummy_distribution) == ("cuda:1", "uniform")
    assert engine.hf_overrides == {"num_hidden_layers": 2}
    assert config.engine.config.max_num_seqs == 5
    assert config.max_engine_restarts == 2


def test_flags_win_over_the_file(serve, write):
    config = serve("m", "--port", 8, "--config", write(CONFIG), "--api-key", "c", "--dtype", "auto")
    assert (config.engine.model, config.engine.dtype) == ("m", "auto")
    assert serve("m", "--device", "cpu").engine.device == "cpu"
    assert serve("m").engine.device == "auto"
    assert serve("m").engine.hf_overrides is None
    overrides = '{"num_hidden_layers": 1, "rope_theta": 1e4}'
    found = serve("m", "--config", write(CONFIG), "--hf_overrides", overrides).engine.hf_overrides
    assert found == {"num_hidden_layers": 1, "rope_theta": 1e4}
    assert (config.server.port, config.server.api_keys) == (8, ("c",))
    assert serve("m", "--config", write("")).server == ServerSettings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no-such-flag: 1", "'no-such-flag', which is no flag"),
        ("lora-modules: x", "'lora-modules', which is no flag"),
        ("config: other.yaml", "'config', which is no flag"),
        ("port: many", "--port"),
        ("- port", "must map flags to values"),
        ("port: [", "config.yaml"),
    ],
)
def test_a_file_that_cannot_be(write, text, words):
    # Rich breaks lines within words, so the words are compared without spaces.
    found = "".join(refused("m", "--config", write(text)).replace("│", "").split())
    assert "".join(words.split()) in found


def test_a_file_that_is_not_there(tmp_path):
    assert "Nosuchfile" in "".join(
        refused("m", "--config", tmp_path / "none.yaml").replace("│", "").split()
    )
