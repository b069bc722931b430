"""A tiny model on disk, as commands name one."""

import pytest

from tiny_models import llama
from tiny_tokenizers import byte_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama(vocab_size=300, num_hidden_layers=1).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder
