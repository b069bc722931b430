"""Small model directories that tests damage, checks of errors, and packed decoders that run in steps."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.errors import ModelLoadError
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache

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


@pytest.fixture
def run_in_steps():
    """The logits of every token of every sequence, computed in several packed steps.

    ``ends[i][j]`` is how many tokens of sequence j are computed once step i is done: a chunk of its
    prompt, a single token as in decoding, or none. ``step`` is what to call, the decoder or a compilation.
    """

    @torch.no_grad()
    def run(packed, sequences, *, ends, step=None):
        num_blocks = -(-max(map(len, sequences)) // BLOCK_SIZE)
        tables = 1 + np.arange(num_blocks * len(sequences)).reshape(len(sequences), -1)
        cache = KVCache.allocate(packed.layers, num_blocks=tables.size + 1)
        starts = np.zeros(len(sequences), dtype=np.int64)
        pieces = [[] for _ in sequences]
        for stops in map(np.array, ends):
            layout = StepLayout.pack(
                query_lens=stops - starts, context_lens=starts, block_tables=tables
            )
            spans = [torch.arange(*span) for span in zip(starts, stops, strict=True)]
            ids = torch.cat([tokens[span] for tokens, span in zip(sequences, spans, strict=True)])
            with attention_state(AttentionState(cache, (layout.part(0, len(ids)),))):
                logits = (step or packed)(ids, torch.cat(spans), torch.arange(len(ids)))
            for rows, piece in zip(
                logits.split([len(span) for span in spans]), pieces, strict=True
            ):
                piece.append(rows)
            starts = stops
        return [torch.cat(piece) for piece in pieces]

    return run
