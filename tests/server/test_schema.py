"""Whatever fits the OpenAPI schema, or almost does, is answered, and never with a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from nanoflow_compiler.server.app import create_app
from nanoflow_compiler.server.settings import ServerSettings
from server.fake_engine import FakeEngine

app = create_app(FakeEngine(max_model_len=64), ServerSettings())
schema = schemathesis.openapi.from_asgi("/openapi.json", app)
# Its enumeration of every edge of every field takes ten times as long as a few random bodies.
quick = schemathesis.openapi.from_asgi("/openapi.json", app)
quick.config.phases.update(phases=["fuzzing"])
common = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@quick.parametrize()
@settings(max_examples=15, **common)
def test_no_server_error(case):
    case.call_and_validate(checks=[not_a_server_error])


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=50, **common)
def test_no_server_error_in_many_examples(case):
    case.call_and_validate(checks=[not_a_server_error])
