"""Whatever fits the OpenAPI schema, or almost does, is answered, and never with a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from nanoflow_compiler.server.app import create_app
from nanoflow_compiler.server.fields import HARMLESS, REFUSED
from nanoflow_compiler.server.protocol import CompletionRequest
from nanoflow_compiler.server.protocol_chat import ChatRequest
from nanoflow_compiler.server.settings import ServerSettings
from server.fake_engine import FakeEngine

app = create_app(FakeEngine(max_model_len=64), ServerSettings())
# Of all its phases: the examples of the schema, every edge of every field, and random bodies.
schema = schemathesis.openapi.from_asgi("/openapi.json", app)
common = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}

ODD = [
    *(True, -1, 0, 3, 2**31, 2**63, -(2**64), 10**400, 0.5, -1e308, 1e-320),
    *("", "x", "\x00", "\N{PILE OF POO}", "{", "5", "a" * 5000),
    *([], [[]], [{}], [""], ["x"], [0], [-1], [10**9], [None], [[0], "x"], [True]),
    *({}, {"": {}}, {"type": "object"}, {"x": None}, {"5": 1e9}, {"type": "json_schema"}),
    *({"json": {}}, {"function": {"name": "x"}}, {"role": "user", "content": [{"type": "text"}]}),
]
CHAT = {"messages": [{"role": "user", "content": "x"}], "tools": []}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@schema.parametrize()
@settings(max_examples=40, **common)
def test_no_server_error(case):
    case.call_and_validate(checks=[not_a_server_error])


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "declared"),
    [
        ("/v1/completions", {"prompt": "x"}, CompletionRequest),
        ("/v1/chat/completions", CHAT, ChatRequest),
        ("/v1/chat/completions", CHAT | {"tools": TOOLS, "stream": True}, ChatRequest),
    ],
    ids=["completions", "chat", "tools"],
)
async def test_every_field_with_every_odd_value(make_api, path, body, declared):
    api = make_api(FakeEngine(max_model_len=64))
    for name in [*declared.model_fields, *REFUSED, *HARMLESS]:
        for value in ODD:
            answer = await api.http.post(path, json=body | {name: value})
            assert answer.status_code < 500, (name, value, answer.text)
            assert '"server_error"' not in answer.text, (name, value, answer.text)
    assert not api.engine.active
