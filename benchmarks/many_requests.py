"""Throughput of many requests on the CPU, so many at a time, against transformers.

    python benchmarks/many_requests.py smollm2-135m --output benchmarks/results/NAME.json

Three engines get the same requests: ``static`` (``model.generate`` on padded batches, each as long
as its longest answer), ``generate_batch`` (the continuous batching of transformers) and
``nanoflow`` (``LLM.generate``). Each runs in a process of its own, compiled and warmed up before
the clock starts.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanoflow_compiler.bench.environment import environment

ENGINES = ("static", "generate_batch", "nanoflow")
LENGTHS = {"mixed": ((16, 256), (16, 256)), "equal": ((128, 128), (128, 128))}
"""Least and most tokens of prompts and of answers, drawn evenly."""

Request = tuple[list[int], int]
"""The prompt, and how many tokens to answer."""
Run = Callable[[Sequence[Request]], int]
"""Answers the requests; the number of new tokens."""


def main() -> None:
    """Run all engines on all workloads, print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--lengths", default=",".join(LENGTHS))
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--max-concurrency", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    results = []
    for engine in options.engines.split(","):
        print(f"{engine} ...", file=sys.stderr, flush=True)
        command = [sys.executable, *sys.argv, "--child", engine]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        for row in json.loads(done.stdout.splitlines()[-1]):
            results.append({"engine": engine, **row})
            print_row(results[-1])
        if options.output:
            report = {**environment(options.threads), "results": results}
            options.output.write_text(json.dumps(report, indent=1) + "\n")


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    print(
        f"{row['engine']:<16}{row['lengths']:<8}{row['output_tokens_per_s']:>8.1f} output tokens/s "
        f"(of {row['all_output_tokens_per_s']})"
    )


def measure(engine: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The median rate of one engine on each workload."""
    import torch

    torch.set_num_threads(options.threads)
    run = START[engine](options)
    run(make_requests("mixed", num=4, seed=1))
    return [
        measure_lengths(run, lengths, options=options) for lengths in options.lengths.split(",")
    ]


def measure_lengths(run: Run, lengths: str, *, options: argparse.Namespace) -> dict[str, Any]:
    """Every repeat has prompts of its own, so that no prefix cache has seen them."""
    rates, num_prompt, num_output = [], 0, 0
    for repeat in range(options.repeats):
        requests = make_requests(lengths, num=options.num_requests, seed=100 + repeat)
        start = time.perf_counter()
        num = run(requests)
        rates.append(round(num / (time.perf_counter() - start), 1))
        assert num == sum(most for _, most in requests), "an answer is too short"
        num_prompt += sum(len(prompt) for prompt, _ in requests)
        num_output += num
    return {
        "lengths": lengths,
        "output_tokens_per_s": sorted(rates)[len(rates) // 2],
        "all_output_tokens_per_s": rates,
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
    }


def make_requests(lengths: str, *, num: int, seed: int) -> list[Request]:
    """The same for every engine."""
    draw = random.Random(seed)
    prompt, answer = LENGTHS[lengths]
    return [
        ([draw.randrange(3, 1000) for _ in range(draw.randint(*prompt))], draw.randint(*answer))
        for _ in range(num)
    ]


def start_static(options: argparse.Namespace) -> Run:
    """``model.generate`` on batches in order of arrival, padded on the left."""
    import torch

    model = load(options).model

    def run(requests: Sequence[Request]) -> int:
        size = options.max_concurrency
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            longest = max(len(prompt) for prompt, _ in batch)
            most = max(new for _, new in batch)
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in batch])
            mask = torch.tensor(
                [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in batch]
            )
            model.generate(
                ids,
                attention_mask=mask,
                min_new_tokens=most,
                max_new_tokens=most,
                do_sample=False,
            )
        return sum(new for _, new in requests)

    return run


def start_generate_batch(options: argparse.Namespace) -> Run:
    """The continuous batching of transformers, as many requests at a time and tokens in a step."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    # Its steps run in a thread of their own. Had this thread computed anything on several cores, there
    # would be two teams of OpenMP threads, and as soon as they outnumber the cores both are slow.
    torch.set_num_threads(1)
    model = load(options).model
    model.set_attn_implementation("paged|sdpa")
    torch.set_num_threads(options.threads)
    most = sum(most for _, most in LENGTHS["mixed"])
    block_size = 64
    config = ContinuousBatchingConfig(
        max_requests_per_batch=options.max_concurrency,
        max_batch_tokens=512,
        block_size=block_size,
        num_blocks=options.max_concurrency * -(-most // block_size),
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(requests: Sequence[Request]) -> int:
        manager = model.init_continuous_batching(generation, config)
        manager.start()
        try:
            for prompt, new in requests:
                assert manager.add_request(prompt, max_new_tokens=new)
            return sum(len(next_result(manager).generated_tokens) for _ in requests)
        finally:
            manager.stop(block=True)

    return run


def next_result(manager: Any) -> Any:
    """What the manager finished next."""
    while (result := manager.get_result(timeout=1)) is None:
        if not manager.is_running():
            raise RuntimeError("the manager stopped")
    if result.error:
        raise RuntimeError(result.error)
    return result


def start_nanoflow(options: argparse.Namespace) -> Run:
    """``LLM.generate``."""
    from nanoflow_compiler import LLM, SamplingParams

    most = options.max_concurrency
    llm = LLM(options.model, dtype="float32", device="cpu", max_num_seqs=most)

    def run(requests: Sequence[Request]) -> int:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for _, new in requests],
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


START: dict[str, Callable[[argparse.Namespace], Run]] = {
    "static": start_static,
    "generate_batch": start_generate_batch,
    "nanoflow": start_nanoflow,
}


def load(options: argparse.Namespace) -> Any:
    """The model in float32."""
    from nanoflow_compiler.models import load_decoder

    return load_decoder(options.model, dtype="float32")


if __name__ == "__main__":
    main()
