"""Throughput of transformers' continuous batching on the requests of ``nanoflow bench throughput``.

    python benchmarks/peers/transformers_throughput.py --dummy-weights llama-3.1-8b --output-json FILE

``init_continuous_batching`` with paged attention and its own defaults (CUDA graphs and the size of the cache
are its choice) on dummy weights; needs transformers 5.17 or newer.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from common import Peer, given, make_parser, measure

from nanoflow_compiler.bench.dataset import BenchRequest


def main() -> None:
    """Refuse where transformers is absent or has no continuous batching."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dummy-distribution", default="normal", choices=("normal", "uniform"))
    parser.add_argument("--attn-implementation", default="paged|sdpa")
    parser.add_argument("--num-blocks", type=int, help="Of its KV cache; by default its choice.")
    options = parser.parse_args()
    if find_spec("transformers") is None or not has_continuous_batching():
        raise SystemExit(
            "transformers 5.17 or newer is not installed here: pip install 'transformers>=5.17'"
        )
    measure(options, lambda: start(options))


def has_continuous_batching() -> bool:
    """Under the names that are used here."""
    import transformers

    return hasattr(transformers, "ContinuousBatchingConfig")


def start(options: argparse.Namespace) -> Peer:
    """A manager, whose cache and graphs are there after the warm-up."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from nanoflow_compiler.models import load_decoder

    decoder = load_decoder(
        options.dummy_weights,
        dtype=options.dtype,
        device=options.device,
        load_format="dummy",
        dummy_distribution=options.dummy_distribution,
    )
    model: Any = decoder.model
    model.set_attn_implementation(options.attn_implementation)
    config = ContinuousBatchingConfig(
        **given(
            max_requests_per_batch=options.max_num_seqs,
            max_batch_tokens=options.max_num_batched_tokens,
            num_blocks=options.num_blocks,
        )
    )
    sampling = {"do_sample": True, "temperature": options.temperature}
    generation = GenerationConfig(
        **(sampling if options.temperature else {"do_sample": False}),
        eos_token_id=-1,
        pad_token_id=0,
    )

    manager = model.init_continuous_batching(generation, config)
    manager.start()

    def run(requests: Sequence[BenchRequest]) -> int:
        for request in requests:
            manager.add_request(request.prompt_token_ids, max_new_tokens=request.output_len)
        return sum(len(next_result(manager).generated_tokens) for _ in requests)

    return Peer(
        package="transformers",
        run=run,
        longest=options.max_model_len or decoder.max_model_len,
        close=lambda: manager.stop(block=True),
    )


def next_result(manager: Any) -> Any:
    """What the manager finished next."""
    while (result := manager.get_result(timeout=1)) is None:
        if not manager.is_running():
            raise SystemExit("the manager of transformers stopped; its log above says why")
    if result.error:
        raise SystemExit(f"transformers: {result.error}")
    return result


if __name__ == "__main__":
    main()
