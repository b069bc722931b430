"""What lies between the two matrix products of an expert, as kernels compute it: in float32."""

import triton.language as tl

from nanoflow_compiler.kernels.jit import jit

__all__ = ["KNOWN", "activated", "clamped_swiglu"]

KNOWN = frozenset({"silu", "gelu", "gelu_tanh", "relu", "relu_squared", "clamped_swiglu"})
"""Those of ``experts.ACTIVATIONS`` that a matrix product applies to its result."""

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)
_LIMIT = tl.constexpr(7.0)
_SLOPE = tl.constexpr(1.702)


@jit
def _relu(x):
    """Keeps what is no number, which a maximum would not."""
    return tl.where(x < 0, 0.0, x)


@jit
def activated(x, NAME: tl.constexpr):
    if NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * _SQRT_HALF))
    elif NAME == "gelu_tanh":
        x = x * tl.sigmoid(_TWO_SQRT_2_OVER_PI * (x + _CUBIC * x * x * x))
    elif NAME == "relu":
        x = _relu(x)
    else:
        tl.static_assert(NAME == "relu_squared")
        x = _relu(x) * _relu(x)
    return x


@jit
def clamped_swiglu(gate, up):
    gate = tl.where(gate > _LIMIT, _LIMIT, gate)
    up = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up))
    return (up + 1) * gate * tl.sigmoid(_SLOPE * gate)
