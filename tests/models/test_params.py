"""From tensors to parameters: fusing bit for bit, mixed checkpoints, and what has no place."""

import dataclasses
import json
import shutil
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_awq
from jax_awq import models
from jax_awq.checkpoint.load import open_hf
from jax_awq.models.config import read_decoder_config
from jax_awq.models.layers import Linear
from jax_awq.models.params import assemble, fuse, stack

GOLDEN = Path(__file__).parents[1] / "golden"
Q = "model.layers.0.self_attn.q_proj"


def weight(n, *, layout="gemm", group_size=64, zeros=True, dtype=np.float16, k=128):
    rng = np.random.default_rng(n)
    groups = k // group_size
    made = jax_awq.AWQWeight(
        jax_awq.pack_int4(rng.integers(0, 16, (k, n))),
        rng.uniform(0.01, 0.02, (groups, n)).astype(dtype),
        jax_awq.pack_int4(rng.integers(0, 16, (groups, n))) if zeros else None,
    )
    return jax.tree.map(jnp.asarray, jax_awq.convert(made, layout))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("layout", ["gemm", "gemv", "oc_major"])
def test_fused_is_bit_for_bit(layout, zeros):
    parts = {
        name: weight(n, layout=layout, zeros=zeros)
        for name, n in {"q": 40, "k": 8, "v": 16}.items()
    }
    biases = {name: jnp.arange(w.shape[1], dtype=jnp.float16) for name, w in parts.items()}
    fused = fuse({name: Linear(w, biases[name]) for name, w in parts.items()}, "all")
    assert set(fused) == {"all"}
    assert fused["all"].weight.layout == layout
    np.testing.assert_array_equal(
        fused["all"].weight.dequantize(),
        np.concatenate([w.dequantize() for w in parts.values()], axis=1),
    )
    np.testing.assert_array_equal(fused["all"].bias, np.concatenate(list(biases.values())))


@pytest.mark.parametrize(
    "other",
    [
        weight(8, group_size=32),
        weight(8, layout="oc_major"),
        weight(8, zeros=False),
        weight(8, dtype=np.float32),
        jnp.ones((8, 128), jnp.float16),
    ],
)
def test_what_differs_is_not_fused(other):
    parts = {"a": Linear(weight(16)), "b": Linear(other)}
    assert fuse(parts, "both") is parts
    biased = {"a": Linear(weight(16), jnp.zeros(16)), "b": Linear(weight(8))}
    assert fuse(biased, "both") is biased


def test_a_device_gets_nothing_but_the_model():
    """Parts are fused where they were read, one layer at a time."""
    folder = GOLDEN / "llama-awq-gemm-g128"
    config = read_decoder_config(folder)
    got, left = [], []

    def put(part):
        got.append(part)
        left.append(len(tensors))
        return part

    with open_hf(folder) as tensors:
        params = assemble(tensors, config, put=put)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(got))
    assert len(got) == config.num_layers + (2 if config.tie_embeddings else 3)
    assert left == sorted(left, reverse=True)  # a layer is put before the next is read
    assert len(set(left)) == len(left)
    assert set(params["layers"][0]["attention"]) == {"qkv_proj", "o_proj"}


def test_dense_is_fused():
    parts = {"a": Linear(jnp.ones((8, 4))), "b": Linear(jnp.zeros((3, 4)))}
    assert fuse(parts, "both")["both"].weight.shape == (11, 4)


def test_stack_refuses_what_differs():
    with pytest.raises(ValueError, match="1 and 0 differ in structure or shapes"):
        stack([{"a": Linear(weight(16))}, {"a": Linear(weight(8))}])


def rewritten(tmp_path, change, name="tiny-llama"):
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def dense(tensors, *names):
    for name in names:
        parts = [tensors.pop(f"{name}.{part}") for part in ("qweight", "scales", "qzeros")]
        values = jax_awq.AWQWeight(*parts).dequantize(jnp.float32)
        tensors[f"{name}.weight"] = np.asarray(values).T


@pytest.mark.parametrize(
    ("name", "linears"),
    [
        ("tiny-llama", [Q]),
        ("tiny-llama", [Q.replace("q_proj", f"{p}_proj") for p in "qkvo"]),
        ("tiny-qwen2", ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"]),
        ("tiny-qwen3-moe", [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(8)]),
    ],
)
def test_linears_left_in_float(tmp_path, name, linears):
    folder = rewritten(tmp_path, lambda tensors: dense(tensors, *linears), name)
    want = np.load(GOLDEN / name / "expected.npz")
    model = models.load(folder, dtype="float32")
    np.testing.assert_allclose(model.logits(want["input_ids"]), want["logits"], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("tiny-llama", "unrolled"), ("tiny-llama", "stacked"), ("tiny-qwen3-moe", "unrolled")],
)
def test_act_order(tmp_path, name, layers, rng):
    """Every linear in GPTQ's format with inputs in another order, beside the same weights dense."""
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    packed = load_file(tmp_path / "model.safetensors")
    dense = dict(packed)
    for scales in [n for n in packed if n.endswith(".scales")]:
        linear = scales.removesuffix(".scales")
        groups, n = packed[scales].shape
        made = checkpoints.sample(k=32 * groups, n=n, group_size=32, dtype=np.float32, least_zero=1)
        made = dataclasses.replace(
            made,
            codes=rng.integers(0, 16, made.codes.shape),
            group=rng.permutation(made.group),
            act_order=True,
        )
        for part in ("qweight", "scales", "qzeros"):
            del packed[f"{linear}.{part}"], dense[f"{linear}.{part}"]
        tensors, quantization = checkpoints.write_gptq(made)
        packed |= checkpoints.named(tensors, linear)
        # A checkpoint without any quantized linear is refused.
        last = linear.endswith("layers.1.self_attn.o_proj")
        dense |= (
            checkpoints.named(tensors, linear) if last else {f"{linear}.weight": made.dense().T}
        )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantization})
    )
    logits = []
    for tensors, form in ((packed, layers), (dense, "unrolled")):
        tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        model = models.load(tmp_path, dtype="float32", layers=form)
        logits.append(model.logits(np.arange(2, 12)[None]))
    found = [w for w in jax.tree.leaves(model.params, is_leaf=_permuted) if _permuted(w)]
    assert len(found) == 1
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)


def _permuted(node):
    return isinstance(node, jax_awq.PermutedWeight)


def test_quantized_head(tmp_path):
    packed = weight(128, k=64, group_size=32)

    def change(tensors):
        head = tensors.pop("lm_head.weight")
        assert head.shape == (128, 64)
        names = ("qweight", "scales", "qzeros")
        tensors |= {f"lm_head.{n}": np.asarray(getattr(packed, n)) for n in names}

    model = models.load(rewritten(tmp_path, change), dtype="float32")
    assert model.params["lm_head"].weight.shape == (64, 128)

    def dense_change(tensors):
        tensors["lm_head.weight"] = np.asarray(packed.dequantize(jnp.float32)).T

    other = models.load(rewritten(tmp_path, dense_change), dtype="float32")
    ids = np.arange(2, 12)[None]
    np.testing.assert_allclose(model.logits(ids), other.logits(ids), rtol=0, atol=1e-4)


def test_tied_head_may_be_there(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    model = models.load(rewritten(tmp_path, change, "tiny-qwen2"))
    assert "lm_head" not in model.params

    def other(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(ValueError, match=r"lm_head.weight differs .* tie_word_embeddings is true"):
        models.load(rewritten(tmp_path, other, "tiny-qwen2"))


def test_old_frequencies(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    values = 1e6 ** (-np.arange(8) / 8)
    good = rewritten(tmp_path, lambda t: t.update({name: values.astype(np.float32)}), "tiny-qwen2")
    assert models.load(good)
    bad = rewritten(tmp_path, lambda t: t.update({name: 2 * values}), "tiny-qwen2")
    with pytest.raises(ValueError, match=f"{name} in .* has other frequencies than config.json"):
        models.load(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (
            lambda t: t.pop("lm_head.weight"),
            "lm_head.weight is missing in .*, and tie_word_embeddings",
        ),
        (lambda t: t.pop(f"{Q}.bias"), f"{Q}.bias is missing"),
        (
            lambda t: [t.pop(f"{Q}.{p}") for p in ("qweight", "scales", "qzeros")],
            f"{Q}.weight is missing in .*; left of model.layers.0.self_attn: ",
        ),
        (
            lambda t: t.update({"model.layers.2.extra.weight": np.ones(3)}),
            "model_type 'llama' has no place for model.layers.2.extra.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(16)}),
            "has no place for model.layers.0.self_attn.q_norm.weight",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": np.ones((127, 64))}),
            r"embed_tokens.weight in .* must have shape \(128, 64\), got \(127, 64\)",
        ),
        *(
            (
                lambda t, name=name: t.update({name: t[name].view(np.int16)}),
                f"tensor {name} in .* must have a floating dtype, got int16",
            )
            for name in ("model.norm.weight", "lm_head.weight")
        ),
        (
            lambda t: (
                t.update({f"{Q}.{p}": t[f"{Q}.{p}"][:, :4] for p in ("qweight", "qzeros")})
                or t.update(
                    {f"{Q}.scales": t[f"{Q}.scales"][:, :32], f"{Q}.bias": np.ones(32, np.float16)}
                )
            ),
            rf"linear {Q} in .* must have \(K, N\) = \(64, 64\), got \(64, 32\)",
        ),
    ],
)
def test_missing_unused_and_misshapen(tmp_path, change, message):
    folder = rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=f"load: .*{message}") as caught:
        models.load(folder)
    assert str(folder) in str(caught.value)


def test_experts_of_integers():
    config = read_decoder_config(GOLDEN / "tiny-qwen3-moe")
    with open_hf(GOLDEN / "tiny-qwen3-moe") as tensors:
        tensors = {name: read for name, read in tensors.items() if ".experts." not in name}
        shape = (8, 2 * config.experts.intermediate_size, config.hidden_size)
        layer = config.experts.sparse.index(True)
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        tensors[name] = np.ones(shape, np.int16)
        with pytest.raises(ValueError, match=f"load: tensor {name} in x must have a floating"):
            assemble(tensors, config, place="x")
