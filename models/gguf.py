"""GGUF files: unpacked into a plain model, with the tokenizer that their metadata describes."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from nanoflow_compiler.errors import ModelLoadError
from nanoflow_compiler.models.gguf_header import GGUFHeader, read_gguf_header
from nanoflow_compiler.models.messages import one_line
from nanoflow_compiler.models.progress import progress_bar
from nanoflow_compiler.models.quiet import quiet_transformers

__all__ = ["convert_gguf", "load_gguf"]

DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
"""Values of ``tokenizer.ggml.pre`` whose tokenizers cut numbers into single digits first."""
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""Name in GGUF metadata -> name in transformers."""


def convert_gguf(file: Path, out: Path) -> None:
    """Write ``file`` into the directory ``out`` as float32 safetensors, configuration and tokenizer."""
    model, tokenizer = load_gguf(file, dtype=torch.float32)
    with quiet_transformers():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def load_gguf(
    file: Path, *, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The unpacked model and its tokenizer; ``dtype=None`` chooses float32."""
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ModelLoadError(
                f"{file} needs the package {package}; install nanoflow-compiler[demo]"
            )
    header = read_gguf_header(file)
    try:
        with quiet_transformers(), _unpacking_bar(f"Unpacking {file.name}"):
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=dtype or torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the converters of transformers raise whatever they trip over
        raise ModelLoadError(
            f"{file} (architecture {header.architecture}) cannot be converted: {one_line(error)}; "
            "use the safetensors version of this model"
        ) from error
    return model, _corrected(tokenizer, header)


@contextmanager
def _unpacking_bar(label: str) -> Iterator[None]:
    """Our bar in place of the one that transformers draws while it unpacks, whatever its settings."""
    module: Any = modeling_gguf_pytorch_utils
    theirs = getattr(module, "tqdm", None)

    def ours(tensors: Collection[object], **_: object) -> Iterator[object]:
        with progress_bar(label, total=len(tensors)) as bar:
            for tensor in tensors:
                yield tensor
                bar.advance()

    module.tqdm = ours
    try:
        yield
    finally:
        module.tqdm = theirs


def _corrected(tokenizer: PreTrainedTokenizerBase, header: GGUFHeader) -> PreTrainedTokenizerBase:
    """Apply what the metadata says and the converter of transformers leaves out."""
    for theirs, ours in SPECIAL_TOKENS.items():
        token_id = header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{ours}_token", tokenizer.convert_ids_to_tokens(int(token_id)))
    tokenizer.clean_up_tokenization_spaces = False
    context = header.metadata.get(f"{header.architecture}.context_length")
    if context is not None:
        tokenizer.model_max_length = int(context)
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        _correct_byte_level(tokenizer, str(header.metadata.get("tokenizer.ggml.pre")))
    return tokenizer


def _correct_byte_level(tokenizer: PreTrainedTokenizerBase, pre: str) -> None:
    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.ByteLevel()  # theirs also turns a literal U+2581 into a space
    if pre in DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
