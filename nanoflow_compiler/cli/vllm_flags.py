"""What users of vLLM type: spellings that work, and flags that are refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["ServeCommand"]

IN_FORCE: Mapping[str, str | None] = {
    "--async-scheduling": None,
    "--block-size": "64",
    "--data-parallel-size": "1",
    "--disable-uvicorn-access-log": None,
    "--enable-chunked-prefill": None,
    "--enable-prompt-tokens-details": None,
    "--enable-request-id-headers": None,
    "--enable-server-load-tracking": None,
    "--kv-cache-dtype": "auto",
    "--no-enable-log-outputs": None,
    "--pipeline-parallel-size": "1",
    "--tensor-parallel-size": "1",
}
"""Flags of vLLM that may be left out: with this value they say what is so anyway."""
SHORT = {"-dp": "data", "-pp": "pipeline", "-tp": "tensor"}

UNSUPPORTED = """
    additional-config api-server-count attention-backend attention-config calculate-kv-scales
    chat-template-content-format code-revision collect-detailed-traces compilation-config config-format
    convert cpu-offload-gb data-parallel-address data-parallel-backend data-parallel-rank
    data-parallel-rpc-port data-parallel-size-local dcp-comm-backend
    decode-context-parallel-size default-chat-template-kwargs disable-cascade-attn
    disable-chunked-mm-input disable-custom-all-reduce disable-hybrid-kv-cache-manager
    disable-log-requests disable-mm-preprocessor-cache disable-sliding-window distributed-executor-backend
    download-dir ec-transfer-config enable-dbo enable-eplb enable-expert-parallel
    enable-flash-late-interaction enable-force-include-usage enable-log-deltas enable-log-outputs
    enable-lora enable-mm-embeds enable-offline-docs enable-per-request-metrics
    enable-prompt-embeds enable-return-routed-experts enable-sleep-mode enable-ssl-refresh
    enable-tokenizer-info-endpoint exclude-tools-when-tool-choice-none fingerprint-mode
    fully-sharded-loras guided-decoding-backend h11-max-header-count
    h11-max-incomplete-event-size headless hf-config-path hf-token
    ignore-patterns io-processor-plugin kv-cache-memory kv-cache-metrics kv-events-config
    kv-offloading-backend kv-offloading-size kv-sharing-fast-prefill kv-transfer-config language-model-only
    limit-mm-per-prompt log-config-file log-error-stack logits-processors
    logprobs-mode long-prefill-token-threshold lora-dtype lora-modules mamba-block-size
    mamba-cache-dtype mamba-ssm-cache-dtype master-addr master-port max-cpu-loras max-log-len
    max-logprobs max-long-partial-prefills max-lora-rank max-loras max-num-partial-prefills
    max-parallel-loading-workers max-seq-len-to-capture media-io-kwargs middleware
    mm-encoder-attn-backend mm-encoder-tp-mode mm-processor-cache-gb mm-processor-kwargs model model-impl
    model-loader-extra-config nnodes no-enable-chunked-prefill node-rank num-gpu-blocks-override
    numa-bind optimization-level otlp-traces-endpoint override-attention-dtype override-generation-config
    override-pooler-config performance-mode pooler-config prefill-context-parallel-size
    prefix-caching-hash-algo profiler-config pt-load-map-location quantization
    ray-workers-use-nsight reasoning-parser reasoning-parser-plugin response-role return-tokens-as-token-ids
    revision runner safetensors-load-strategy scheduler-cls scheduler-delay-factor
    scheduler-reserve-full-isl scheduling-policy show-hidden-metrics-for-version skip-mm-profiling
    skip-tokenizer-init speculative-config ssl-ciphers structured-outputs-config swap-space task
    tokenizer-mode tokenizer-revision tokens-only tool-parser-plugin tool-server
    trust-remote-code trust-request-chat-template ubatch-size uds use-tqdm-on-load video-pruning-rate
    weight-transfer-config worker-cls worker-extension-cls
"""
INSTEAD = {
    "--disable-log-requests": "--no-enable-log-requests",
    "--kv-cache-memory": "--kv-cache-memory-bytes",
    "--model": "the name of the model as the first argument",
    "--num-gpu-blocks-override": "--num-kv-blocks",
}


class ServeCommand(TyperCommand):
    """Takes flags with underscores, and several values after a flag that may be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for one in self.params for name in (*one.opts, *one.secondary_opts)}
        many = {name for one in self.params if getattr(one, "multiple", False) for name in one.opts}
        spelled = [_spelled(argument) for argument in args]
        return super().parse_args(ctx, _repeated(_without_known(spelled, own=own), many=many))


def _spelled(argument: str) -> str:
    if argument in SHORT:
        return f"--{SHORT[argument]}-parallel-size"
    name, found, value = argument.partition("=")
    return name.replace("_", "-") + found + value if name.startswith("--") else argument


def _without_known(args: Sequence[str], *, own: set[str]) -> list[str]:
    """Leaves out what is in force anyway; ends the program at a flag that is vLLM's alone."""
    unsupported = {f"--{name}" for name in UNSUPPORTED.split()}
    kept: list[str] = []
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        name, found, value = argument.partition("=")
        if name in own or not (name in unsupported or name in IN_FORCE):
            kept.append(argument)
            continue
        wanted = IN_FORCE.get(name)
        if name in IN_FORCE and wanted is not None and not found:
            value = rest.pop(0) if rest else ""
        if name not in IN_FORCE or value != (wanted or ""):
            raise _refused(name, value)
    return kept


def _refused(name: str, value: str) -> typer.Exit:
    if (only := IN_FORCE.get(name)) is not None:
        text = f"{name} must be {only} here, not {value!r}"
    else:
        text = f"{name} is a flag of vLLM that nanoflow does not have; "
        text += f"give {INSTEAD[name]}" if name in INSTEAD else "leave it out"
    typer.echo(f"nanoflow: {text}", err=True)
    return typer.Exit(2)


def _repeated(args: Sequence[str], *, many: set[str]) -> list[str]:
    """``--api-key a b`` as ``--api-key a --api-key b``, once the model is known: it stands alone too."""
    if not args or args[0].startswith("-"):
        return list(args)
    written, last = [args[0]], ""
    for argument in args[1:]:
        if argument.startswith("-"):
            last = argument
        elif last in many and written[-1] != last:
            written.append(last)
        written.append(argument)
    return written
