"""One start of the engine, in the process that ``nanoflow bench startup`` makes for it."""

import json
import sys
import time
from typing import Any

__all__ = ["start"]


def start(
    *,
    model: str,
    dtype: str,
    load_format: Any,
    enforce_eager: bool,
    options: dict[str, object],
    **config: Any,
) -> dict[str, float]:
    """Seconds by stage; ``config`` are fields of :class:`EngineConfig`."""
    began = time.perf_counter()
    from nanoflow_compiler.engine.engine_config import EngineConfig
    from nanoflow_compiler.engine.messages import EngineRequest
    from nanoflow_compiler.engine.sampling_params import SamplingParams
    from nanoflow_compiler.engine.spec import EngineSpec

    spec = EngineSpec(
        model=model,
        dtype=dtype,
        load_format=load_format,
        config=EngineConfig(**config),
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
    return {"import": imported - began, **built.seconds, "first_answer": answered - ready}


if __name__ == "__main__":
    since = time.time()
    print(json.dumps({"began": since, **start(**json.loads(sys.argv[1]))}))  # noqa: T201
