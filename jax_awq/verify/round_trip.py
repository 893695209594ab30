"""Codes, layouts and dequantization, there and back, bit for bit."""

from collections.abc import Iterator

import numpy as np

from jax_awq._packing import LAYOUTS, Order, pack_int4, unpack_int4
from jax_awq.testing import dequantize_float64, random_weight
from jax_awq.weights import convert


def round_trips() -> Iterator[tuple[str, str, bool]]:
    """Yields layout, what was done, and whether it gave the same bits."""
    rng = np.random.default_rng(0)
    for layout in LAYOUTS:
        order: Order = "awq" if layout == "gemm" else "natural"
        codes = rng.integers(0, 16, (256, 128)).astype(np.int8)
        back = unpack_int4(pack_int4(codes, order=order), order=order)
        yield layout, "pack, unpack", np.array_equal(codes, back)
        same, dequantized = [], []
        for group_size in (32, 64, 128, -1):
            for symmetric in (False, True):
                weight = random_weight(
                    rng, 256, 128, group_size=group_size, layout=layout, symmetric=symmetric
                )
                for other in LAYOUTS:
                    again = convert(convert(weight, other), layout)
                    same += [
                        np.array_equal(getattr(weight, name), getattr(again, name))
                        for name in ("qweight", "scales", "qzeros")
                        if getattr(weight, name) is not None
                    ]
                exact = dequantize_float64(weight)
                dequantized += [
                    np.array_equal(weight.dequantize(dtype), exact.astype(dtype))
                    for dtype in (np.float16, np.float32)
                ]
        yield layout, "convert to each layout and back", all(same)
        yield layout, "dequantize, against float64", all(dequantized)
