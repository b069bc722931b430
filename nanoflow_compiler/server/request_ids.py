"""Names of requests: in logs, answers and the engine."""

import re

from starlette.requests import Request

__all__ = ["GOOD_ID", "make_id"]

GOOD_ID = re.compile(r"[\x21-\x7e]{1,128}")


def make_id(prefix: str, request: Request, wanted: str = "") -> str:
    """``cmpl-...``, after the caller's choice in the body, or in the header ``x-request-id``."""
    chosen = wanted if GOOD_ID.fullmatch(wanted) else request.state.request_id
    return f"{prefix}-{chosen}"
