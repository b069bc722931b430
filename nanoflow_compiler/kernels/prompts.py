"""Which kernel serves prompts: ours, or FlashInfer's where it is installed and faster."""

from torch import Tensor

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.kernels.flash_prefill import (
    FlashTiles,
    attend_flash,
    flash_with_room,
    least_keys,
    plan_flash_prompts,
)
from nanoflow_compiler.kernels.paged_prefill import (
    PromptTiles,
    attend_prompts,
    plan_prompts,
    prompts_with_room,
)
from nanoflow_compiler.kv_cache import HeadPages
from nanoflow_compiler.scoring import Scoring

__all__ = ["Tiles", "attend", "least_keys", "plan", "with_room"]

Tiles = PromptTiles | FlashTiles


def plan(
    requests: Requests,
    pages: HeadPages,
    *,
    num_heads: int,
    visibility: Visibility,
    is_plain: bool,
) -> Tiles | None:
    """How the requests of a part that have several rows are computed; None without any."""
    least = least_keys(pages, visibility=visibility) if is_plain else None
    if least is not None and requests.are_long(least):
        return plan_flash_prompts(requests, pages, num_heads=num_heads)
    return plan_prompts(requests, pages, num_heads=num_heads, visibility=visibility)


def with_room(
    pages: HeadPages,
    *,
    num_heads: int,
    visibility: Visibility,
    sizes: tuple[int, int, int],
    is_long: bool,
) -> Tiles:
    """Of nothing yet, with room for ``sizes``: tokens, prompts and pages."""
    num_tokens, num_prompts, num_pages = sizes
    if is_long:
        return flash_with_room(
            pages,
            num_heads=num_heads,
            num_tokens=num_tokens,
            num_prompts=num_prompts,
            num_pages=num_pages,
        )
    return prompts_with_room(
        pages,
        num_heads=num_heads,
        visibility=visibility,
        num_tiles=num_tokens,
        num_pages=num_pages,
    )


def attend(query: Tensor, pages: HeadPages, *, tiles: Tiles, scoring: Scoring, out: Tensor) -> None:
    """Write the rows of ``tiles`` in ``out [T, heads, v dim]``, for ``query [T, heads, dim]``."""
    if isinstance(tiles, FlashTiles):
        attend_flash(query, pages, tiles=tiles, scoring=scoring, out=out)
    else:
        attend_prompts(query, pages, tiles=tiles, scoring=scoring, out=out)
