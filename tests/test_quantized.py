"""int8 and int4 weights, and the linear that multiplies with their codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export

import jax_awq
from jax_awq import Int4Weight, Int8Weight, QuantizedLinear
from jax_awq.ops._activation import unpack_codes
from jax_awq.testing import quantize_activation_numpy, unpack_bytes

needs_matmul = pytest.mark.skipif(
    not hasattr(jax_awq, "int8_matmul"), reason="jax_awq has no int8_matmul and int4_matmul yet"
)
CLASSES = {8: Int8Weight, 4: Int4Weight}


def codes_of(weight):
    bits = 4 if isinstance(weight, Int4Weight) else 8
    return unpack_bytes(np.swapaxes(weight.q, -1, -2), bits, weight.shape[-2]).swapaxes(-1, -2)


@given(st.data())
def test_from_float_is_exact(data):
    bits = data.draw(st.sampled_from([8, 4]))
    shape = data.draw(st.sampled_from([(1, 3), (7, 4), (8, 1), (2, 5, 3), (0, 2)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    w = rng.standard_normal(shape).astype(np.float32)
    if w.size:
        w[..., 0] = 0
    w = w.astype(data.draw(st.sampled_from([np.float16, jnp.bfloat16, np.float32])))
    weight = CLASSES[bits].from_float(w)
    codes, scale = quantize_activation_numpy(w.swapaxes(-1, -2), bits=bits)
    assert (weight.shape, weight.ndim) == (shape, len(shape))
    np.testing.assert_array_equal(codes_of(weight), codes.swapaxes(-1, -2))
    np.testing.assert_array_equal(weight.scale, scale[..., 0])
    for dtype in (np.float16, np.float32):
        want = (codes.astype(np.float32) * scale).astype(dtype).swapaxes(-1, -2)
        np.testing.assert_array_equal(weight.dequantize(dtype), want)


@pytest.mark.parametrize("bits", [8, 4])
def test_transformations(rng, bits):
    w = rng.standard_normal((3, 7, 5)).astype(np.float32)
    stacked = jax.vmap(CLASSES[bits].from_float)(w)
    assert stacked.shape == (3, 7, 5)
    dense = stacked.dequantize()
    one = jax.tree.map(lambda a: a[1], stacked)
    np.testing.assert_array_equal(one.dequantize(), dense[1])
    _, scanned = jax.lax.scan(lambda c, w: (c, w.dequantize()), 0, stacked)
    np.testing.assert_array_equal(scanned, dense)
    linear = QuantizedLinear(one, np.zeros(5, np.float32), activation="silu")
    assert jax.tree.map(lambda _: None, linear).activation == "silu"
    exported = export.export(jax.jit(lambda w: w.dequantize()))(one)
    got = export.deserialize(exported.serialize()).call(one)
    np.testing.assert_array_equal(got, dense[1])


def test_k_of_int4_codes_is_what_they_hold():
    w = np.ones((8, 3), np.float32)
    given, found = Int4Weight(np.ones((4, 3), np.int8), w[0]), Int4Weight.from_float(w)
    assert given.k == found.k == 8
    assert jax.tree.structure(given) == jax.tree.structure(found)


def test_errors():
    q, scale = np.ones((4, 3), np.int8), np.ones(3, np.float32)
    for error, text, call in (
        (
            TypeError,
            "Int8Weight: q must be int8, got int32",
            lambda: Int8Weight(q.astype(np.int32), scale),
        ),
        (
            ValueError,
            "Int8Weight: scale must have shape (3,), got (4,)",
            lambda: Int8Weight(q, np.ones(4, np.float32)),
        ),
        (
            ValueError,
            "Int4Weight: q must have shape (3, 3), got (4, 3)",
            lambda: Int4Weight(q, scale, k=5),
        ),
        (
            ValueError,
            "Int4Weight: k must be 0 or more, got -1",
            lambda: Int4Weight(q[:0], scale, k=-1),
        ),
        (
            TypeError,
            "Int4Weight: k must be an integer, got 8.0",
            lambda: Int4Weight(q, scale, k=8.0),
        ),
        (
            TypeError,
            "Int8Weight.dequantize: dtype must be a dtype or the name of one, got 'float99'",
            lambda: Int8Weight(q, scale).dequantize("float99"),
        ),
        (
            TypeError,
            "QuantizedLinear: x must be an array, got NoneType",
            lambda: QuantizedLinear(Int8Weight(q, scale))(None),
        ),
        (
            ValueError,
            "Int4Weight.from_float: w must have shape (..., K, N), got (3,)",
            lambda: Int4Weight.from_float(scale),
        ),
        (
            TypeError,
            "QuantizedLinear: weight must be an Int8Weight or an Int4Weight, got ndarray",
            lambda: QuantizedLinear(q),
        ),
        (
            ValueError,
            "QuantizedLinear: bias must have shape (3,), got (4,)",
            lambda: QuantizedLinear(Int8Weight(q, scale), np.ones(4, np.float32)),
        ),
        (
            ValueError,
            "QuantizedLinear: input_scale must have shape (), got (4,)",
            lambda: QuantizedLinear(Int8Weight(q, scale), input_scale=np.ones(4, np.float32)),
        ),
        (
            ValueError,
            "QuantizedLinear: x must have shape (..., 4), got (2, 3)",
            lambda: QuantizedLinear(Int8Weight(q, scale))(np.ones((2, 3), np.float32)),
        ),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == text


@needs_matmul
@pytest.mark.parametrize("given", [False, True], ids=["token", "given"])
@pytest.mark.parametrize("bits", [8, 4])
def test_linear(rng, bits, given):
    x = rng.standard_normal((2, 3, 33)).astype(np.float16)
    w = rng.standard_normal((33, 16)).astype(np.float32)
    bias = rng.standard_normal(16).astype(np.float32)
    input_scale = jnp.float32(0.03) if given else None
    linear = QuantizedLinear.from_float(
        w, bias, bits=bits, input_scale=input_scale, activation="relu"
    )
    codes, scale = quantize_activation_numpy(x, bits=bits, scale=input_scale)
    product = codes.astype(np.int64) @ codes_of(linear.weight).astype(np.int64)
    exact = np.maximum(
        product * scale.astype(np.float64) * np.asarray(linear.weight.scale) + bias, 0
    )
    for run in (linear, jax.jit(lambda x: linear(x))):
        y = run(x)
        assert (y.shape, y.dtype) == ((2, 3, 16), np.float16)
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2e-3, atol=2e-3)
    assert linear(x, out_dtype=jnp.float32).dtype == np.float32
    assert linear(x.astype(np.float64)).dtype == np.float32  # what JAX makes of it
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), linear)
    y = jax.vmap(lambda layer: layer(x))(stacked)
    np.testing.assert_array_equal(y, jnp.stack([linear(x)] * 2))
    with pytest.raises(ValueError, match="weight must have 2 dimensions to be called, got shape"):
        stacked(x)


@pytest.fixture
def matmuls(monkeypatch):
    """Stand in for the products of codes, whose own tests are theirs."""

    def product(a, b, scale_a, scale_b, *, scale_c=None, bias=None, activation, out_dtype):
        y = (a.astype(jnp.float32) @ b.astype(jnp.float32)) * scale_a[..., None] * scale_b
        y = y if bias is None else y + bias
        return {None: y, "relu": jnp.maximum(y, 0)}[activation].astype(out_dtype)

    def packed(a, b, *rest, k, **options):
        return product(unpack_codes(a, 4, k), unpack_codes(b, 4, k, axis=-2), *rest, **options)

    monkeypatch.setattr(jax_awq, "int8_matmul", product, raising=False)
    monkeypatch.setattr(jax_awq, "int4_matmul", packed, raising=False)


@pytest.mark.usefixtures("matmuls")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("framework", ["flax", "equinox"])
def test_layers_take_these_weights(rng, framework, bits):
    layers = pytest.importorskip(f"jax_awq.{framework}")
    w = rng.standard_normal((15, 8)).astype(np.float32)
    bias = rng.standard_normal(8).astype(np.float32)
    x = rng.standard_normal((3, 15)).astype(np.float16)
    weight = CLASSES[bits].from_float(w)
    want = QuantizedLinear(weight, bias)(x)
    assert np.abs(np.asarray(want, np.float32) - (x @ w + bias)).max() < {8: 0.2, 4: 3}[bits]
    if framework == "flax":
        from flax import nnx

        model = nnx.Dict(up=nnx.Linear(15, 8, rngs=nnx.Rngs(0)))
        model = layers.replace_linears(model, {"up": weight, "up.bias": bias})
        got = model.up(x)
    else:
        import equinox as eqx

        model = {"up": eqx.nn.Linear(15, 8, key=jax.random.key(0))}
        model = layers.replace_linears(model, {"up": weight, "up.bias": bias})
        got = jax.vmap(model["up"])(x)
        assert layers.is_awq_weight(model["up"].weight)
    np.testing.assert_array_equal(got, want)
