"""Tiers of tests, golden files, and the real model that several of them share."""

import difflib
import os
from pathlib import Path

import pytest
import torch

from nanoflow_compiler.models import Decoder, load_decoder

GOLDEN = Path(__file__).parent / "golden"
LONGEST = ("test_under_load.py", "test_smollm2.py")
NEEDED_GPUS = {"gpu": 1, "multigpu": 2}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--accept", action="store_true", help="write what golden files should hold")


def pytest_configure():
    # Workers that run side by side share the cores, as do the processes that they start.
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config, items):
    run_slow = config.getoption("--slow") or "slow" in config.getoption("-m")
    num_gpus = torch.cuda.device_count()
    # The longest first, so that they are not what one worker is left with at the end.
    items.sort(key=lambda item: item.path.name not in LONGEST)
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


@pytest.fixture
def golden(request):
    """``golden(name, text)`` compares a text with a file; ``--accept`` writes the file instead."""

    def compare(name, text):
        path = GOLDEN / name
        if request.config.getoption("--accept"):
            path.write_text(text, encoding="utf-8")
            return
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        changes = difflib.unified_diff(kept.splitlines(), text.splitlines(), name, "now", n=1)
        if difference := "\n".join(changes):
            pytest.fail(
                f"{difference}\n\nIf this is as it should be: pytest --accept", pytrace=False
            )

    return compare
