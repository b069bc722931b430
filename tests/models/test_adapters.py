"""The table of adapters: rows that lead somewhere, imported only when a model needs them."""

import subprocess
import sys
from importlib import import_module

import pytest
from transformers import CONFIG_MAPPING

from nanoflow_compiler.models import ADAPTERS, adapt
from tiny_models import llama

PRINT_LOADED = """
import sys
import nanoflow_compiler.models.hf
from nanoflow_compiler.models import ADAPTERS
print(sorted(set(ADAPTERS.values()) & set(sys.modules)))
"""


@pytest.mark.parametrize("name", ADAPTERS)
def test_rows(name):
    assert name in CONFIG_MAPPING
    assert callable(import_module(ADAPTERS[name]).adapt)


def test_a_model_without_an_adapter_is_left_alone():
    model = llama()
    classes = [type(module) for module in model.modules()]
    adapt(model)
    assert classes == [type(module) for module in model.modules()]


def test_adapters_are_lazy():
    done = subprocess.run(
        [sys.executable, "-c", PRINT_LOADED], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
