"""`AWQWeight` as a container: what JAX does with pytrees, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_awq import AWQWeight, convert
from jax_awq.testing import dequantize_float64, random_weight

LAYOUTS = pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])


@LAYOUTS
def test_attributes(rng, layout):
    weight = random_weight(rng, 256, 64, group_size=32, layout=layout)
    assert weight.shape == (256, 64)
    assert weight.ndim == 2
    assert weight.dtype == np.float16
    assert weight.layout == layout
    assert weight.group_size == 32


def test_group_size_is_derived(rng):
    weight = random_weight(rng, 256, 64, group_size=128)
    assert AWQWeight(weight.qweight, weight.scales, weight.qzeros).group_size == 128
    whole = random_weight(rng, 256, 64, group_size=-1)
    assert whole.group_size == -1
    assert AWQWeight(whole.qweight, whole.scales, whole.qzeros).group_size == 256


def test_batch_dimensions(rng):
    weight = random_weight(rng, 64, 16, group_size=32, batch=(2, 3))
    assert weight.shape == (2, 3, 64, 16)
    assert weight.ndim == 4


def test_repr(rng):
    weight = random_weight(rng, 64, 16, group_size=32, symmetric=True)
    assert repr(weight) == (
        "AWQWeight(qweight=int32[64,2], scales=float16[2,16], qzeros=None, "
        "layout='gemm', group_size=32)"
    )


def test_is_frozen(rng):
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_weight(rng, 64, 16, group_size=32).layout = "gemv"


@LAYOUTS
def test_matmul_from_both_array_kinds(rng, layout):
    weight = random_weight(rng, 64, 16, group_size=32, layout=layout)
    eye = np.eye(64, dtype=np.float16)
    want = dequantize_float64(weight).astype(np.float16)
    np.testing.assert_array_equal(eye @ weight, want)
    np.testing.assert_array_equal(jnp.asarray(eye) @ weight, want)
    np.testing.assert_array_equal(jax.jit(lambda x, w: x @ w)(eye, weight), want)


def test_paths_and_structure(rng):
    weight = random_weight(rng, 64, 16, group_size=32)
    leaves, structure = jax.tree_util.tree_flatten_with_path(weight)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".qweight", ".scales", ".qzeros"]
    assert structure == jax.tree.structure(random_weight(rng, 128, 32, group_size=32))
    assert structure != jax.tree.structure(random_weight(rng, 64, 16, group_size=64))
    assert structure != jax.tree.structure(convert(weight, "oc_major"))
    assert len(jax.tree.leaves(random_weight(rng, 64, 16, group_size=32, symmetric=True))) == 2


def test_unflatten_takes_what_is_no_array(rng):
    weight = random_weight(rng, 64, 16, group_size=32)
    axes = jax.tree.map(lambda _: 0, weight)
    assert (axes.qweight, axes.group_size, axes.layout) == (0, 32, "gemm")
    assert repr(axes).startswith("AWQWeight(qweight=0, ")


def test_transformations(rng):
    stacked = random_weight(rng, 64, 16, group_size=32, batch=(3,))
    first = jax.tree.map(lambda a: a[0], stacked)
    assert first.shape == (64, 16)

    doubled = jax.jit(lambda w: dataclasses.replace(w, scales=w.scales * 2))(first)
    assert isinstance(doubled, AWQWeight)
    np.testing.assert_array_equal(doubled.scales, first.scales * 2)

    want = dequantize_float64(stacked).astype(np.float16)
    np.testing.assert_array_equal(jax.vmap(AWQWeight.dequantize)(stacked), want)
    np.testing.assert_array_equal(stacked.dequantize(), want)
    _, scanned = jax.lax.scan(lambda carry, w: (carry, w.dequantize()), None, stacked)
    np.testing.assert_array_equal(scanned, want)

    shapes = jax.eval_shape(lambda w: w, first)
    assert (shapes.shape, shapes.dtype) == ((64, 16), np.float16)
    assert jax.eval_shape(AWQWeight.dequantize, shapes).shape == (64, 16)


def test_donation(rng):
    weight = jax.tree.map(jnp.asarray, random_weight(rng, 64, 16, group_size=32))
    step = jax.jit(lambda w: jax.tree.map(lambda a: a + 1, w), donate_argnums=0)
    step(weight)
    assert weight.qweight.is_deleted()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"qweight": np.zeros((64, 2), np.int64)},
            TypeError,
            "AWQWeight: qweight must be int32, got int64",
        ),
        (
            {"scales": np.zeros((2, 16), np.int32)},
            TypeError,
            "AWQWeight: scales must be float16 or bfloat16 or float32, got int32",
        ),
        (
            {"qzeros": np.zeros((2, 2), np.uint32)},
            TypeError,
            "AWQWeight: qzeros must be int32, got uint32",
        ),
        (
            {"scales": np.zeros((16, 2), np.float16)},
            ValueError,
            "AWQWeight: scales must have shape (2, 16), got (16, 2)",
        ),
        (
            {"scales": np.zeros((16, 2), np.float16), "group_size": None},
            ValueError,
            "AWQWeight: scales must have shape (K/group_size, 16), got (16, 2)",
        ),
        (
            {"scales": np.zeros((3, 16), np.float16), "group_size": None},
            ValueError,
            "AWQWeight: K=64 must be a multiple of the 3 rows of scales",
        ),
        (
            {"qzeros": np.zeros((2, 3), np.int32)},
            ValueError,
            "AWQWeight: qzeros must have shape (2, 2), got (2, 3)",
        ),
        (
            {"qweight": np.zeros(64, np.int32)},
            ValueError,
            "AWQWeight: qweight must have 2 or more dimensions, got shape (64,)",
        ),
        (
            {"layout": "gptq"},
            ValueError,
            "AWQWeight: layout must be one of ('gemm', 'gemv', 'oc_major'), got 'gptq'",
        ),
        (
            {"group_size": 48},
            ValueError,
            "AWQWeight: group_size must be -1 or a divisor of K=64, got 48",
        ),
        (
            {"group_size": 0},
            ValueError,
            "AWQWeight: group_size must be -1 or a divisor of K=64, got 0",
        ),
        (
            {"layout": "gemv", "group_size": None, "qweight": np.zeros((16, 8), np.int32)},
            ValueError,
            "AWQWeight: layout 'gemv' needs group_size: its padded scales do not tell it",
        ),
        (
            {"layout": "oc_major", "group_size": 4, "qweight": np.zeros((16, 8), np.int32)},
            ValueError,
            "AWQWeight: layout 'oc_major' needs a group_size that is a multiple of 8, got 4",
        ),
        (
            {"layout": "oc_major", "qweight": np.zeros((12, 8), np.int32)},
            ValueError,
            "AWQWeight: N=12 must be a multiple of 8",
        ),
    ],
)
def test_errors(rng, change, error, text):
    weight = random_weight(rng, 64, 16, group_size=32)
    with pytest.raises(error) as caught:
        dataclasses.replace(weight, **change)
    assert str(caught.value) == text


def test_convert_errors(rng):
    weight = random_weight(rng, 60, 16, group_size=-1)
    with pytest.raises(ValueError, match=r"^convert: layout must be one of .*, got 'gptq'$"):
        convert(weight, "gptq")
    with pytest.raises(ValueError, match=r"must be a multiple of 8"):
        convert(weight, "oc_major")
