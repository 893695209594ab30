"""The compiled extension `_ext`: its import, its FFI targets, and calls of them."""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

_ext: ModuleType | None = None
MISSING = ""
try:
    _ext = importlib.import_module("jax_awq._ext")
except ImportError as _error:
    # Told by `build_info` and `plan`: a broken build must not look like a machine without a GPU.
    MISSING = f"the compiled part of jax_awq cannot be imported: {_error}"

# XLA keeps targets of a platform that is not there yet until its plugin is loaded.
TARGETS: tuple[str, ...] = ()
if _ext is not None:
    for _name, _capsule in sorted(_ext.registrations().items()):
        jax.ffi.register_ffi_target(_name, _capsule, platform="CUDA")
        TARGETS += (_name,)

_MIN_WORKSPACE = 16  # a zero-size result is no buffer; one for every call keeps one signature


def build_info() -> dict[str, Any]:
    """What this installation was built from.

    Returns:
      version; cuda (bool, whether kernels are in it); architectures, such as ["sm_90a"]; nvcc
      and jaxlib_headers, versions; source_hash, 16 hex digits of the C++ sources; and in a tree
      without the compiled part `missing`, the reason.
    """
    if _ext is not None:
        return dict(_ext.build_info())
    try:
        version = importlib.metadata.version("jax_awq")
    except importlib.metadata.PackageNotFoundError:
        version = "0+unknown"
    return {
        "version": version,
        "cuda": False,
        "architectures": [],
        "nvcc": "",
        "jaxlib_headers": "",
        "source_hash": "",
        "missing": MISSING,
    }


def unavailable(on_device: bool) -> str:
    """Why no kernel can run, or "".

    Args:
      on_device: whether this process runs the program on a CUDA device of its own. A program
        that is only lowered for CUDA here runs elsewhere, so a build without kernels is enough.
    """
    if _ext is None:
        return MISSING
    if not on_device:
        return ""
    if not TARGETS:
        return "this build of jax_awq has no CUDA kernels (JAX_AWQ_CUDA=OFF)"
    return _driver_problem()


@functools.cache
def _driver_problem() -> str:
    problem = _ext.driver_problem() if _ext is not None else MISSING
    if problem:
        warnings.warn(f"jax_awq: {problem}; the plain JAX reference runs instead", stacklevel=2)
    return problem


def plan_awq_gemm(**kwargs: Any) -> dict[str, Any]:
    """`_ext.plan_awq_gemm`: what the host code of the kernel would launch."""
    if _ext is None:
        raise RuntimeError(MISSING)
    return _ext.plan_awq_gemm(**kwargs)


def plan_awq_gemm_w4a8(**kwargs: Any) -> dict[str, Any]:
    """`_ext.plan_awq_gemm_w4a8`: what the host code of the kernels would launch."""
    if _ext is None:
        raise RuntimeError(MISSING)
    return _ext.plan_awq_gemm_w4a8(**kwargs)


def plan_int8_matmul(**kwargs: Any) -> dict[str, Any]:
    """`_ext.plan_int8_matmul`: what the host code of the kernels would launch."""
    if _ext is None:
        raise RuntimeError(MISSING)
    return _ext.plan_int8_matmul(**kwargs)


def call(
    op: str,
    result: jax.ShapeDtypeStruct,
    *operands: Any,
    workspace_bytes: int | None = None,
    **attributes: Any,
) -> jax.Array:
    """Calls the FFI target of `op`.

    The workspace is a second result, dropped here: XLA then plans it among its other buffers,
    and the handler allocates nothing, which lets XLA replay it inside a CUDA graph.
    """
    results = [result]
    if workspace_bytes is not None:
        results.append(jax.ShapeDtypeStruct((max(workspace_bytes, _MIN_WORKSPACE),), jnp.uint8))
    return call_all(op, results, *operands, **attributes)[0]


def call_all(
    op: str, results: Sequence[jax.ShapeDtypeStruct], *operands: Any, **attributes: Any
) -> Sequence[jax.Array]:
    """Calls the FFI target of `op`, which has several results."""
    return jax.ffi.ffi_call(f"jax_awq.{op}", results)(*operands, **attributes)
