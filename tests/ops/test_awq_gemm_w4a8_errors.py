"""Every text with which they refuse activations; those of weights are in test_errors.py."""

import numpy as np
import pytest

from jax_awq import (
    AWQWeight,
    awq_gemm_w4a4,
    awq_gemm_w4a8,
    quantize_activation,
)

WEIGHT = AWQWeight(
    np.zeros((64, 2), np.int32), np.ones((2, 16), np.float16), np.zeros((2, 2), np.int32)
)
X = np.ones((3, 64), np.float16)


@pytest.mark.parametrize(
    ("op", "x", "options", "error", "text"),
    [
        (
            awq_gemm_w4a8,
            X.astype(np.int8),
            {},
            TypeError,
            "x must be float16 or bfloat16 or float32, got int8",
        ),
        (awq_gemm_w4a8, X[:, 1:], {}, ValueError, "x must have shape (..., 64), got (3, 63)"),
        (
            awq_gemm_w4a8,
            X,
            {"bias": np.ones(3, np.float16)},
            ValueError,
            "bias must have shape (16,), got (3,)",
        ),
        (
            awq_gemm_w4a4,
            X,
            {"out_dtype": np.int32},
            TypeError,
            "the result must be float16 or bfloat16 or float32, got int32",
        ),
        (
            awq_gemm_w4a8,
            X,
            {"activation_dtype": "int4"},
            ValueError,
            "activation_dtype must be one of ('int8', 'float8_e4m3fn'), got 'int4'",
        ),
        (
            awq_gemm_w4a4,
            X,
            {"granularity": "channel"},
            ValueError,
            "granularity must be one of ('token', 'tensor'), got 'channel'",
        ),
        (
            awq_gemm_w4a8,
            X,
            {"scale": np.float32(1)},
            ValueError,
            "scale must be None for granularity 'token', got one",
        ),
        (
            awq_gemm_w4a8,
            X,
            {"granularity": "tensor", "scale": np.ones(3, np.float32)},
            ValueError,
            "scale must have shape (), got (3,)",
        ),
        (
            awq_gemm_w4a8,
            X,
            {"granularity": "tensor", "scale": np.int32(1)},
            TypeError,
            "scale must be float16 or bfloat16 or float32, got int32",
        ),
        (
            awq_gemm_w4a8,
            quantize_activation(X, bits=4),
            {},
            ValueError,
            "x must have 8 bits, got 4",
        ),
        (awq_gemm_w4a4, quantize_activation(X), {}, ValueError, "x must have 4 bits, got 8"),
        (
            awq_gemm_w4a4,
            quantize_activation(X[:, :62], bits=4),
            {},
            ValueError,
            "x must have shape (..., 64), got (3, 62)",
        ),
        (
            awq_gemm_w4a8,
            quantize_activation(X, granularity="channel", scale=np.ones(64, np.float32)),
            {},
            ValueError,
            "x must have a scale for each token or a single one: those of channels cannot leave "
            "the sum over K",
        ),
        (
            awq_gemm_w4a8,
            quantize_activation(X),
            {"scale": np.float32(1)},
            ValueError,
            "a QuantizedActivation brings its own scale",
        ),
        (
            awq_gemm_w4a8,
            quantize_activation(X),
            {"granularity": "tensor"},
            ValueError,
            "a QuantizedActivation brings its own granularity",
        ),
        (
            awq_gemm_w4a8,
            quantize_activation(X),
            {"activation_dtype": "float8_e4m3fn"},
            ValueError,
            "a QuantizedActivation has integer codes, not float8_e4m3fn",
        ),
    ],
)
def test_errors(op, x, options, error, text):
    with pytest.raises(error) as caught:
        op(x, WEIGHT, **options)
    assert str(caught.value) == f"{op.__name__}: {text}"
