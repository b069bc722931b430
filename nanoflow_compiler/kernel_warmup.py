"""Has our kernels compiled beside the compilation of a model, by a process that needs no GPU.

They are known from the model's configuration, long before a step first launches them. The process
leaves them in Triton's cache. It is a help and no part of the start: whatever goes wrong in it is logged,
and a kernel that is not there is compiled when it is first launched.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING

import torch

from nanoflow_compiler.config import cache_dir
from nanoflow_compiler.graphs import dtype_name

if TYPE_CHECKING:  # the process knows nothing of models, and starts sooner
    from nanoflow_compiler.models.hf import PackedDecoder

__all__ = ["AttentionLayer", "KernelWarmup", "Warmup", "choose_kernel_cache"]

_LOG = logging.getLogger(__name__)

_LAST_WORDS_S = 2.0
"""For a process that is told to end; while it imports it does not hear."""
TIMEOUT_S = 20.0
"""For a process that was begun before the model was compiled."""


def choose_kernel_cache() -> None:
    """Where Triton keeps kernels, for this process and those that it starts, unless the user says.

    Inductor chooses for its process when it first compiles, in the middle of a start: what was compiled
    before, or by another process, would not be found again.
    """
    if "TRITON_HOME" not in os.environ:
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What kernels of attention are compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    softcap: float


@dataclass(frozen=True, slots=True)
class Warmup:
    """What all kernels of a model are compiled for."""

    capability: int
    """Of the GPU: 90 for Hopper."""
    device_name: str
    hidden_size: int
    vocab_size: int
    dtype: str
    """Of linears and logits."""
    layers: tuple[AttentionLayer, ...]
    """Each kind once."""

    @classmethod
    def of(cls, packed: "PackedDecoder") -> "Warmup":
        """Read from the configuration, and so a guess where a model does as it likes."""
        config = packed.model.config.get_text_config()
        softcap = float(getattr(config, "attn_logit_softcapping", None) or 0.0)
        kinds = dict.fromkeys(
            AttentionLayer(
                num_heads=config.num_attention_heads,
                num_kv_heads=layer.num_kv_heads,
                head_dim=layer.head_dim,
                v_head_dim=layer.v_head_dim,
                dtype=dtype_name(layer.dtype),
                softcap=softcap,
            )
            for layer in packed.layers
        )
        major, minor = torch.cuda.get_device_capability(packed.device)
        return cls(
            capability=10 * major + minor,
            device_name=torch.cuda.get_device_name(packed.device),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            dtype=dtype_name(packed.model.dtype),
            layers=(*kinds,),
        )


class KernelWarmup:
    """The process."""

    def __init__(self, process: "subprocess.Popen[bytes]", messages: IO[bytes]) -> None:
        self._process = process
        self._messages = messages

    @classmethod
    def start(cls, packed: "PackedDecoder") -> "KernelWarmup | None":
        """None where there is no GPU, or no process can be had."""
        if packed.device.type != "cuda":
            return None
        try:
            return cls.run(json.dumps(asdict(Warmup.of(packed))))
        except Exception as error:  # of a configuration that is like no other, or of the system
            _LOG.info("kernels are compiled when they are first launched: %s", error)
            return None

    @classmethod
    def run(cls, warmup: str) -> "KernelWarmup":
        messages = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        command = [sys.executable, "-m", "nanoflow_compiler.kernels.warm", warmup]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # nothing is written to it: its end is that of this process
            stdout=subprocess.DEVNULL,
            stderr=messages,
            # The GPU's memory is divided by what is free: nobody else is to use some for a while.
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # with processes of its own
        )
        return cls(process, messages)

    def wait(self) -> bool:
        """Until the kernels are there, or it takes too long; whether they are."""
        try:
            code = self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _LOG.info("kernels were not compiled within %g s beside the model", TIMEOUT_S)
            return False
        finally:
            self.close()
        return code == 0

    def close(self) -> None:
        """End the process, and log why it failed if it did."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.wait() > 0:
            self._messages.seek(0)
            last = self._messages.read().decode(errors="replace").strip().rpartition("\n")[2]
            _LOG.info("kernels are compiled when they are first launched: %s", last)
        self._messages.close()
