"""Start-up, prefill and decode of one small model on the CPU, against eager and Inductor.

    python benchmarks/cpu.py smollm2-135m --output benchmarks/results/NAME.json

Each engine runs in processes of its own: the first with empty caches (cold), a second with those
that the first left (warm). ``compile_s`` is what start-up and the first answer take beyond loading
and a later answer; ``prefill`` and ``decode`` are medians of repeated answers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanoflow_compiler.bench.environment import environment

PREFILL_TOKENS = 512
DECODE_PROMPT_TOKENS = 32
DECODE_TOKENS = 64
ENGINES = ("eager", "inductor", "inductor-static", "nanoflow-compile", "nanoflow-llm")

Answer = Callable[[int, int, int], Any]
"""Batch size, prompt tokens and new tokens."""


def main() -> None:
    """Run all engines, print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    report = environment(options.threads)
    results: list[dict[str, Any]] = []
    for name in options.engines.split(","):
        for caches, child in run_twice(name, options):
            results.append({"engine": name, "caches": caches, **child})
            print_table(results[-1:])
            if options.output:  # each time, so that a run cut short leaves what it measured
                text = json.dumps({**report, "results": results}, indent=1)
                options.output.write_text(text + "\n")


def run_twice(engine: str, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same process with empty caches, then with those that it left."""
    from nanoflow_compiler.models.locate import resolve_model

    # By its path, since its name may lead to a cache that the process is not to see.
    model = resolve_model(options.model) if options.load_format == "auto" else options.model
    states = ["warm"] if engine == "eager" else ["cold", "warm"]
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "NANOFLOW_CACHE": f"{folder}/nanoflow",
        }
        arguments = [str(model) if item == options.model else item for item in sys.argv]
        command = [sys.executable, *arguments, "--child", engine]
        for state in states:
            print(f"{engine}, {state} ...", file=sys.stderr, flush=True)
            done = subprocess.run(
                command, env=os.environ | caches, stdout=subprocess.PIPE, check=True, text=True
            )
            yield state, json.loads(done.stdout.splitlines()[-1])


def measure(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one engine takes in this process."""
    start = time.perf_counter()
    import torch

    import nanoflow_compiler.engine.llm
    import nanoflow_compiler.models  # noqa: F401

    torch.set_num_threads(options.threads)
    imported = time.perf_counter()
    answer, load_s, startup_s = start_engine(engine, options)
    first_s = timed(answer, 1, DECODE_PROMPT_TOKENS, 2)
    later_s = min(timed(answer, 1, DECODE_PROMPT_TOKENS, 2) for _ in range(3))
    batches = [int(size) for size in options.batches.split(",")]
    return {
        "import_s": round(imported - start, 2),
        "load_s": round(load_s, 2),
        "compile_s": round(startup_s + first_s - later_s, 2),
        "prefill_tokens_per_s": round(prefill_rate(answer, options.repeats), 1),
        "decode_tokens_per_s": {
            size: round(decode_rate(answer, size, options.repeats), 2) for size in batches
        },
    }


def start_engine(engine: str, options: argparse.Namespace) -> tuple[Answer, float, float]:
    """How to get answers; seconds to load the model, and to start the engine beyond that."""
    from nanoflow_compiler import LLM
    from nanoflow_compiler.models import load_decoder

    start = time.perf_counter()
    decoder = load_decoder(options.model, dtype="float32", load_format=options.load_format)
    loaded = time.perf_counter()
    load_s = loaded - start
    if engine != "nanoflow-llm":
        return hf_answers(decoder.model, engine), load_s, 0.0
    llm = LLM(options.model, dtype="float32", device="cpu", load_format=options.load_format)
    return llm_answers(llm), load_s, time.perf_counter() - loaded - load_s


def hf_answers(model: Any, engine: str) -> Answer:
    """``model.generate`` of transformers, its forward compiled as the engine says."""
    import torch

    static = {"cache_implementation": "static"} if engine == "inductor-static" else {}
    if engine.startswith("inductor"):
        model.forward = torch.compile(model.forward)
    elif engine == "nanoflow-compile":
        model.forward = torch.compile(model.forward, backend="nanoflow")

    def answer(batch: int, prompt: int, new: int) -> Any:
        ids = torch.randint(3, 1000, (batch, prompt))
        mask = torch.ones_like(ids)
        return model.generate(
            ids,
            attention_mask=mask,
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            **static,
        )

    return answer


def llm_answers(llm: Any) -> Answer:
    """``LLM.generate`` on random tokens."""
    import torch

    from nanoflow_compiler import SamplingParams

    def answer(batch: int, prompt: int, new: int) -> Any:
        prompts = [
            {"prompt_token_ids": row} for row in torch.randint(3, 1000, (batch, prompt)).tolist()
        ]
        return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))

    return answer


def timed(answer: Answer, batch: int, prompt: int, new: int) -> float:
    """Seconds of one answer."""
    start = time.perf_counter()
    answer(batch, prompt, new)
    return time.perf_counter() - start


def prefill_rate(answer: Answer, repeats: int) -> float:
    """Prompt tokens per second of answers of one token."""
    timed(answer, 1, PREFILL_TOKENS, 1)
    seconds = [timed(answer, 1, PREFILL_TOKENS, 1) for _ in range(repeats)]
    return PREFILL_TOKENS / statistics.median(seconds)


def decode_rate(answer: Answer, batch: int, repeats: int) -> float:
    """New tokens per second of all requests after their first."""
    timed(answer, batch, DECODE_PROMPT_TOKENS, 2)
    seconds = []
    for _ in range(repeats):
        first = timed(answer, batch, DECODE_PROMPT_TOKENS, 1)
        seconds.append(timed(answer, batch, DECODE_PROMPT_TOKENS, 1 + DECODE_TOKENS) - first)
    return batch * DECODE_TOKENS / statistics.median(seconds)


def print_table(results: list[dict[str, Any]]) -> None:
    """One line per process."""
    print(
        f"{'engine':<18}{'caches':<8}{'import':>8}{'load':>8}{'compile':>9}{'prefill':>9}  decode"
    )
    for row in results:
        decode = "  ".join(
            f"{size}: {rate:.1f}" for size, rate in row["decode_tokens_per_s"].items()
        )
        print(
            f"{row['engine']:<18}{row['caches']:<8}{row['import_s']:>8.1f}{row['load_s']:>8.1f}"
            f"{row['compile_s']:>9.1f}{row['prefill_tokens_per_s']:>9.0f}  {decode}"
        )


if __name__ == "__main__":
    main()
