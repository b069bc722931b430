"""Green contexts without a GPU: what is asked of the driver, and what is said when it has none."""

from types import SimpleNamespace

import pytest
import torch

from nanoflow_compiler.backends import green_contexts, lanes
from nanoflow_compiler.backends.green_contexts import divide
from nanoflow_compiler.backends.lanes import Budgets, lane_streams
from nanoflow_compiler.errors import ConfigError

DEVICE = torch.device("cuda", 0)


class Status(int):
    name = "CUDA_ERROR_NOT_SUPPORTED"


def sms(count):
    return SimpleNamespace(sm=SimpleNamespace(smCount=count))


class Driver:
    """Divides 132 multiprocessors in steps of 8."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    broken = None

    def __init__(self):
        self.num_splits = 0

    def __getattr__(self, name):
        def answer(*arguments):
            if name == self.broken:
                return (Status(801),)
            return (Status(0), *self.answers(name, *arguments))

        return answer

    def answers(self, name, *arguments):
        if name == "cuDeviceGetDevResource":
            return (sms(132),)
        if name == "cuDevSmResourceSplitByCount":
            self.num_splits += 1
            group = -(-arguments[3] // 8) * 8
            return ([sms(group)], 1, sms(132 - group))
        return (name,)


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    green_contexts._divide.cache_clear()
    lanes._sides.cache_clear()
    monkeypatch.setattr(green_contexts, "_driver", lambda: found)
    monkeypatch.setattr(green_contexts, "_wake", lambda _: None)
    monkeypatch.setattr(lanes, "_check_events", lambda *_: None)
    yield found
    green_contexts._divide.cache_clear()
    lanes._sides.cache_clear()
    lanes._OF_THREAD.made.clear()


def test_one_division_is_kept(driver):
    division = divide(DEVICE, sms=37)
    assert (division.group.num_sms, division.rest.num_sms) == (40, 92)
    assert divide(torch.device("cuda"), sms=37) is division
    assert driver.num_splits == 1


@pytest.mark.parametrize("count", [0, 132, 200])
@pytest.mark.usefixtures("driver")
def test_no_side_is_empty(count):
    with pytest.raises(ConfigError, match="between 1 and 131"):
        divide(DEVICE, sms=count)


def test_a_driver_without_green_contexts_is_named(driver):
    driver.broken = "cuGreenCtxCreate"
    with pytest.raises(ConfigError, match="cuGreenCtxCreate says CUDA_ERROR_NOT_SUPPORTED"):
        divide(DEVICE, sms=40)


def test_the_package_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(green_contexts, "import_module", missing)
    with pytest.raises(ConfigError, match="cuda-bindings; install nanoflow-compiler"):
        green_contexts._driver()


def test_budgets_fall_back_to_blocks_with_one_warning(driver):
    driver.broken = "cuDeviceGetDevResource"
    budgets = Budgets(kind="green", num_sms=132, memory_sms=40)
    with pytest.warns(UserWarning, match="not by green contexts: .*cuDeviceGetDevResource") as told:
        _, kind = lane_streams(DEVICE, budgets)
    assert (kind, len(told)) == ("ctas", 1)
    assert lane_streams(DEVICE, budgets)[1] == "ctas"


@pytest.mark.usefixtures("driver")
def test_lanes_have_their_sides():
    seats, kind = lane_streams(DEVICE, Budgets(kind="green", num_sms=132, memory_sms=40))
    assert kind == "green"
    assert {lane: side.num_sms for lane, side in seats._sides.items()} == {0: 92, 1: 40}
