import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from nanoflow_compiler.models import resolve_model


def fake_hub(monkeypatch, outcome):
    """Stand in for the hub: an exception to raise, or the folder that a download gives."""
    calls = []

    def snapshot_download(hub_id, *, allow_patterns):
        calls.append((hub_id, allow_patterns))
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_paths(pristine, tmp_path):
    assert resolve_model(pristine) == pristine
    assert resolve_model(str(pristine)) == pristine
    file = tmp_path / "only.gguf"
    file.touch()
    assert resolve_model(file) == file
    assert resolve_model(tmp_path) == file


def test_hub(pristine, monkeypatch):
    calls = fake_hub(monkeypatch, pristine)
    assert resolve_model("org/name") == pristine
    assert resolve_model("org/name", weights=False) == pristine
    assert [("*.safetensors" in patterns) for _, patterns in calls] == [True, False]


def test_unreachable_hub(monkeypatch, refuses):
    fake_hub(monkeypatch, LocalEntryNotFoundError("no route to host\nand more"))
    refuses(resolve_model, "org/name", words=["org/name", "no route to host", "pass the path"])


def test_unknown_hub_id(monkeypatch, refuses):
    class NotFoundError(RepositoryNotFoundError):
        def __init__(self):
            Exception.__init__(self)

    fake_hub(monkeypatch, NotFoundError())
    refuses(resolve_model, "smollm-135m", words=["no model", "did you mean smollm2-135m?"])


@pytest.mark.parametrize("name", ["/no/such/dir", "./none", "a/b/c", "missing.gguf", "", "~/none"])
def test_no_such_path(name, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, AssertionError("the hub was asked"))
    if name:
        refuses(resolve_model, name, words=["no such file or directory"])
    else:
        refuses(resolve_model, name, words=["config.json"])  # the empty path is the current folder


def test_catalog_has_no_weights(refuses):
    refuses(resolve_model, "llama-3-8b", words=["dummy", "meta-llama/Meta-Llama-3-8B"])
    refuses(resolve_model, "bench-1b", words=["dummy"])


def test_directory_without_a_model(tmp_path, refuses):
    refuses(resolve_model, tmp_path, words=[str(tmp_path), "neither a config.json"])


def test_directory_with_several_models(tmp_path, refuses):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    refuses(resolve_model, tmp_path, words=["several models", "a.gguf, b.gguf"])


def test_other_file(tmp_path, refuses):
    file = tmp_path / "model.safetensors"
    file.touch()
    refuses(resolve_model, file, words=["not .gguf", "directory"])
