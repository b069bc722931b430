"""The model that a server offers."""

import asyncio
from dataclasses import dataclass
from typing import Any

from nanoflow_compiler.bench.http import HttpClient, HttpError
from nanoflow_compiler.errors import NanoflowError

__all__ = ["Target", "find_target"]

RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What requests call it, and what is known of it."""

    name: str
    root: str
    """The model itself, by which its tokenizer may be found."""
    max_model_len: int | None


async def find_target(
    http: HttpClient, *, model: str | None, served_name: str | None, patience_s: float
) -> Target:
    """Waits until the server answers; without a ``model`` it is the server's first."""
    models = await _models(http, patience_s=patience_s, is_needed=model is None)
    wanted = served_name or model
    known = next((one for one in models if wanted in (None, one.get("id"))), {})
    name = wanted or known.get("id")
    if name is None:
        raise NanoflowError(f"{http.base_url} offers no model; pass --model")
    return Target(
        name=name,
        root=model or known.get("root") or name,
        max_model_len=known.get("max_model_len"),
    )


async def _models(http: HttpClient, *, patience_s: float, is_needed: bool) -> list[dict[str, Any]]:
    deadline = asyncio.get_running_loop().time() + patience_s
    while True:
        try:
            listed: list[dict[str, Any]] = (await http.get_json("/v1/models"))["data"]
            return listed
        except (HttpError, KeyError, TypeError) as error:
            status = error.status if isinstance(error, HttpError) else 200
            if status not in (None, 503):
                if not is_needed:
                    return []
                raise NanoflowError(
                    f"{http.base_url} does not list its models ({error}); pass --model"
                ) from error
            if asyncio.get_running_loop().time() + RETRY_S > deadline:
                raise NanoflowError(
                    f"{error}; start the server, or wait longer: --ready-check-timeout-sec"
                ) from error
        await asyncio.sleep(RETRY_S)
