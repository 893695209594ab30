"""Small checkpoints, written for one test."""

import json

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
