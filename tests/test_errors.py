"""Every text with which the ops refuse their arguments, eagerly and under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_awq import AWQWeight, awq_dequantize, awq_gemm, awq_gemm_w4a4, awq_gemm_w4a8

K, N, G = 64, 16, 32


def arguments(**changes):
    f16, i32 = np.float16, np.int32
    return {
        "x": np.ones((3, K), f16),
        "qweight": np.zeros((K, N // 8), i32),
        "scales": np.ones((K // G, N), f16),
        "qzeros": np.zeros((K // G, N // 8), i32),
        **changes,
    }


ONES = np.ones
WEIGHT = AWQWeight(**{k: v for k, v in arguments().items() if k != "x"})

WEIGHT_ERRORS = [
    ({"qweight": ONES((K, 2), np.uint32)}, TypeError, "qweight must be int32, got uint32"),
    (
        {"scales": ONES((2, N), np.int8)},
        TypeError,
        "scales must be float16 or bfloat16 or float32, got int8",
    ),
    ({"qzeros": ONES((2, 2), np.int8)}, TypeError, "qzeros must be int32, got int8"),
    (
        {"scales": ONES((N, 2), np.float16), "group_size": G},
        ValueError,
        "scales must have shape (2, 16), got (16, 2)",
    ),
    (
        {"scales": ONES((N, 2), np.float16)},
        ValueError,
        "scales must have shape (K/group_size, 16), got (16, 2)",
    ),
    (
        {"scales": ONES((5, N), np.float16)},
        ValueError,
        "K=64 must be a multiple of the 5 rows of scales",
    ),
    ({"qzeros": ONES((2, 16), np.int32)}, ValueError, "qzeros must have shape (2, 2), got (2, 16)"),
    (
        {"scales": ONES(N, np.float16)},
        ValueError,
        "scales must have 2 or more dimensions, got shape (16,)",
    ),
    (
        {"layout": "marlin"},
        ValueError,
        "layout must be one of ('gemm', 'gemv', 'oc_major'), got 'marlin'",
    ),
    (
        {"qweight": ONES((0, 2), np.int32)},
        ValueError,
        "K must be 1 or more, got 0",
    ),
    ({"group_size": "32"}, TypeError, "group_size must be an integer, got '32'"),
    ({"group_size": 32.0}, TypeError, "group_size must be an integer, got 32.0"),
    ({"group_size": [32]}, TypeError, "group_size must be a plain value, got [32]"),
    ({"qweight": [[0]]}, TypeError, "qweight must be an array, got list"),
    (
        {"qweight": ONES((12, K // 8), np.int32), "layout": "oc_major", "group_size": G},
        ValueError,
        "N=12 must be a multiple of 8",
    ),
    (
        {
            "qweight": ONES((N, K // 8), np.int32),
            "scales": ONES((16, N), np.float16),
            "qzeros": None,
            "layout": "oc_major",
        },
        ValueError,
        "layout 'oc_major' needs a group_size that is a multiple of 8, got 4",
    ),
    ({"group_size": 48}, ValueError, "group_size must be -1 or a divisor of K=64, got 48"),
    (
        {"layout": "gemv"},
        ValueError,
        "layout 'gemv' needs group_size: its padded scales do not tell it",
    ),
    ({"scales": None}, ValueError, "scales are needed unless qweight is an AWQWeight"),
    ({"scales": WEIGHT}, TypeError, "scales must be an array, got AWQWeight"),
    (
        {"qweight": ONES((2, 2, K, 2), np.int32)},
        ValueError,
        "qweight must have 2 dimensions, or 3 with a leading batch, got shape (2, 2, 64, 2)",
    ),
    (
        {"qweight": ONES((4, K, 2), np.int32), "scales": ONES((5, 2, N), np.float16)},
        ValueError,
        "leading batch dimensions must agree, got qweight 4, scales 5",
    ),
    ({"qweight": WEIGHT, "qzeros": None}, ValueError, "an AWQWeight brings its own scales"),
    (
        {"qweight": WEIGHT, "scales": None, "qzeros": None, "layout": "gemv", "group_size": G},
        ValueError,
        "an AWQWeight brings its own layout, group_size",
    ),
]

GEMM_ERRORS = [
    ({"x": ONES((3, K), np.int8)}, TypeError, "x must be float16 or bfloat16 or float32, got int8"),
    ({"x": ONES((3, 32), np.float16)}, ValueError, "x must have shape (..., 64), got (3, 32)"),
    ({"x": np.float16(1)}, ValueError, "x must have shape (..., 64), got ()"),
    ({"bias": ONES(8, np.float16)}, ValueError, "bias must have shape (16,), got (8,)"),
    (
        {"bias": ONES((1, 1, N), np.float16)},
        ValueError,
        "bias must have shape (1, 16), got (1, 1, 16)",
    ),
    (
        {"bias": ONES(N, np.int32)},
        TypeError,
        "bias must be float16 or bfloat16 or float32, got int32",
    ),
    (
        {"activation": "swish"},
        ValueError,
        "activation must be one of (None, 'gelu', 'gelu_tanh', 'relu', 'silu'), got 'swish'",
    ),
    ({"x": [1.0]}, TypeError, "x must be an array, got list"),
    (
        {"activation": ["silu"]},
        TypeError,
        "activation must be a plain value, got ['silu']",
    ),
    (
        {"out_dtype": "nonsense"},
        TypeError,
        "out_dtype must be a dtype or the name of one, got 'nonsense'",
    ),
    ({"split_k_iters": 2.5}, TypeError, "split_k_iters must be an integer, got 2.5"),
    ({"split_k_iters": True}, TypeError, "split_k_iters must be an integer, got True"),
    ({"split_k_iters": 0}, ValueError, "split_k_iters must be 1 or more, got 0"),
    (
        {"deterministic": "always"},
        ValueError,
        "deterministic must be one of ('run', 'batch_invariant'), got 'always'",
    ),
    (
        {"out_dtype": jnp.int32},
        TypeError,
        "the result must be float16 or bfloat16 or float32, got int32",
    ),
    (
        {"qweight": ONES((4, K, 2), np.int32)},
        ValueError,
        "x must have shape (4, ..., 64), got (3, 64)",
    ),
    (
        {"bias": ONES((4, N), np.float16), "qweight": ONES((5, K, 2), np.int32)},
        ValueError,
        "leading batch dimensions must agree, got qweight 5, bias 4",
    ),
]


def _call(op, options):
    arrays = {k: v for k, v in options.items() if hasattr(v, "shape")}
    static = {k: v for k, v in options.items() if k not in arrays}
    return lambda: op(**options), lambda: jax.jit(lambda a: op(**a, **static))(arrays)


@pytest.mark.parametrize(("change", "error", "text"), WEIGHT_ERRORS + GEMM_ERRORS)
def test_awq_gemm(change, error, text):
    for call in _call(awq_gemm, arguments(**change)):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == f"awq_gemm: {text}"


@pytest.mark.parametrize("op", [awq_gemm_w4a8, awq_gemm_w4a4])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [e for e in WEIGHT_ERRORS + GEMM_ERRORS if not {"split_k_iters", "deterministic"} & set(e[0])],
)
def test_awq_gemm_w4a8(op, change, error, text):
    """The same; those of the activations are in ops/test_awq_gemm_w4a8_errors.py."""
    for call in _call(op, arguments(**change)):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == f"{op.__name__}: {text}"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *WEIGHT_ERRORS,
        (
            {"dtype": jnp.int8},
            TypeError,
            "the result must be float16 or bfloat16 or float32, got int8",
        ),
    ],
)
def test_awq_dequantize(change, error, text):
    options = arguments(**change)
    del options["x"]
    for call in _call(awq_dequantize, options):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == f"awq_dequantize: {text}"
