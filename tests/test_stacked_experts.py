"""compressed-tensors checkpoints whose experts are one 3-D weight: each packed as 2-D, stacked."""

import json
import shutil
from pathlib import Path

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_awq
from jax_awq import models

GOLDEN = Path(__file__).parent / "golden" / "tiny-qwen3-moe"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
PACKED = ("weight_packed", "weight_scale", "weight_zero_point")


def stacked(samples):
    """(tensors by part, configuration) of several experts."""
    made = [checkpoints.write_pack_quantized(s) for s in samples]
    tensors = {name: np.stack([t[name] for t, _ in made]) for name in PACKED if name in made[0][0]}
    k, n = samples[0].codes.shape
    return tensors | {"weight_shape": np.array([len(samples), n, k], np.int64)}, made[0][1]


def experts(count=3, **options):
    samples = []
    for number in range(count):
        made = checkpoints.sample(**options)
        rng = np.random.default_rng(number)
        made.codes[:], made.scales[:] = rng.permuted(made.codes), rng.permuted(made.scales)
        if not made.symmetric:
            made.zeros[:] = rng.permuted(made.zeros)
        samples.append(made)
    return samples


def load(folder, tensors, config):
    return jax_awq.load_hf(checkpoints.write(folder, checkpoints.named(tensors, EXPERTS), config))


@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True}, {"group_size": -1}, {"dtype": ml_dtypes.bfloat16, "group_size": 32}],
)
def test_values(tmp_path, options):
    samples = experts(**options)
    tensors, config = stacked(samples)
    tensors["bias"] = np.ones((3, 64), np.float16)
    loaded = load(tmp_path, tensors, config)
    weight = loaded[EXPERTS]
    assert weight.shape == (3, 256, 64)
    assert weight.group_size == samples[0].group_size
    want = np.stack([s.dense() for s in samples])
    np.testing.assert_array_equal(np.asarray(weight.dequantize()), want)
    assert loaded[f"{EXPERTS}.bias"].shape == (3, 64)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight_shape": np.array([3, 256, 64])}, r"weight_shape .* must be \(3, 64, 256\)"),
        ({"weight_shape": np.array([64, 256])}, r"weight_shape .* must have shape \(3,\)"),
        ({"weight_scale": np.ones((2, 64, 4), np.float16)}, r"weight_scale .*\(3, 64, 4\)"),
        ({"weight_zero_point": np.ones((8, 4), np.int32)}, r"weight_zero_point .*\(3, 8, 4\)"),
        ({"weight_packed": np.ones((0, 64, 32), np.int32)}, r"weight_packed .* must be positive"),
        ({"weight_packed": np.ones((1, 3, 64, 32), np.int32)}, r"must have 2 or 3 dimensions"),
    ],
)
def test_misshapen(tmp_path, change, text):
    tensors, config = stacked(experts())
    with pytest.raises(ValueError, match=text):
        load(tmp_path, tensors | change, config)


def test_act_order_is_refused(tmp_path):
    tensors, _ = stacked(experts())
    ordered, config = checkpoints.write_pack_quantized(checkpoints.sample(act_order=True))
    tensors["weight_g_idx"] = ordered["weight_g_idx"]
    with pytest.raises(
        ValueError, match=r"gate_up_proj.weight_g_idx .* is act-order, which is not"
    ):
        load(tmp_path, tensors, config)


def test_other_formats_have_no_stacks(tmp_path):
    tensors, config = checkpoints.write_gemm(checkpoints.sample())
    with pytest.raises(ValueError, match=r"qweight .* must have 2 dimensions, got shape \(1, 256"):
        load(tmp_path, {name: array[None] for name, array in tensors.items()}, config)


# A whole model


def repacked(tmp_path, *, packed_experts=True):
    """The golden Qwen3-MoE in this format, its experts in two tensors a layer as transformers 5."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    old = load_file(tmp_path / "model.safetensors")
    names = [name.removesuffix(".scales") for name in old if name.endswith(".scales")]
    samples = {name: sample_of(*(old.pop(f"{name}.{p}") for p in PARTS)) for name in names}
    new = dict(old)
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            [samples.pop(f"{prefix}.{e}.{part}_proj") for e in range(8)]
            for part in ("gate", "up", "down")
        )
        fused = [side_by_side(*pair) for pair in zip(gate, up, strict=True)]
        for name, some in (("gate_up_proj", fused), ("down_proj", down)):
            if packed_experts:
                new |= checkpoints.named(stacked(some)[0], f"{prefix}.{name}")
            else:
                new[f"{prefix}.{name}"] = np.stack([s.exact().T for s in some]).astype(np.float32)
    for name, made in samples.items():
        tensors, quantization = checkpoints.write_pack_quantized(made)
        new |= checkpoints.named(tensors, name)
    save(tmp_path, new)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


PARTS = ("qweight", "scales", "qzeros")


def sample_of(qweight, scales, qzeros):
    group = np.arange(len(qweight)) // 32
    codes, zeros = jax_awq.unpack_int4(qweight), jax_awq.unpack_int4(qzeros)
    return checkpoints.Sample(codes, zeros, scales, group, 32, False, False)


def side_by_side(a, b):
    joined = {p: np.concatenate([getattr(a, p), getattr(b, p)], axis=1) for p in SAMPLED}
    return checkpoints.Sample(
        **joined, group=a.group, group_size=32, symmetric=False, act_order=False
    )


SAMPLED = ("codes", "zeros", "scales")


def save(folder, tensors):
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")


@pytest.mark.parametrize("packed_experts", [True, False])
def test_model(tmp_path, packed_experts):
    folder = repacked(tmp_path, packed_experts=packed_experts)
    want = np.load(GOLDEN / "expected.npz")
    model = models.load(folder, dtype="float32")
    np.testing.assert_allclose(model.logits(want["input_ids"]), want["logits"], rtol=0, atol=5e-5)


def test_model_with_too_few_experts(tmp_path):
    folder = repacked(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.down_proj"
    for part in PACKED:
        tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][:7]
    tensors[f"{name}.weight_shape"] = np.array([7, 64, 32])
    save(folder, tensors)
    text = rf"linear {name} in .* must have \(E, K, N\) = \(8, 32, 64\), got \(7, 32, 64\)"
    with pytest.raises(ValueError, match=text):
        models.load(folder)


def test_inspect(tmp_path):
    survey = pytest.importorskip("jax_awq.cli.inspect").survey(repacked(tmp_path))
    assert survey.problems == []
    shapes = {entry.name: entry.shape for entry in survey.entries}
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (8, 64, 64)
