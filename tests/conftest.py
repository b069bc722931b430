"""Tiers of tests, and the real model that several of them share."""

import pytest
import torch

from nanoflow_compiler.models import Decoder, load_decoder

NEEDED_GPUS = {"gpu": 1, "multigpu": 2}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    run_slow = config.getoption("--slow") or "slow" in config.getoption("-m")
    num_gpus = torch.cuda.device_count()
    for item in items:
        if "slow" in item.keywords and not run_slow:
            item.add_marker(pytest.mark.skip(reason="slow: pass --slow"))
        for marker, needed in NEEDED_GPUS.items():
            if marker in item.keywords and num_gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"{marker}: needs {needed} GPU(s)"))


@pytest.fixture(scope="session")
def smollm2() -> Decoder:
    """A real model of 135 M parameters in float32; the first run on a machine downloads 93 MB."""
    return load_decoder("smollm2-135m")
