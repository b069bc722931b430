"""What the scripts of this folder share: flags, the requests, and the report, as ``nanoflow bench`` has them."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nanoflow_compiler.bench.dataset import BenchRequest, DatasetSettings, Vocabulary
from nanoflow_compiler.bench.report import check_writable, count_results, write_json
from nanoflow_compiler.bench.requests import make_requests
from nanoflow_compiler.errors import NanoflowError

CATALOG = Path(__file__).resolve().parents[2] / "models" / "catalog"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An engine that is ready to run."""

    package: str
    run: Callable[[Sequence[BenchRequest]], int]
    """Answers the requests at full length; the number of new tokens."""
    longest: int
    """Tokens of a prompt and its answer."""
    close: Callable[[], None] = lambda: None


def make_parser(description: str) -> argparse.ArgumentParser:
    """Flags that mean the same as those of ``nanoflow bench throughput``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dummy-weights", required=True, help="Of the catalog, or a directory.")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--random-range-ratio", type=float, default=0.0)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--num-warmups", type=int, default=1)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--output-json", type=Path)
    return parser


def read_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a catalog entry, or of a directory."""
    folder = Path(name)
    path = folder / "config.json" if folder.is_dir() else CATALOG / f"{name}.json"
    if not path.is_file():
        listed = ", ".join(sorted(entry.stem for entry in CATALOG.glob("*.json")))
        raise SystemExit(f"{name} is neither a directory with a config.json nor one of: {listed}")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def given(**settings: object) -> dict[str, Any]:
    """What the user set: the rest keeps the peer's defaults."""
    return {name: value for name, value in settings.items() if value is not None}


def measure(options: argparse.Namespace, start: Callable[[], Peer]) -> None:
    """Start the peer, answer the requests, print the last line of vLLM's benchmark and write the report."""
    try:
        check_writable(options.output_json)
        began = time.perf_counter()
        peer = start()
        seconds = {"start": time.perf_counter() - began}
        try:
            found = answer_all(peer, make(options, longest=peer.longest), options)
        finally:
            peer.close()
    except NanoflowError as error:
        raise SystemExit(str(error)) from error
    found |= {"seconds": seconds, "step_us": None, "step_gaps_us": None}
    found["engine"] = {"name": peer.package, "version": version(peer.package)}
    print(
        f"Throughput: {found['requests_per_second']:.2f} requests/s, "
        f"{found['tokens_per_second']:.2f} total tokens/s, "
        f"{found['output_tokens_per_second']:.2f} output tokens/s"
    )
    write_json(options.output_json, found, settings=vars(options))


def make(options: argparse.Namespace, *, longest: int) -> list[BenchRequest]:
    """Those that ``nanoflow bench throughput`` makes of the same flags, without a tokenizer."""
    settings = DatasetSettings(
        trace=options.trace,
        num_prompts=options.num_prompts,
        input_len=options.input_len,
        output_len=options.output_len,
        random_range_ratio=options.random_range_ratio,
        seed=options.seed,
    )
    size = read_config(options.dummy_weights)["vocab_size"]
    return make_requests(settings, vocabulary=Vocabulary.of(size), tokenizer=None, longest=longest)


def answer_all(
    peer: Peer, requests: Sequence[BenchRequest], options: argparse.Namespace
) -> dict[str, Any]:
    """Counts and rates, and what the GPU took."""
    peer.run(requests[: options.num_warmups])
    watch = make_watch()
    with watch or nullcontext():
        began = time.perf_counter()
        num_output = peer.run(requests)
        seconds = time.perf_counter() - began
    wanted = sum(request.output_len for request in requests)
    if num_output != wanted:
        raise SystemExit(f"{num_output} tokens were answered instead of {wanted}")
    found = count_results(
        num_requests=len(requests),
        num_input=sum(len(request.prompt_token_ids) for request in requests),
        num_output=num_output,
        seconds=seconds,
    )
    used = watch.use.results(num_tokens=found["total_num_tokens"]) if watch and watch.use else {}
    return found | used


def make_watch() -> Any:
    """Only now: a peer that forks must not find CUDA in use in this process."""
    from nanoflow_compiler.bench.gpu_meter import GpuMeter, Watch, has_meter

    return Watch(GpuMeter()) if has_meter() else None
