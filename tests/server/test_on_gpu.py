"""``nanoflow serve`` on a GPU, in processes of its own: a stream, its metrics, and its end."""

import json
import signal
import sys

import httpx
import pytest

from server.live import wait_until
from server.server_process import ServerProcess, is_alive, is_idle, metrics_of
from tiny_models import llama
from tiny_tokenizers import byte_tokenizer

PROMPT, NUM_TOKENS = "one two three", 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration and a tokenizer: the weights are random."""
    folder = tmp_path_factory.mktemp("model")
    llama(vocab_size=300).config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def nanoflow(folder, *flags):
    command = "from nanoflow_compiler.cli import main; main()"
    flags = ["--port", "0", "--load-format", "dummy", "--max-num-seqs", "16", *flags]
    return ServerProcess(sys.executable, "-c", command, "serve", str(folder), *flags)


def stream(url, **settings):
    """The texts of the chunks of a completion, and its usage."""
    body = {"model": "m", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
    texts, usage = [], None
    with httpx.stream("POST", f"{url}/v1/completions", json=body | settings, timeout=60) as answer:
        assert answer.status_code == 200
        data = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    for chunk in map(json.loads, data):
        texts += [choice["text"] for choice in chunk["choices"]]
        usage = chunk.get("usage") or usage
    return texts, usage


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("device", "flags"),
    [
        # A start takes seconds, and CPUs are served to in other tests.
        pytest.param("cpu", ["--enforce-eager"], marks=pytest.mark.slow),
        pytest.param("cuda", [], marks=pytest.mark.gpu),
        pytest.param("cuda", ["--parts", "2"], marks=pytest.mark.gpu),
    ],
)
def test_a_server(folder, device, flags):
    with nanoflow(folder, "--device", device, "--served-model-name", "m", *flags) as server:
        url = server.url
        children = server.children
        texts, usage = stream(url)
        assert usage["completion_tokens"] == NUM_TOKENS
        assert len(texts) >= 2
        assert "".join(stream(url)[0]) == "".join(texts)
        found = metrics_of(url)
        assert found["generation_tokens_total"] == 2 * NUM_TOKENS
        assert found["prompt_tokens_total"] == 2 * len(PROMPT)
        wait_until(lambda: is_idle(url))
        table = "".join(server.log.split())
        assert device in table
        assert ("capture" in table) == (device == "cuda")
        assert not [word for word in ("not captured", "Traceback") if word in server.log]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        wait_until(lambda: not any(map(is_alive, children)))
