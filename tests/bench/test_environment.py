import json
import os
import subprocess
import sys

import pytest

from nanoflow_compiler.bench.environment import environment
from nanoflow_compiler.bench.report import check_writable, percentiles, write_json
from nanoflow_compiler.errors import ConfigError


def test_it_names_machine_versions_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/nanoflow", "bench", "host", "--seed", "a b"])
    found = environment(3)
    assert found["command"] == "nanoflow bench host --seed 'a b'"
    assert found["threads"] == 3
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["cpu"]
    assert found["versions"].keys() >= {"torch", "transformers", "nanoflow-compiler"}


@pytest.mark.parametrize("words", [["--api-key", "hidden"], ["--api-key=hidden"]])
def test_secrets_are_not_kept(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["nanoflow", *words, "--port", "1"])
    command = environment()["command"]
    assert "hidden" not in command
    assert command.endswith("--port 1")


def test_commit_is_that_of_the_checkout():
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert environment()["commit"].removesuffix("-dirty") == head.stdout.strip()


def test_report_holds_results_settings_and_environment(tmp_path):
    path = tmp_path / "new" / "out.json"
    check_writable(path)
    write_json(path, {"rate": 1.5}, settings={"path": tmp_path, "seed": 3}, threads=2)
    report = json.loads(path.read_text())
    assert report["rate"] == 1.5
    assert report["settings"] == {"path": str(tmp_path), "seed": 3}
    assert report["environment"]["threads"] == 2


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "out.json"):
        with pytest.raises(ConfigError, match=r"cannot be (written|made)"):
            check_writable(path)


def test_percentiles_are_named_by_rank():
    assert percentiles([1.0, 2.0, 3.0], (50, 99.9)) == {"50": 2.0, "99.9": pytest.approx(2.998)}
