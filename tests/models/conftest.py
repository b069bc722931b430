"""Small model directories that tests damage, and checks of the error they then get."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nanoflow_compiler.errors import ModelLoadError

VOCABULARY = ["<s>", "</s>", "<unk>", "hello", "world"]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A Llama of two layers with a tokenizer, in one safetensors file."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {word: index for index, word in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def llama_dir(pristine, tmp_path):
    """A copy that the test may damage."""
    return shutil.copytree(pristine, tmp_path / "llama")


@pytest.fixture
def sharded_dir(pristine, llama_dir):
    """The same model in several safetensors files with an index."""
    (llama_dir / "model.safetensors").unlink()
    model = LlamaForCausalLM.from_pretrained(pristine)
    model.save_pretrained(llama_dir, max_shard_size="6KB")
    assert len(list(llama_dir.glob("*.safetensors"))) > 1
    return llama_dir


@pytest.fixture
def edit_json():
    def edit(path, **changes):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.fixture
def refuses():
    """Call a function that must raise a one-line ModelLoadError with all of the given words."""

    def check(function, *args, words, **kwargs):
        with pytest.raises(ModelLoadError) as caught:
            function(*args, **kwargs)
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message

    return check
