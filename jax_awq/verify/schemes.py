"""The schemes that are compared, what error of each is too much, and how errors are measured."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_awq.calibrate import ActivationRange
from jax_awq.ops.awq_gemm import awq_gemm
from jax_awq.ops.awq_gemm_w4a4 import awq_gemm_w4a4
from jax_awq.ops.awq_gemm_w4a8 import awq_gemm_w4a8

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How activations are rounded before an AWQ weight.

    Attributes:
      codes: "int8", "int4" or "float8_e4m3fn"; "" leaves them float.
      granularity: of the scales, "token" or "tensor".
      static: whether the scale of "tensor" comes from other tokens.
      error: bound of the relative error of the linears' outputs, on average over them.
      perplexity: bound of the perplexity over that of float32.
    """

    name: str
    codes: str
    granularity: str
    static: bool
    error: float
    perplexity: float


# Bounds are about twice the errors of synthetic activations, which have more outliers than those
# of the checkpoint in tests/golden; its perplexities have a margin of 0.005 (W4A16) to 0.2 (W4A4).
SCHEMES = (
    Scheme("W4A16", "", "token", False, 0.005, 1.005),
    Scheme("W4A8 token", "int8", "token", False, 0.06, 1.01),
    Scheme("W4A8 tensor", "int8", "tensor", False, 0.15, 1.02),
    Scheme("W4A8 static", "int8", "tensor", True, 0.15, 1.02),
    Scheme("W4A8 float8", "float8_e4m3fn", "token", False, 0.05, 1.01),
    Scheme("W4A4 token", "int4", "token", False, 0.8, 1.05),
    Scheme("W4A4 tensor", "int4", "tensor", False, 1.2, 1.3),
    Scheme("W4A4 static", "int4", "tensor", True, 1.2, 1.3),
)


def product(scheme: Scheme, x: Array, weight: Any, scale: Array | None, **options: Any) -> Array:
    """``x @ weight`` as the scheme has it; `options` are those of `awq_gemm`."""
    if not scheme.codes:
        return awq_gemm(x, weight, **options)
    options |= {"granularity": scheme.granularity, "scale": scale if scheme.static else None}
    if scheme.codes == "int4":
        return awq_gemm_w4a4(x, weight, **options)
    return awq_gemm_w4a8(x, weight, activation_dtype=scheme.codes, **options)


def static_scale(scheme: Scheme, seen: ActivationRange) -> Array | None:
    """float32 ``()``, for the largest magnitude that was seen; None where none is needed."""
    return seen.scale(bits=4 if scheme.codes == "int4" else 8) if scheme.static else None


class Errors:
    """Errors of the outputs of linears over any number of batches.

    Args:
      dtype: of the activations as they enter a scheme, float16 or bfloat16.
    """

    def __init__(self, dtype: Any):
        self.dtype = jnp.dtype(dtype)
        self.sums: dict[tuple[str, str], list[float]] = {}

    def add(
        self,
        parts: Sequence[tuple[str, int]],
        x: Array,
        weight: Any,
        scales: Mapping[str, Array | None],
    ) -> None:
        """Takes one batch of a linear.

        Args:
          parts: name and number of columns of the linears that lie side by side in `weight`.
          x: float32 ``(..., K)``.
          scales: static ones by the name of the scheme.
        """
        sizes = tuple(size for _, size in parts)
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        exact = _exact(x, weight)
        for scheme in SCHEMES:
            found = _compare(
                x.astype(self.dtype), weight, scales[scheme.name], exact, scheme=scheme, sizes=sizes
            )
            for (name, _), (error, size, worst, largest) in zip(
                parts, jax.device_get(found), strict=True
            ):
                total = self.sums.setdefault((name, scheme.name), [0.0, 0.0, 0.0, 0.0])
                total[0] += float(error)
                total[1] += float(size)
                # A NaN would get lost in a maximum.
                total[2] = float(worst) if not worst <= total[2] else total[2]
                total[3] = max(total[3], float(largest))

    def rows(self) -> list[Row]:
        """For each linear and scheme ``|y - exact|`` over ``|exact|``: root of squares, maxima."""
        return [
            {
                "layer": layer,
                "scheme": scheme,
                "error": _ratio(error, size) ** 0.5,
                "max": _ratio(worst, largest),
            }
            for (layer, scheme), (error, size, worst, largest) in self.sums.items()
        ]


def _ratio(error: float, size: float) -> float:
    return 0.0 if error == 0 else error / size if size else float("inf")


@jax.jit
def _exact(x: Array, weight: Any) -> Array:
    return jnp.matmul(x, weight.dequantize(jnp.float32), precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("scheme", "sizes"))
def _compare(x, weight, scale, exact, *, scheme, sizes):
    y = product(scheme, x, weight, scale, out_dtype=jnp.float32)
    found, start = [], 0
    for size in sizes:
        part = slice(start, start := start + size)
        error, value = jnp.abs(y - exact)[:, part], jnp.abs(exact)[:, part]
        found.append(((error**2).sum(), (value**2).sum(), error.max(), value.max()))
    return found


def summary(rows: Sequence[Row], perplexities: Mapping[str, float]) -> list[Row]:
    """A row for each scheme: mean and largest error over the linears, and the perplexity."""
    result = []
    for scheme in SCHEMES:
        own = [row for row in rows if row["scheme"] == scheme.name]
        worst = max(own, key=lambda row: row["error"] if row["error"] == row["error"] else 1e30)
        result.append(
            {
                "scheme": scheme.name,
                "mean_error": sum(row["error"] for row in own) / len(own),
                "worst_error": worst["error"],
                "worst_layer": worst["layer"],
                "max": max(row["max"] for row in own),
                "perplexity": perplexities.get(scheme.name),
            }
        )
    return result


def exceeded(summary: Sequence[Row], float32: float | None) -> list[str]:
    """What is beyond its bound, in words; `float32` is the perplexity without any rounding."""
    found = []
    for scheme, row in zip(SCHEMES, summary, strict=True):
        if not row["mean_error"] <= scheme.error:  # a NaN is beyond
            found.append(
                f"{scheme.name}: the mean error of the linears is {row['mean_error']:.3g}, "
                f"the bound {scheme.error:g}"
            )
        if float32 is not None and not row["perplexity"] <= scheme.perplexity * float32:
            found.append(
                f"{scheme.name}: the perplexity is {row['perplexity']:.4g}, the bound "
                f"{scheme.perplexity:g} times the {float32:.4g} of float32"
            )
    return found


def markdown(summary: Sequence[Row], float32: float) -> str:
    """The summary as the table of README.md."""
    lines = [
        "| scheme | perplexity | mean error | worst linear |",
        "|---|---:|---:|---:|",
        f"| float32 | {float32:.2f} | | |",
    ]
    for row in summary:
        errors = (f"{100 * row[name]:.2g} %" for name in ("mean_error", "worst_error"))
        lines.append(f"| {row['scheme']} | {row['perplexity']:.2f} | {' | '.join(errors)} |")
    return "\n".join(lines) + "\n"
