"""`dequantize_activation`: a product in float32, converted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export

from jax_awq import QuantizedActivation, dequantize_activation, quantize_activation
from jax_awq.testing import unpack_bytes


@given(st.data())
def test_is_exact(data):
    bits = data.draw(st.sampled_from([8, 4]))
    granularity = data.draw(st.sampled_from(["token", "channel", "tensor"]))
    rows = data.draw(st.sampled_from([(), (3,), (2, 3), (0,)]))
    k = data.draw(st.integers(1, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    q = rng.integers(-128, 128, (*rows, k if bits == 8 else (k + 1) // 2)).astype(np.int8)
    # () or some of the leading dimensions: stacked, as vmap gives them
    stacked = rows[: data.draw(st.integers(0, len(rows)))]
    shape = {"token": rows, "channel": (*stacked, k), "tensor": stacked}[granularity]
    scale = rng.uniform(0, 2, shape).astype(np.float32)
    dtype = data.draw(st.sampled_from([np.float16, jnp.bfloat16, np.float32]))
    qa = QuantizedActivation(q, scale, bits=bits, granularity=granularity, k=k)
    got = dequantize_activation(qa, dtype)
    lead = shape[:-1] if granularity == "channel" else shape
    wide = scale.reshape(*lead, *[1] * (len(rows) - len(lead)), -1 if k and scale.size else 1)
    if granularity != "channel":
        wide = scale.reshape(*lead, *[1] * (len(rows) + 1 - len(lead)))
    want = (unpack_bytes(q, bits, k).astype(np.float32) * wide).astype(dtype)
    assert (got.shape, got.dtype) == ((*rows, k), dtype)
    np.testing.assert_array_equal(np.asarray(got), want)


def test_gradient_of_the_scale(rng):
    q = rng.integers(-127, 128, (2, 3, 8)).astype(np.int8)
    scale = np.ones((2, 3), np.float32)
    got = jax.grad(lambda s: dequantize_activation(QuantizedActivation(q, s)).sum())(scale)
    np.testing.assert_array_equal(got, q.astype(np.float32).sum(-1))


@pytest.mark.parametrize(("bits", "columns"), [(8, "k"), (4, "2*k")])
def test_export_with_a_symbolic_k(rng, bits, columns):
    fn = jax.jit(lambda x: dequantize_activation(quantize_activation(x, bits=bits)))
    shape = export.symbolic_shape(f"m, {columns}")
    stored = export.export(fn)(jax.ShapeDtypeStruct(shape, np.float32)).serialize()
    for k in (2, 34):
        x = rng.standard_normal((3, k)).astype(np.float32)
        np.testing.assert_array_equal(export.deserialize(stored).call(x), fn(x))


def test_static_fields_may_be_numbers_of_numpy():
    q = np.full((2, 3), 0x21, np.int8)
    qa = QuantizedActivation(q, np.ones(2, np.float32), bits=np.int64(4), k=np.int64(5))
    np.testing.assert_array_equal(dequantize_activation(qa), [[1, 2, 1, 2, 1]] * 2)
    eight = QuantizedActivation(q, np.ones(2, np.float32), bits=np.int64(8))
    np.testing.assert_array_equal(dequantize_activation(eight), q)


def test_errors_of_a_symbolic_k():
    x = jax.ShapeDtypeStruct(export.symbolic_shape("m, k"), np.float32)
    with pytest.raises(ValueError, match="symbolic") as caught:
        export.export(jax.jit(lambda x: dequantize_activation(quantize_activation(x, bits=4))))(x)
    assert str(caught.value) == (
        "dequantize_activation: K of 4-bit codes must be a number, or symbolic and known to be "
        "even, as 2*k is; got k"
    )
    with pytest.raises(ValueError, match="exported") as caught:
        export.export(jax.jit(quantize_activation))(x).serialize()
    assert str(caught.value) == (
        "QuantizedActivation: to be stored with an exported function, bits, granularity, k must be "
        "numbers and names, got bits=8, granularity=token, k=k; let the function take or return "
        "arrays instead"
    )


def test_errors():
    with pytest.raises(TypeError) as caught:
        dequantize_activation(np.ones((2, 8), np.int8))
    assert str(caught.value) == (
        "dequantize_activation: qa must be a QuantizedActivation, got ndarray"
    )
    qa = QuantizedActivation(np.ones((2, 8), np.int8), np.ones(2, np.float32))
    with pytest.raises(TypeError) as caught:
        dequantize_activation(qa, np.int8)
    assert str(caught.value) == (
        "dequantize_activation: the result must be float16 or bfloat16 or float32, got int8"
    )
