"""What an installed copy holds: the files, the names and the entry points of a checkout."""

import importlib
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import nanoflow_compiler

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("backends", "models", "passes")
PUBLIC = {
    "LLM",
    "AsyncEngine",
    "CompileConfig",
    "EngineConfig",
    "EngineSpec",
    "SamplingParams",
    "StructuredOutputsParams",
    "nanoflow",
}


def tracked_files():
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [name for name in listing.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """An sdist and a wheel, built from a copy without leftovers of earlier builds."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in tracked_files():
        source, target = ROOT / name, checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def expected_files():
    """Installed name of every file of the package, linked folders included."""
    suffixes = (".py", ".json", "py.typed")
    names = [name for name in tracked_files() if name.endswith(suffixes)]
    core = {name for name in names if name.startswith("nanoflow_compiler/")}
    linked = {f"nanoflow_compiler/{name}" for name in names if name.split("/")[0] in LINKED}
    return core | linked


def test_wheel_holds_every_file_of_the_tree(distributions):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        is_link = [info.external_attr >> 28 == 0o12 for info in archive.infolist()]
    assert files == expected_files()
    assert not any(is_link)


def test_sdist_holds_every_file_of_the_tree(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert expected_files() <= files


@pytest.mark.parametrize("folder", LINKED)
def test_bare_import_is_refused(folder):
    command = [sys.executable, "-c", f"import {folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"ImportError: import nanoflow_compiler.{folder}" in result.stderr
    assert importlib.import_module(f"nanoflow_compiler.{folder}").__name__.endswith(folder)


def test_all_is_exact():
    errors = importlib.import_module("nanoflow_compiler.errors")
    assert set(nanoflow_compiler.__all__) == PUBLIC | set(errors.__all__)
    for name in nanoflow_compiler.__all__:
        assert getattr(nanoflow_compiler, name).__module__.startswith("nanoflow_compiler")


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("torch_dynamo_backends", "nanoflow_compiler:nanoflow"),
        ("console_scripts", "nanoflow_compiler.cli:main"),
    ],
)
def test_entry_points(group, target):
    points = distribution("nanoflow-compiler").entry_points.select(group=group, name="nanoflow")
    assert [point.value for point in points] == [target]
    assert callable(next(iter(points)).load())


def test_import_touches_no_gpu_and_no_network():
    code = (
        "import sys, socket; socket.socket.connect = None; import nanoflow_compiler, torch;"
        "assert not torch.cuda.is_initialized();"
        "assert 'triton' not in sys.modules or not torch.cuda.is_available()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
