"""Settings that cannot be are refused; those that can have an effect."""

import logging
import ssl
import subprocess

import httpx
import pytest

from nanoflow_compiler import ConfigError
from nanoflow_compiler.server.settings import ServerSettings
from server.answers import error_of
from server.fake_engine import FakeEngine
from server.live import serving

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "setting",
    [
        {"port": 70000},
        {"max_request_bytes": 0},
        {"max_num_queued_reqs": 0},
        {"max_num_queued_tokens": 0},
        {"stream_interval": 0},
        {"request_timeout": 0},
        {"shutdown_timeout": -1},
        {"api_keys": ("",)},
        {"root_path": "llm"},
        {"metrics_prefix": "a:b"},
        {"tool_call_parser": "pythonic"},
        {"uvicorn_log_level": "loud"},
        {"generation_config": "mine"},
        {"chat_template": "/no/such/file.jinja"},
        {"ssl_certfile": "/no/such/file.pem"},
        {"ssl_keyfile": __file__},
        {"ssl_cert_reqs": 3},
    ],
    ids=str,
)
def test_settings_that_cannot_serve(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ServerSettings(**setting)


async def test_a_chat_template_in_a_file(make_api, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("say: {{ messages[0].content }}")
    api = make_api(chat_template=str(file))
    await api.chat("hi")
    assert api.engine.tokenizer.decode(list(api.engine.seen[0][1])) == "say: hi"


async def test_auto_tool_choice(make_api):
    tools = [{"type": "function", "function": {"name": "f"}}]
    await make_api(enable_auto_tool_choice=True).chat(tools=tools)
    error = error_of(await make_api(enable_auto_tool_choice=False).chat(tools=tools, status=400))
    assert error["param"] == "tools"
    with pytest.raises(ConfigError, match="tool_call_parser"):
        make_api(enable_auto_tool_choice=True, chat_template="{{ messages }}")


def test_a_template_that_hides_tools_is_told_of(make_api, caplog):
    make_api(tool_call_parser="hermes", chat_template="{{ messages }}{{ tools }}")
    assert not caplog.text
    make_api(tool_call_parser="hermes", chat_template="{{ messages }}")
    assert "does not show tools" in caplog.text


async def test_what_the_model_recommends_is_for_fields_that_a_request_leaves_out(make_api):
    engine = FakeEngine()
    engine.sampling_defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    api = make_api(engine)
    await api.complete(temperature=1.0, top_p=None)
    await api.chat(top_k=0)
    await make_api(engine, generation_config="vllm").complete()
    chosen = [(one.temperature, one.top_p, one.top_k) for _, _, one in engine.seen]
    assert chosen == [(1.0, 0.9, 20), (0.6, 0.9, 0), (1.0, 1.0, 0)]


async def test_browsers_of_allowed_origins_may_ask(make_api):
    api = make_api(
        allowed_origins=("https://a.example",), allow_credentials=True, api_keys=("key",)
    )
    asked = {"access-control-request-method": "POST"}
    good = await api.http.options(
        "/v1/completions", headers=asked | {"origin": "https://a.example"}
    )
    assert good.headers["access-control-allow-origin"] == "https://a.example"
    assert good.headers["access-control-allow-credentials"] == "true"
    bad = await api.http.options("/v1/completions", headers=asked | {"origin": "https://b.example"})
    assert bad.status_code == 400


async def test_methods_of_browsers(make_api):
    api = make_api(allowed_origins=("*",), allowed_methods=("GET",), allowed_headers=("x-a",))
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert (await api.http.options("/v1/completions", headers=headers)).status_code == 400
    headers |= {"access-control-request-method": "GET", "access-control-request-headers": "x-a"}
    assert (await api.http.options("/v1/models", headers=headers)).status_code == 200


async def test_lines_of_requests(make_api, caplog):
    caplog.set_level(logging.DEBUG, "nanoflow_compiler.server")
    for is_logged in (True, False):
        api = make_api(enable_log_requests=is_logged)
        await api.complete("hello", max_tokens=2, n=2, request_id="mine")
        arrived, ended = (one for one in caplog.records if "cmpl-mine-0" in one.message)
        assert "arrived with 5 tokens" in arrived.message
        assert "5 tokens in, 4 out, length, length" in ended.message
        assert arrived.levelno == logging.DEBUG
        assert ended.levelno == (logging.INFO if is_logged else logging.DEBUG)
        caplog.clear()


@pytest.fixture
def certificate(tmp_path):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    options = (
        "-x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    )
    command = ["openssl", "req", "-keyout", key, "-out", certificate]
    try:
        subprocess.run([*command, *options.split()], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not here")
    return {"ssl_keyfile": key, "ssl_certfile": certificate}


def test_https(certificate):
    with serving(FakeEngine(), **certificate) as live:
        url = live.url.replace("http:", "https:")
        context = ssl.create_default_context(cafile=certificate["ssl_certfile"])
        assert httpx.get(f"{url}/health", verify=context).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
