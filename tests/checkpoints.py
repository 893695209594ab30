"""Small checkpoints, written for one test.

The writers follow what the tools store, word by word in numpy, and share no code with the package.
"""

import dataclasses
import json
from collections.abc import Callable

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import jax_awq

LINEAR = "model.layers.0.mlp.up_proj"
CONFIG = {
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "quant_method": "awq",
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that is in nibble 0, 1, ... of AutoAWQ's words


def linear():
    """A whole linear with K=256, N=64."""
    rng = np.random.default_rng(0)
    return {
        f"{LINEAR}.qweight": jax_awq.pack_int4(rng.integers(0, 16, (256, 64))),
        f"{LINEAR}.qzeros": jax_awq.pack_int4(rng.integers(0, 16, (2, 64))),
        f"{LINEAR}.scales": rng.uniform(0.01, 0.02, (2, 64)).astype(np.float16),
    }


def write(folder, tensors, config=CONFIG, file="model.safetensors"):
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def halves():
    tensors = linear()
    first = {
        f"{LINEAR}.qweight": tensors.pop(f"{LINEAR}.qweight"),
        "model.norm.weight": np.ones(4, np.float16),
    }
    return first, tensors


def write_shards(folder, *shards, weight_map=None):
    found = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(folder, tensors, file=name)
        found |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": found | (weight_map or {})})
    )
    return folder


# One linear in every format


@dataclasses.dataclass(frozen=True)
class Sample:
    """A quantized linear as integers.

    Attributes:
      codes: (K, N), 0 to 15.
      zeros: (groups, N), 0 to 15.
      scales: (groups, N).
      group: (K,), the group of each input.
      group_size: as a configuration tells it.
    """

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group: np.ndarray
    group_size: int
    symmetric: bool
    act_order: bool

    def exact(self):
        """``(q - z) * s``; the product of 5 and 11 bits is exact in float64."""
        difference = self.codes.astype(np.float64) - self.zeros[self.group]
        return difference * self.scales[self.group].astype(np.float64)

    def dense(self):
        """The same rounded once to the dtype of the scales."""
        return self.exact().astype(self.scales.dtype)


def sample(
    *,
    k=256,
    n=64,
    group_size=64,
    dtype=np.float16,
    symmetric=False,
    act_order=False,
    least_zero=0,
):
    rng = np.random.default_rng(k + n)
    rows = k if group_size == -1 else group_size
    zeros = rng.integers(least_zero, 16, (k // rows, n))
    group = np.arange(k) // rows
    return Sample(
        codes=rng.integers(0, 16, (k, n)),
        zeros=np.full_like(zeros, 8) if symmetric else zeros,
        scales=rng.uniform(0.005, 0.02, zeros.shape).astype(dtype),
        group=rng.permutation(group) if act_order else group,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
    )


def words(values, order=range(8), dtype=np.int32):
    """Packs the last axis; nibble i of a word is value ``order[i]`` of its ``len(order)``."""
    order = list(order)
    blocks = values.astype(np.uint32).reshape(*values.shape[:-1], -1, len(order))
    packed = np.zeros(blocks.shape[:-1], np.uint32)
    for nibble, column in enumerate(order):
        packed |= blocks[..., column] << np.uint32(4 * nibble)
    return packed.astype({np.int32: np.uint32, np.int16: np.uint16}[dtype]).view(dtype)


def padded_groups(s):
    """Groups after AutoAWQ's padding, calculate_zeros_width of awq/modules/linear/gemv.py."""
    groups, rows = len(s.scales), len(s.group) // len(s.scales)
    multiple = {64: 2, 32: 4}.get(rows, 1)
    zero_words = -(-groups // 8)
    return 8 * (-(-zero_words // multiple) * multiple)


def pad(array, rows):
    """Rows of zeros below."""
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def awq_config(s, version):
    return {**CONFIG, "group_size": s.group_size, "zero_point": not s.symmetric, "version": version}


def write_gemm(s):
    tensors = {
        "qweight": words(s.codes, AWQ_ORDER),
        "qzeros": words(s.zeros, AWQ_ORDER),
        "scales": s.scales,
    }
    if s.symmetric:
        del tensors["qzeros"]
    return tensors, awq_config(s, "gemm")


def write_gemv(s):
    rows = padded_groups(s)
    tensors = {
        "qweight": words(s.codes.T),
        "qzeros": words(pad(s.zeros, rows).T),
        "scales": pad(s.scales, rows).T,
    }
    return tensors, awq_config(s, "gemv")


def write_gemv_fast(s, zeros_name="qzeros", version="gemv_fast"):
    k, n = s.codes.shape
    codes = s.codes.T.reshape(n, k // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    codes = codes.reshape(n, k // 8, 4, 2).transpose(0, 1, 3, 2).reshape(n, k)
    blocks = codes.reshape(n // 4, 4, k // 64, 64).transpose(0, 2, 1, 3)
    products = (s.scales.astype(np.float32) * s.zeros.astype(np.float32)).astype(s.scales.dtype)
    rows = padded_groups(s)
    tensors = {
        "qweight": words(blocks.reshape(n // 4, k * 4), range(4), np.int16),
        "scales": pad(s.scales, rows),
        zeros_name: pad(-products, rows),
    }
    return tensors, awq_config(s, version)


def write_llm_awq(s):
    return write_gemv_fast(s, "scaled_zeros", "llm-awq")


def write_gptq(s, checkpoint_format="gptq", less=1):
    tensors = {
        "qweight": words(s.codes.T).T,
        "qzeros": words(s.zeros - less),
        "scales": s.scales,
        "g_idx": s.group.astype(np.int32),
    }
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": s.group_size,
        "desc_act": s.act_order,
        "sym": s.symmetric,
        "checkpoint_format": checkpoint_format,
    }
    return tensors, config


def write_gptq_v2(s):
    return write_gptq(s, "gptq_v2", 0)


def write_pack_quantized(s):
    k, n = s.codes.shape
    signed, signed_zeros = s.codes - 8, s.zeros - 8
    tensors = {
        "weight_packed": words((signed + 8).T),
        "weight_scale": s.scales.T,
        "weight_zero_point": words(signed_zeros + 8).T,
        "weight_shape": np.array([n, k], np.int64),
        "weight_g_idx": s.group.astype(np.int32),
    }
    if s.symmetric:
        del tensors["weight_zero_point"]
    if not s.act_order:
        del tensors["weight_g_idx"]
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": s.symmetric,
        "strategy": "channel" if s.group_size == -1 else "group",
        "group_size": None if s.group_size == -1 else s.group_size,
        "actorder": "group" if s.act_order else None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "version": "0.19.0",
    }
    return tensors, config


# By the name of the class that reads the format: how to write it, and what it has besides COMMON.
COMMON = {
    "float16": {},
    "bfloat16": {"dtype": ml_dtypes.bfloat16},
    "groups of 32": {"group_size": 32},
    "one group": {"group_size": -1},
    "more outputs": {"k": 128, "n": 320},
}
SYMMETRIC = {"symmetric": {"symmetric": True}}
ACT_ORDER = {
    "act-order": {"act_order": True},
    "act-order, bfloat16": {"act_order": True, "group_size": 32, "dtype": ml_dtypes.bfloat16},
}
WRITERS: dict[str, tuple[Callable, dict]] = {
    "Gemm": (write_gemm, SYMMETRIC),
    "Gemv": (write_gemv, {}),
    "GemvFast": (write_gemv_fast, {}),
    "LlmAwq": (write_llm_awq, {}),
    "Gptq": (write_gptq, SYMMETRIC | ACT_ORDER),
    "GptqV2": (write_gptq_v2, SYMMETRIC | ACT_ORDER),
    "PackQuantized": (write_pack_quantized, SYMMETRIC | ACT_ORDER),
}


def format_cases():
    """(class name, case) of every format."""
    return [(name, case) for name, (_, own) in WRITERS.items() for case in COMMON | own]


def format_sample(name, case):
    """(sample, tensors by part, configuration)."""
    writer, own = WRITERS[name]
    least_zero = 1 if name == "Gptq" else 0  # a zero point of 0 does not survive the first version
    made = sample(**(COMMON | own)[case], least_zero=least_zero)
    return made, *writer(made)


def named(tensors, module=LINEAR):
    return {f"{module}.{part}": array for part, array in tensors.items()}
