"""``nanoflow bench``: one command for each thing that is measured."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoflow_compiler.bench.ablation_settings import AblationSettings
from nanoflow_compiler.bench.dataset import DatasetSettings
from nanoflow_compiler.bench.host_settings import HostSettings
from nanoflow_compiler.bench.latency_settings import LatencySettings
from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.bench.sampling import BenchSampling
from nanoflow_compiler.bench.serve_settings import ServeSettings
from nanoflow_compiler.bench.startup_settings import StartupSettings
from nanoflow_compiler.bench.throughput_settings import ThroughputSettings
from nanoflow_compiler.cli.command import command
from nanoflow_compiler.cli.options import CompileFlags, EngineFlags, Model, StepFlags

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, help="Measure the engine, or a server.")

OutputJson = Annotated[Path | None, typer.Option(help="Also write the results to this file.")]
DETAILS = (
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "latencies",
    "start_times",
    "generated_texts",
    "errors",
)


@bench.command()
@command
def host(
    *, settings: HostSettings, sampling: BenchSampling, output_json: OutputJson = None
) -> None:
    """What the engine does on the host for a step, on a device that only sleeps."""
    from nanoflow_compiler.bench.host import measure_host
    from nanoflow_compiler.bench.report import check_writable, print_rows, write_json

    check_writable(output_json)
    results = measure_host(settings, sampling.given())
    print_rows(
        {
            "Host time of a step, median (ms)": results["median_host_ms"],
            "p99": results["p99_host_ms"],
            "Steps": results["num_steps"],
            "Steps that waited for the host": results["num_steps_waiting_for_host"],
            "Requests running": results["mean_running"],
            "Tokens of a step": results["mean_tokens"],
        }
    )
    write_json(output_json, results, settings={**asdict(settings), **sampling.given()}, threads=1)


@bench.command()
@command
def ablation(
    *,
    model: Model,
    settings: AblationSettings,
    output: Annotated[
        Path | None, typer.Option(help="Also write the results to this file.")
    ] = None,
) -> None:
    """One step of a model with dummy weights by several plans, on a GPU."""
    from nanoflow_compiler.bench.ablation import measure_ablation, print_ablation
    from nanoflow_compiler.bench.report import check_writable, write_json

    check_writable(output)
    found = measure_ablation(model, settings)
    print_ablation(found)
    write_json(output, found, settings=asdict(settings))


@bench.command()
@command
def throughput(
    *,
    model: ModelSettings,
    settings: ThroughputSettings,
    dataset: DatasetSettings,
    engine: EngineFlags,
    compiler: StepFlags,
    output_json: OutputJson = None,
) -> None:
    """How fast many requests are answered that are all there at once."""
    from nanoflow_compiler.bench.report import check_writable, print_rows, write_json
    from nanoflow_compiler.bench.throughput import measure_throughput, throughput_rows

    check_writable(output_json)
    given = _engine(engine, compiler)
    found = measure_throughput(settings, model=model, dataset=dataset, engine=given)
    print_rows(throughput_rows(found))
    typer.echo(
        f"Throughput: {found['requests_per_second']:.2f} requests/s, "
        f"{found['tokens_per_second']:.2f} total tokens/s, "
        f"{found['output_tokens_per_second']:.2f} output tokens/s"
    )
    chosen = {**asdict(model), **asdict(settings), **asdict(dataset), **given}
    write_json(output_json, found, settings=chosen, threads=_threads())


@bench.command()
@command
def latency(
    *,
    model: ModelSettings,
    settings: LatencySettings,
    engine: EngineFlags,
    compiler: CompileFlags,
    output_json: OutputJson = None,
) -> None:
    """How long one batch takes, from the prompts to the last token."""
    from nanoflow_compiler.bench.latency import measure_latency
    from nanoflow_compiler.bench.report import check_writable, write_json

    check_writable(output_json)
    given = _engine(engine, compiler)
    found = measure_latency(settings, model=model, engine=given)
    typer.echo(f"Avg latency: {found['avg_latency']:.4f} seconds")
    for rank, seconds in found["percentiles"].items():
        typer.echo(f"{rank}% percentile latency: {seconds:.4f} seconds")
    chosen = {**asdict(model), **asdict(settings), **given}
    write_json(output_json, found, settings=chosen, threads=_threads())


@bench.command()
@command
def startup(
    *,
    model: ModelSettings,
    settings: StartupSettings,
    engine: EngineFlags,
    compiler: CompileFlags,
    output_json: OutputJson = None,
) -> None:
    """From nothing to the first answer, with empty caches and with warm ones."""
    from nanoflow_compiler.bench.report import check_writable, write_json
    from nanoflow_compiler.bench.startup import measure_startup, print_startup

    check_writable(output_json)
    given = _engine(engine, compiler)
    found = measure_startup(settings, model=model, engine=given)
    print_startup(found)
    chosen = {**asdict(model), **asdict(settings), **given}
    write_json(output_json, found, settings=chosen, threads=_threads())


@bench.command()
@command
def serve(*, settings: ServeSettings, dataset: DatasetSettings, sampling: BenchSampling) -> None:
    """Load on a server that runs, and what its users see."""
    from nanoflow_compiler.bench.report import check_writable, write_json
    from nanoflow_compiler.bench.serving import measure_serving
    from nanoflow_compiler.bench.serving_metrics import table

    check_writable(settings.result_path("model"))
    found = measure_serving(settings, dataset=dataset, sampling=sampling.given())
    for line in table(found, settings):
        typer.echo(line)
    for error in sorted({error for error in found["errors"] if error})[:10]:
        typer.echo(f"failed: {error}", err=True)
    path = settings.result_path(found["model_id"])
    kept = found if settings.save_detailed else _without_details(found)
    chosen = {**asdict(settings), **asdict(dataset), **sampling.given()}
    chosen["api_key"] = chosen["header"] = None  # both may be secret
    write_json(path, kept, settings=chosen)
    if not found["completed"]:
        raise typer.Exit(1)


def _engine(engine: EngineFlags, compiler: StepFlags) -> dict[str, Any]:
    """Further arguments of ``LLM``."""
    return {
        **engine.settings(),
        "enforce_eager": compiler.enforce_eager,
        "options": compiler.options(),
    }


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _without_details(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in DETAILS}
