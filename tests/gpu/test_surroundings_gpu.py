"""What the tests of kernels rest on: what is not written, or written elsewhere, is found."""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.variants import (
    ALLOCATED,
    BF16,
    F16,
    OTHER_BITS,
    VARIANTS,
    Case,
    address,
    on_cpu,
    problem_of,
    run_twice,
    surrounded,
)

from jax_awq import _ffi, plan
from jax_awq.testing import assert_close

pytestmark = pytest.mark.gpu

FUSED = [v for v in VARIANTS if v != "dequantize_dot"]
CASE = Case(8, 1024, 288, 64)
GUARD = 4096  # bytes behind a workspace


def call(case, workspace_bytes, variant):
    """A program of `x` and a weight: the result of the handler, and what is in its workspace."""
    results = [
        jax.ShapeDtypeStruct((case.m, case.n), case.x),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    ]

    def program(x, weight):
        return _ffi.call_all(
            "awq_gemm",
            results,
            x,
            weight.qweight,
            weight.scales,
            weight.qzeros,
            jnp.zeros((0,), case.x),
            group_size=case.group_size,
            layout=case.layout,
            activation="none",
            split_k=case.split or 0,
            transpose=False,
            batch_invariant=False,
            variant=variant,
        )

    return program


@functools.cache
def solved(case):
    p = problem_of(case)
    return (p.x, p.weight), p.float64(), on_cpu(case.product, p.x, p.weight)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_what_is_not_written_is_found(dtype):
    """In the place of a result a workspace, which a call without splits leaves as it is."""
    case = Case(8, 1024, 288, 64, dtype)
    operands, exact, reference = solved(case)
    program = jax.jit(lambda *o: call(case, reference.nbytes, "simt")(*o)[1])
    (left,) = run_twice(program, operands, reference, guarded=True)
    y = left.view(dtype).reshape(reference.shape)
    assert np.isnan(y).all()
    with pytest.raises(AssertionError, match=f"{y.size} of {y.size} values are off"):
        assert_close(y, exact, reference)


def test_one_value_that_is_not_written_is_found():
    operands, exact, reference = solved(CASE)
    (y, left) = run_twice(
        jax.jit(call(CASE, reference.nbytes, "simt")), operands, reference, reference, guarded=True
    )
    assert_close(y, exact, reference)
    y = y.copy()
    y[-1, -1] = left.view(F16)[-1]
    with pytest.raises(AssertionError, match="1 of 2304 values are off"):
        assert_close(y, exact, reference)


@pytest.mark.parametrize("where", ["before", "behind"])
def test_one_byte_that_is_written_beside_the_result_is_found(where):
    operands, _, reference = solved(CASE)
    assert reference.nbytes % ALLOCATED == 0
    program = jax.jit(CASE.product)
    guarded = []

    def writes(around):
        y = jax.block_until_ready(program(*operands))
        if around.holds(y):  # elsewhere it could be anybody's
            set_byte(address(y) + (-1 if where == "before" else y.nbytes), 1)
            guarded.append(y)
        return y

    with pytest.raises(AssertionError, match=r"beside a result of shape \(8, 288\)"):
        surrounded(writes, reference, guarded=True)
    assert guarded


def test_an_operand_that_is_written_is_found():
    operands, _, reference = solved(CASE)
    program = jax.jit(CASE.product)
    other = operands[0].view(np.uint8)[0, 0] ^ 1

    def writes(x, weight):
        y = jax.block_until_ready(program(x, weight))
        set_byte(address(x), other)
        return y

    with pytest.raises(AssertionError, match=r"an operand of shape \(8, 1024\) was written"):
        run_twice(writes, operands, reference)


@pytest.mark.parametrize("variant", FUSED)
def test_nothing_is_written_behind_the_workspace(variant, force):
    case = Case(8, 2048, 288, 64, split=12)
    if variant.startswith("stream"):
        case = Case(300, 2176, 608, 128)
    operands, exact, reference = solved(case)
    force(variant)
    try:
        found = plan("awq_gemm", *operands, split_k_iters=case.split)
    except ValueError as error:
        if f"variant {variant} cannot run: needs" not in str(error):
            raise
        pytest.skip(str(error))
    used = found.workspace_bytes
    assert used > 0 or variant == "simt"
    workspace = np.zeros(-(-(used + GUARD) // ALLOCATED) * ALLOCATED, np.uint8)
    program, placed = jax.jit(call(case, workspace.nbytes, variant)), jax.device_put(operands)
    y, left = surrounded(lambda _: program(*placed), reference, workspace, guarded=True)
    assert_close(np.asarray(y), exact, reference)
    written = np.asarray(left) != OTHER_BITS
    assert written[:used].any() or used == 0
    assert not written[used:].any()


def set_byte(at, value):
    """Sets a byte of the GPU's memory, as a kernel that does not keep to its buffers would."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    ordinal = jax.devices()[0].local_hardware_id or 0
    assert cuda.cuDeviceGet(ctypes.byref(device), ordinal) == 0
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    assert cuda.cuCtxPushCurrent_v2(context) == 0
    assert (
        cuda.cuMemsetD8_v2(ctypes.c_uint64(at), ctypes.c_ubyte(int(value)), ctypes.c_size_t(1)) == 0
    )
    assert cuda.cuCtxSynchronize() == 0
    assert cuda.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    assert cuda.cuDevicePrimaryCtxRelease_v2(device) == 0
