"""The page about the server names what there is."""

import re
from dataclasses import fields
from pathlib import Path

from nanoflow_compiler.server.fields import HARMLESS, REFUSED
from nanoflow_compiler.server.metric_names import COUNTERS, HISTOGRAMS
from nanoflow_compiler.server.protocol import CompletionRequest
from nanoflow_compiler.server.protocol_chat import ChatRequest
from nanoflow_compiler.server.settings import ServerSettings

PAGE = (Path(__file__).parents[2] / "docs/server.md").read_text(encoding="utf-8")
NAMES = set(re.findall(r"`([\w_]+)`", PAGE))


def test_settings_are_those_of_the_table():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", PAGE, re.MULTILINE))
    assert rows == {field.name: repr(field.default) for field in fields(ServerSettings)}


def test_every_field_is_named():
    assert CompletionRequest.model_fields.keys() <= NAMES
    assert ChatRequest.model_fields.keys() <= NAMES
    assert REFUSED.keys() | HARMLESS <= NAMES


def test_every_metric_is_named():
    assert HISTOGRAMS.keys() <= NAMES
    assert {f"{name}_total" for name in COUNTERS} <= NAMES
