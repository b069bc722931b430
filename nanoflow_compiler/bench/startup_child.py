"""One start of the engine, in the process that ``nanoflow bench startup`` makes for it."""

import json
import sys
import time
from dataclasses import fields
from typing import Any

__all__ = ["start"]


def start(
    *,
    model: str,
    enforce_eager: bool,
    options: dict[str, object],
    **given: Any,
) -> dict[str, Any]:
    """Seconds by stage, and of ``compile`` by what it did; ``given`` are fields of :class:`Loading` and of :class:`EngineConfig`."""
    began = time.perf_counter()
    from nanoflow_compiler.engine.engine_config import EngineConfig
    from nanoflow_compiler.engine.messages import EngineRequest
    from nanoflow_compiler.engine.sampling_params import SamplingParams
    from nanoflow_compiler.engine.served import Loading
    from nanoflow_compiler.engine.spec import EngineSpec

    loading = {field.name: given.pop(field.name) for field in fields(Loading)}
    spec = EngineSpec(
        model=model,
        **loading,
        config=EngineConfig(**given),
        enforce_eager=enforce_eager,
        options=options,
    )
    imported = time.perf_counter()
    built = spec.build()
    ready = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=1)
    built.core.add(
        EngineRequest(key=1, request_id="1", prompt_token_ids=[1, 2, 3], params=params, group=1)
    )
    while built.core.has_requests:
        built.core.step()
    answered = time.perf_counter()
    built.core.close()
    return {
        "import": imported - began,
        **built.seconds,
        "first_answer": answered - ready,
        "parts": dict(built.compile_seconds),
    }


if __name__ == "__main__":
    since = time.time()
    print(json.dumps({"began": since, **start(**json.loads(sys.argv[1]))}))  # noqa: T201
