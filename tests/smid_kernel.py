"""A kernel whose thread blocks note on which multiprocessor they run; imported where Triton is."""

import triton
import triton.language as tl


@triton.jit
def note_sm(places_ptr, spins):
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], tl.int32, is_pure=False, pack=1)
    number = tl.zeros([], tl.int64)
    for _ in range(spins):
        number += tl.inline_asm_elementwise(
            "mov.u64 $0, %clock64;", "=l", [], tl.int64, is_pure=False, pack=1
        )
    tl.store(places_ptr + sm, 1 + (number == 0).to(tl.int32))
