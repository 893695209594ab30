"""The encoder of all-MiniLM-L6-v2 in plain JAX, and text for it: real weights, real outliers."""

import re

import jax
import jax.numpy as jnp
import numpy as np

LAYERS, HEADS = 6, 12
LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def paths():
    return [f"encoder.layer.{i}.{name}" for i in range(LAYERS) for name in LINEARS]


def embed(params, ids, linear):
    """Sentence embeddings (B, 384) of full rows of ids (B, T); `linear(path, x)` is ``x @ w``."""

    def norm(path, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-12)
        return scaled * params[f"{path}.weight"] + params[f"{path}.bias"]

    def dense(path, x):
        return linear(path, x) + params[f"{path}.bias"]

    x = params["embeddings.word_embeddings.weight"][ids]
    x = x + params["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm("embeddings.LayerNorm", x + params["embeddings.token_type_embeddings.weight"][0])
    for i in range(LAYERS):
        prefix = f"encoder.layer.{i}"
        q, k, v = (
            dense(f"{prefix}.attention.self.{name}", x).reshape(*x.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        mixed = dense(f"{prefix}.attention.output.dense", mixed)
        x = norm(f"{prefix}.attention.output.LayerNorm", x + mixed)
        h = jax.nn.gelu(dense(f"{prefix}.intermediate.dense", x), approximate=False)
        x = norm(f"{prefix}.output.LayerNorm", x + dense(f"{prefix}.output.dense", h))
    pooled = x.mean(1)
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


def tokenize(text, vocabulary, length):
    """Rows of [CLS], `length` - 2 word pieces and [SEP]."""
    pieces = []
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()):
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in vocabulary), None)
            if end is None:
                break
            pieces.append(vocabulary[prefix + word[start:end]])
            start = end
    rows = len(pieces) // (length - 2)
    body = np.array(pieces[: rows * (length - 2)]).reshape(rows, -1)
    first, last = (np.full((rows, 1), vocabulary[name]) for name in ("[CLS]", "[SEP]"))
    return np.concatenate([first, body, last], axis=1)
