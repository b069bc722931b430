"""Throughput of vLLM on the requests of ``nanoflow bench throughput``.

    python benchmarks/peers/vllm_throughput.py --dummy-weights llama-3.1-8b --output-json FILE

It runs with its own defaults (CUDA graphs, chunked prefill, prefix caching) and asynchronous scheduling,
on dummy weights and token ids: neither weights nor a tokenizer are needed.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from common import Peer, given, make_parser, measure, read_config

from nanoflow_compiler.bench.dataset import BenchRequest


def main() -> None:
    """Refuse where vLLM is absent."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--gpu-memory-utilization", type=float)
    options = parser.parse_args()
    if find_spec("vllm") is None:
        raise SystemExit(
            "vllm is not installed here; in an environment of its own: pip install vllm, then run this "
            "script with the repository on PYTHONPATH"
        )
    with tempfile.TemporaryDirectory() as folder:
        measure(options, lambda: start(options, Path(folder)))


def start(options: argparse.Namespace, folder: Path) -> Peer:
    """``LLM`` of vLLM on a directory that holds nothing but the configuration."""
    from vllm import LLM, SamplingParams

    config = read_config(options.dummy_weights)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    llm = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=options.dtype,
        seed=options.seed,
        async_scheduling=True,
        **given(
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            gpu_memory_utilization=options.gpu_memory_utilization,
        ),
    )

    def run(requests: Sequence[BenchRequest]) -> int:
        outputs = llm.generate(
            [{"prompt_token_ids": request.prompt_token_ids} for request in requests],
            [
                SamplingParams(
                    temperature=options.temperature,
                    ignore_eos=True,
                    max_tokens=request.output_len,
                    detokenize=False,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    longest = options.max_model_len or config["max_position_embeddings"]
    return Peer(package="vllm", run=run, longest=longest)


if __name__ == "__main__":
    main()
