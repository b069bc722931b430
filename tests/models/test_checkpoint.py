import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow_compiler.errors import ModelLoadError
from nanoflow_compiler.models.checkpoint import check_checkpoint, read_json


def test_accepts_one_file_and_several(pristine, sharded_dir):
    check_checkpoint(pristine)
    check_checkpoint(sharded_dir)


def test_no_weights(llama_dir, refuses):
    (llama_dir / "model.safetensors").unlink()
    refuses(check_checkpoint, llama_dir, words=["no model.safetensors", "dummy"])


def test_only_pickled_weights(llama_dir, refuses):
    (llama_dir / "model.safetensors").rename(llama_dir / "pytorch_model.bin")
    refuses(check_checkpoint, llama_dir, words=[".bin", "convert them to safetensors"])


def test_missing_shard_is_named(sharded_dir, refuses):
    shard = sorted(sharded_dir.glob("*.safetensors"))[1]
    shard.unlink()
    refuses(check_checkpoint, sharded_dir, words=["lacks 1 of", shard.name, "download"])


def test_tensor_absent_from_its_shard(sharded_dir, edit_json, refuses):
    index = sharded_dir / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.extra": next(iter(weight_map.values()))})
    refuses(check_checkpoint, sharded_dir, words=["lacks the tensor model.extra", ".safetensors"])


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}'])
def test_unusable_index(sharded_dir, text, refuses):
    (sharded_dir / "model.safetensors.index.json").write_text(text)
    refuses(check_checkpoint, sharded_dir, words=["index.json", "download it again"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_every_truncation_is_refused(llama_dir, pristine, data):
    whole = (pristine / "model.safetensors").read_bytes()
    kept = data.draw(st.integers(0, len(whole) - 1))
    (llama_dir / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(ModelLoadError, match="not a whole safetensors file"):
        check_checkpoint(llama_dir)


@pytest.mark.parametrize("header", [b"nonsense", b"[]", b'{"w": {}}', b'{"w": 1}'])
def test_header_that_is_not_one(llama_dir, header, refuses):
    content = struct.pack("<Q", len(header)) + header
    (llama_dir / "model.safetensors").write_bytes(content)
    refuses(check_checkpoint, llama_dir, words=["model.safetensors", "header"])


def test_read_json_names_the_file(tmp_path, refuses):
    refuses(read_json, tmp_path / "config.json", words=["config.json", "cannot be read"])
