"""Every registered format: its values bit for bit, and every defect of its tensors."""

import numpy as np
import pytest
from checkpoints import (
    LINEAR,
    WRITERS,
    format_cases,
    format_sample,
    named,
    sample,
    write,
    write_shards,
)

import jax_awq
from jax_awq.checkpoint.formats import FORMATS, READABLE
from jax_awq.checkpoint.formats.base import Geometry

BY_NAME = {type(f).__name__: f for f in READABLE}
CASES = pytest.mark.parametrize(("name", "case"), format_cases())
NAMES = pytest.mark.parametrize("name", BY_NAME)


def load(folder, tensors, config):
    return jax_awq.load_hf(write(folder, named(tensors), config))


def assert_same_bits(actual, expected):
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual.view(np.uint16), expected.view(np.uint16))


def test_every_format_has_a_writer():
    assert set(BY_NAME) == set(WRITERS)
    titles = [f.title for f in FORMATS]
    assert len(set(titles)) == len(titles)


@CASES
def test_values(tmp_path, name, case):
    made, tensors, config = format_sample(name, case)
    weight = load(tmp_path, tensors, config)[LINEAR]
    assert weight.shape == made.codes.shape
    assert weight.group_size == made.group_size
    assert_same_bits(weight.dequantize(), made.dense())
    assert isinstance(weight, jax_awq.PermutedWeight) == made.act_order
    x = np.random.default_rng(0).normal(size=(3, len(made.codes))).astype(np.float32)
    want = x.astype(np.float64) @ made.exact()
    np.testing.assert_allclose(x @ weight, want, rtol=0, atol=1e-5 * np.abs(want).max())


@CASES
def test_decoding(name, case):
    """The integers, which tell a zero point apart that no weight shows (q = z, s = 0)."""
    made, tensors, _ = format_sample(name, case)
    geometry = Geometry(*made.codes.shape, made.group_size)
    found = BY_NAME[name]
    np.testing.assert_array_equal(found.codes(tensors[found.packed]), made.codes)
    zeros, scales = found.groups(tensors, geometry)
    np.testing.assert_array_equal(
        np.full_like(made.zeros, 8) if zeros is None else zeros, made.zeros
    )
    assert_same_bits(scales, made.scales)
    order = found.permutation(tensors, geometry)
    assert (order is not None) == made.act_order


@CASES
def test_in_shards_with_a_bias(tmp_path, name, case):
    made, tensors, config = format_sample(name, case)
    full = named(tensors | {"bias": np.ones(made.codes.shape[1], made.scales.dtype)})
    names = list(full)
    write_shards(tmp_path, {n: full[n] for n in names[:2]}, {n: full[n] for n in names[2:]})
    write(tmp_path, {}, config, "unrelated.safetensors")
    loaded = jax_awq.load_hf(tmp_path)
    assert set(loaded) == {LINEAR, f"{LINEAR}.bias"}
    assert_same_bits(loaded[LINEAR].dequantize(), made.dense())


# Defects, each in every tensor of every format


def full_sample(name):
    """The case that has most tensors."""
    own = WRITERS[name][1]
    return format_sample(name, "act-order" if "act-order" in own else "float16")


PARTS = pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name in WRITERS for part in full_sample(name)[1]]
)


def refused(folder, tensors, config, part, text):
    with pytest.raises(ValueError, match=text) as caught:
        load(folder, tensors, config)
    assert f"{LINEAR}.{part}" in str(caught.value)
    assert str(folder / "model.safetensors") in str(caught.value)


@PARTS
def test_missing(tmp_path, name, part):
    _, tensors, config = full_sample(name)
    del tensors[part]
    refused(tmp_path, tensors, config, part, "is missing")


@PARTS
def test_misshapen(tmp_path, name, part):
    _, tensors, config = full_sample(name)
    tensors[part] = np.concatenate([tensors[part], tensors[part]])
    other = "" if part == BY_NAME[name].packed else part  # that tensor is what the others must fit
    refused(tmp_path, tensors, config, other, "must have shape")


@PARTS
def test_flat(tmp_path, name, part):
    _, tensors, config = full_sample(name)
    tensors[part] = (
        tensors[part].reshape(1, -1) if tensors[part].ndim == 1 else tensors[part].ravel()
    )
    refused(tmp_path, tensors, config, "", "must have (shape|2 (or 3 )?dim)")


@PARTS
def test_dtype(tmp_path, name, part):
    _, tensors, config = full_sample(name)
    tensors[part] = tensors[part].astype(np.float64)
    refused(tmp_path, tensors, config, part, "must be .* got F64")


@NAMES
@pytest.mark.parametrize("part", ["weight", "input_scale"])
def test_unused(tmp_path, name, part):
    _, tensors, config = full_sample(name)
    tensors[part] = np.zeros((4, 4), np.float16)
    refused(tmp_path, tensors, config, part, "is unused")


@NAMES
def test_size_that_no_op_takes(tmp_path, name):
    _, tensors, config = full_sample(name)
    packed = BY_NAME[name].packed
    tensors[packed] = tensors[packed][:0]
    refused(tmp_path, tensors, config, packed, "K=.* must be positive and N=.* a multiple of 8")


# What single formats refuse or allow


@pytest.mark.parametrize("name", ["Gptq", "GptqV2", "PackQuantized"])
def test_g_idx_with_uneven_groups(tmp_path, name):
    _, tensors, config = full_sample(name)
    part = "weight_g_idx" if name == "PackQuantized" else "g_idx"
    tensors[part] = np.where(np.arange(256) == 3, 1 - tensors[part].min(), tensors[part] % 3)
    tensors[part] = tensors[part].astype(np.int32)
    refused(tmp_path, tensors, config, part, "must put 64 inputs into each of the 4 groups")


@pytest.mark.parametrize("name", ["Gptq", "GptqV2"])
def test_gptq_without_act_order_needs_no_g_idx(tmp_path, name):
    made, tensors, config = format_sample(name, "float16")
    del tensors["g_idx"]
    weight = load(tmp_path, tensors, config)[LINEAR]
    assert isinstance(weight, jax_awq.AWQWeight)
    assert_same_bits(weight.dequantize(), made.dense())


def test_gptq_decides_by_g_idx_and_not_by_desc_act(tmp_path):
    made, tensors, config = format_sample("Gptq", "act-order")
    weight = load(tmp_path, tensors, {**config, "desc_act": False})[LINEAR]
    assert_same_bits(weight.dequantize(), made.dense())


def test_gptq_v1_is_what_is_not_named(tmp_path):
    made, tensors, config = format_sample("Gptq", "float16")
    del config["checkpoint_format"]
    assert_same_bits(load(tmp_path, tensors, config)[LINEAR].dequantize(), made.dense())


def test_gptq_version_cannot_be_guessed(tmp_path):
    _, tensors, _ = format_sample("Gptq", "float16")
    config = {"bits": 4, "group_size": 64}
    refused(tmp_path, tensors, config, "qweight", "may be in GPTQ v1 or GPTQ v2 format")


def test_gptq_v1_has_no_zero_point_of_16(tmp_path):
    made, _, config = format_sample("Gptq", "float16")
    made.zeros[1, 5] = 16
    tensors, _ = WRITERS["Gptq"][0](made)
    refused(tmp_path, tensors, config, "qzeros", r"must be 0 to 14, got 15 at \(1, 5\)")


@pytest.mark.parametrize("name", ["GemvFast", "LlmAwq"])
@pytest.mark.parametrize("wrong", ["half a step", "16", "negative", "scale 0", "dtype"])
def test_gemv_fast_zeros_that_are_no_integers(tmp_path, name, wrong):
    made, tensors, config = format_sample(name, "float16")
    part = BY_NAME[name].zeros
    scale = made.scales[2, 7]
    if wrong == "dtype":
        tensors[part] = tensors[part].astype(np.float32)
        refused(tmp_path, tensors, config, part, "must be float16, like the scales, got float32")
        return
    if wrong == "scale 0":
        tensors["scales"][2, 7] = 0
    tensors[part][2, 7] = {
        "half a step": -scale * np.float16(2.5),
        "16": -scale * np.float16(16),
        "negative": scale,
        "scale 0": 0.25,
    }[wrong]
    refused(tmp_path, tensors, config, part, r"minus the product .* at \(2, 7\)")


def test_gemv_fast_without_scale(tmp_path):
    """A scale of 0 tells nothing about its zero point, and needs none."""
    made, tensors, config = format_sample("GemvFast", "float16")
    tensors["scales"][2, 7] = tensors["qzeros"][2, 7] = 0
    dense = np.asarray(load(tmp_path, tensors, config)[LINEAR].dequantize())
    want = made.dense()
    want[128:192, 7] = 0
    np.testing.assert_array_equal(dense, want)


def test_llm_awq_by_autoawqs_name(tmp_path):
    made, tensors, config = format_sample("LlmAwq", "float16")
    loaded = load(tmp_path, tensors, {**config, "version": "gemv_fast"})
    assert_same_bits(loaded[LINEAR].dequantize(), made.dense())


def test_pack_quantized_width_is_told_by_weight_shape(tmp_path):
    _, tensors, config = format_sample("PackQuantized", "float16")
    tensors["weight_shape"] = np.array([64, 128])
    refused(tmp_path, tensors, config, "weight_shape", r"must be \(64, 256\), .* got \(64, 128\)")


def test_pack_quantized_groups_of_the_configuration_may_differ(tmp_path):
    _, _, config = format_sample("PackQuantized", "float16")
    _, _, other = format_sample("PackQuantized", "one group")
    other["config_groups"]["group_0"]["weights"]["symmetric"] = True
    config["config_groups"]["group_1"] = other["config_groups"]["group_0"]
    for case in ("float16", "symmetric", "one group"):
        made, tensors, _ = format_sample("PackQuantized", case)
        loaded = load(tmp_path, tensors, config)
        assert loaded[LINEAR].group_size == made.group_size
        assert_same_bits(loaded[LINEAR].dequantize(), made.dense())


@pytest.mark.parametrize(
    ("values", "part", "text"),
    [
        ({"num_bits": 8}, "weight_packed", "bits is 8, must be 4"),
        ({"symmetric": True}, "weight_zero_point", "is unused"),
        ({"group_size": 128}, "weight_scale", r"must have shape \(64, 2\), got \(64, 4\)"),
        ({"actorder": "group"}, "weight_g_idx", "is missing"),
    ],
)
def test_pack_quantized_contradicts_its_configuration(tmp_path, values, part, text):
    _, tensors, config = format_sample("PackQuantized", "float16")
    config["config_groups"]["group_0"]["weights"] |= values
    with pytest.raises(ValueError, match=text) as caught:
        load(tmp_path, tensors, config)
    assert f"{LINEAR}.{part}" in str(caught.value)


def test_int_quantized_is_refused(tmp_path):
    _, _, config = format_sample("PackQuantized", "float16")
    tensors = {
        "weight": np.zeros((64, 256), np.int8),
        "weight_scale": np.ones((64, 4), np.float16),
    }
    refused(tmp_path, tensors, {**config, "format": "int-quantized"}, "weight", "int-quantized or")


def test_formats_alike_are_told_apart_by_the_configuration(tmp_path):
    """These shapes are those of GPTQ, too; its groups would be of 8 inputs."""
    made = sample(k=256, n=32, group_size=32)
    tensors, config = WRITERS["Gemv"][0](made)
    assert sum(f.recognise(_headers(tensors)) for f in READABLE) > 1
    assert_same_bits(load(tmp_path, tensors, config)[LINEAR].dequantize(), made.dense())


def _headers(tensors):
    from jax_awq.checkpoint.files import Tensor

    kinds = {"int32": "I32", "float16": "F16"}
    return {n: Tensor(n, None, kinds[str(a.dtype)], a.shape) for n, a in tensors.items()}


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"GptqV2"}))
def test_format_without_its_version(tmp_path, name):
    """The tensors tell the format; of GPTQ, the method and the default version."""
    made, tensors, config = format_sample(name, "float16")
    for key in ("version", "checkpoint_format", "format"):
        config.pop(key, None)
    assert_same_bits(load(tmp_path, tensors, config)[LINEAR].dequantize(), made.dense())
