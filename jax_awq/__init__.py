"""AWQ 4-bit weights in JAX: CUDA kernels as XLA FFI calls, plain JAX everywhere else."""

from typing import TYPE_CHECKING, Any

from jax_awq._ffi import build_info
from jax_awq._packing import pack_int4, unpack_int4
from jax_awq._plan import KernelPlan, plan
from jax_awq.calibrate import ActivationRange, calibrate_activation
from jax_awq.ops._activation import QuantizedActivation
from jax_awq.ops.awq_dequantize import awq_dequantize
from jax_awq.ops.awq_gemm import awq_gemm
from jax_awq.ops.awq_gemm_w4a4 import awq_gemm_w4a4
from jax_awq.ops.awq_gemm_w4a8 import awq_gemm_w4a8
from jax_awq.ops.dequantize_activation import dequantize_activation
from jax_awq.ops.int4_matmul import int4_matmul
from jax_awq.ops.int8_matmul import int8_matmul
from jax_awq.ops.quantize_activation import quantize_activation
from jax_awq.quantize import quantize  # in place of the package, which an import still finds
from jax_awq.quantized import Int4Weight, Int8Weight, QuantizedLinear
from jax_awq.weights import AWQWeight, PermutedWeight, convert

if TYPE_CHECKING:
    from jax_awq.checkpoint import load_hf, save_hf

__all__ = [
    "AWQWeight",
    "ActivationRange",
    "Int4Weight",
    "Int8Weight",
    "KernelPlan",
    "PermutedWeight",
    "QuantizedActivation",
    "QuantizedLinear",
    "awq_dequantize",
    "awq_gemm",
    "awq_gemm_w4a4",
    "awq_gemm_w4a8",
    "build_info",
    "calibrate_activation",
    "convert",
    "dequantize_activation",
    "int4_matmul",
    "int8_matmul",
    "load_hf",
    "pack_int4",
    "plan",
    "quantize",
    "quantize_activation",
    "save_hf",
    "unpack_int4",
]


def __getattr__(name: str) -> Any:
    # On first use: checkpoints need the `safetensors` extra, the ops do not.
    if name in ("load_hf", "save_hf"):
        from jax_awq import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
