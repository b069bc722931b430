import subprocess
import sys

import pytest

from nanoflow_compiler.errors import ModelLoadError
from nanoflow_compiler.models.storage import build_directory

BUILD_SLOWLY = """
import sys, time
from pathlib import Path
from nanoflow_compiler.models.storage import build_directory

def build(out):
    print("building", flush=True)
    (out / "first").write_text("1")
    time.sleep(float(sys.argv[2]))
    (out / "second").write_text("2")

build_directory(Path(sys.argv[1]), build)
"""


def start(target, seconds):
    command = [sys.executable, "-c", BUILD_SLOWLY, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_builds_once(tmp_path):
    calls = []
    for _ in range(2):
        target = build_directory(tmp_path / "a" / "b", calls.append)
    assert target.is_dir()
    assert len(calls) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path, error):
    def fail(out):
        (out / "half").write_text("x")
        raise error

    with pytest.raises(error):
        build_directory(tmp_path / "model", fail)
    assert visible(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    process = start(tmp_path / "model", 60)
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.communicate()
    assert len(visible(tmp_path)) == 1  # its scratch directory, under another name
    build_directory(tmp_path / "model", lambda out: (out / "file").touch())
    assert visible(tmp_path) == ["model"]


def test_two_processes_build_once(tmp_path):
    processes = [start(tmp_path / "model", 0.5) for _ in range(2)]
    printed = [process.communicate()[0] for process in processes]
    assert sorted(printed) == ["", "building\n"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["first", "second"]


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelLoadError, match="NANOFLOW_CACHE"):
        build_directory(tmp_path / "file" / "model", lambda _: None)
