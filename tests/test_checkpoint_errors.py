"""`load_hf` refuses every defect of tensors and configuration with one error that names them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, LINEAR, linear, write

import jax_awq
from jax_awq.checkpoint.load import open_hf

# Defects of the tensors: every message names the tensor and the file


def without(part):
    return lambda t: t.pop(f"{LINEAR}.{part}")


def put(name, array):
    return lambda t: t.update({name: array})


def change(part, function):
    def edit(tensors):
        tensors[f"{LINEAR}.{part}"] = function(tensors[f"{LINEAR}.{part}"])

    return edit


def gptq(tensors):
    tensors[f"{LINEAR}.qweight"] = np.zeros((32, 64), np.int32)


def marlin(tensors):
    tensors[f"{LINEAR}.qweight"] = np.zeros((16, 128), np.int32)
    del tensors[f"{LINEAR}.qzeros"]


def compressed(tensors):
    tensors.clear()
    tensors |= {
        f"{LINEAR}.weight_packed": np.zeros((64, 32), np.int32),
        f"{LINEAR}.weight_scale": np.zeros((64, 2), np.float16),
    }


DEFECTS = {
    "no_qzeros": (without("qzeros"), "qzeros", "is missing"),
    "no_scales": (without("scales"), "scales", "is missing"),
    "no_qweight": (without("qweight"), "qweight", "is missing"),
    "scales_alone": (
        lambda t: (without("qweight")(t), without("qzeros")(t)),
        "qweight",
        "is missing",
    ),
    "short_scales": (
        change("scales", lambda a: a[:1]),
        "scales",
        r"must have shape \(2, 64\), got \(1, 64\)",
    ),
    "narrow_scales": (
        change("scales", lambda a: a[:, :56]),
        "scales",
        r"must have shape \(2, 64\), got \(2, 56\)",
    ),
    "transposed_qzeros": (
        change("qzeros", np.transpose),
        "qzeros",
        r"must have shape \(2, 8\), got \(8, 2\)",
    ),
    "flat_qweight": (change("qweight", np.ravel), "qweight", "must have 2 dimensions"),
    "float_qzeros": (change("qzeros", lambda a: a.astype(np.float32)), "qzeros", "must be I32"),
    "integer_scales": (
        change("scales", lambda a: a.astype(np.int32)),
        "scales",
        "must be F16 or BF16 or F32, got I32",
    ),
    "k_not_grouped": (
        change("qweight", lambda a: a[:192]),
        "qweight",
        "group_size must be -1 or a divisor of K=192, got 128",
    ),
    "bad_bias": (
        put(f"{LINEAR}.bias", np.zeros(8, np.float16)),
        "bias",
        r"must have shape \(64,\), got \(8,\)",
    ),
    "weight_beside": (
        put(f"{LINEAR}.weight", np.zeros((64, 256), np.float16)),
        "weight",
        "is unused",
    ),
    "stray_part": (
        put(f"{LINEAR}.input_scale", np.zeros(1, np.float16)),
        "input_scale",
        "is unused",
    ),
    "same_name": (put(LINEAR, np.zeros(8, np.float16)), "", "the name of a quantized linear"),
    "gptq": (gptq, "qweight", "quant_method is 'awq', must be 'gptq': .* shape of GPTQ"),
    "g_idx": (put(f"{LINEAR}.g_idx", np.zeros(256, np.int32)), "g_idx", "is unused"),
    "marlin": (marlin, "qweight", "is in Marlin format"),
    "llm_awq_v2": (
        put(f"{LINEAR}.scaled_zeros", np.zeros((8, 64), np.float16)),
        "scaled_zeros",
        "is unused",
    ),
    "compressed_tensors": (compressed, "weight_packed", "must be 'compressed-tensors'"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_of_a_tensor(tmp_path, defect):
    edit, part, text = DEFECTS[defect]
    tensors = linear()
    edit(tensors)
    tensors["model.norm.weight"] = np.ones(4, np.float16)
    with pytest.raises(ValueError, match=text) as caught:
        jax_awq.load_hf(write(tmp_path, tensors))
    assert f"{LINEAR}.{part}".rstrip(".") in str(caught.value)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def with_value(value):
    def edit(array):
        array[1, 3] = value
        return array

    return edit


# Defects of values, which are found when they are read

VALUES = {
    "nan_scale": (change("scales", with_value(np.nan)), f"{LINEAR}.scales", "finite scales"),
    "infinite_scale": (change("scales", with_value(np.inf)), f"{LINEAR}.scales", "finite scales"),
    "i64": (put("a", np.array([1, 2**40 + 5])), "a", "must have values of int32 .* 1099511627781"),
    "low_i64": (put("a", np.array([-(2**31) - 1])), "a", "must have .* got -2147483649"),
    "u64": (put("a", np.array([2**32], np.uint64)), "a", "must have values of uint32 .*4294967296"),
    "f64": (put("a", np.array([1, -1e300])), "a", r"must be finite in float32, got -1e\+300"),
}


@pytest.mark.parametrize("defect", VALUES)
def test_defect_of_values(tmp_path, defect):
    edit, name, text = VALUES[defect]
    tensors = linear()
    edit(tensors)
    with pytest.raises(ValueError, match=text) as caught:
        jax_awq.load_hf(write(tmp_path, tensors))
    assert f"load_hf: tensor {name} in {tmp_path / 'model.safetensors'}" in str(caught.value)


def test_64_bit_integers_that_fit_are_loaded(tmp_path):
    tensors = {"a": np.array([-(2**31), 2**31 - 1]), "b": np.array([2**32 - 1], np.uint64)}
    loaded = jax_awq.load_hf(write(tmp_path, linear() | tensors))
    for name, array in tensors.items():
        assert loaded[name].tolist() == array.tolist()
    tensors["a"][0] = 2**40
    with jax.enable_x64(True):
        assert jax_awq.load_hf(write(tmp_path, linear() | tensors))["a"].tolist()[0] == 2**40


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
@pytest.mark.parametrize("stored", [np.float32, jnp.bfloat16, np.float64])
def test_finite_values_stay_finite(tmp_path, dtype, stored):
    array = np.array([np.inf, -np.inf, np.nan, 1, 1e-9], stored)
    loaded = jax_awq.load_hf(write(tmp_path, linear() | {"a": array}), dtype=dtype)["a"]
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(
        np.float32(loaded),
        np.float32(array.astype(jnp.dtype(dtype))),  # numpy's NaN is no float8
    )
    folder = write(tmp_path, linear() | {"a": np.append(array, stored(1e30))})
    for load in (jax_awq.load_hf, _read_all):
        with pytest.raises(
            ValueError,
            match=rf"^load_hf: tensor a in .*model.safetensors must be finite in {dtype}, got",
        ):
            load(folder, dtype=dtype)


def _read_all(folder, dtype):
    """As `models.load` does."""
    with open_hf(folder, dtype=dtype, for_model=True) as tensors:
        return [read() for read in tensors.values()]


def test_float64(tmp_path):
    folder = write(tmp_path, linear() | {"a": np.array([1e300])})
    with jax.enable_x64(True):
        assert jax_awq.load_hf(folder)["a"].tolist() == [1e300]


@pytest.mark.parametrize("device", ["cpu", 0])
def test_device_that_is_none(tmp_path, device):
    with pytest.raises(
        TypeError, match=f"^load_hf: device must be a jax.Device or Sharding, got {device!r}$"
    ):
        jax_awq.load_hf(write(tmp_path, linear()), device=device)


@pytest.mark.parametrize("value", [5, True, "LlamaForCausalLM"])
def test_architectures_must_be_a_list(tmp_path, value):
    file = write(tmp_path, linear()) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": value}))
    with pytest.raises(
        ValueError, match=f"^load_hf: {file}: architectures must be list, got {value!r}$"
    ):
        jax_awq.load_hf(tmp_path)


def test_dtype_that_is_not_read(tmp_path):
    file = write(tmp_path, linear() | {"a": np.zeros(4, np.int8)}) / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"I8","shape":[4]', b'"F4","shape":[8]'))
    with pytest.raises(ValueError, match=rf"load_hf: tensor a in {file} must be BOOL.*, got F4"):
        jax_awq.load_hf(tmp_path)


def test_size_that_no_op_takes(tmp_path):
    tensors = {
        f"{LINEAR}.qweight": np.zeros((12, 32), np.int32),
        f"{LINEAR}.scales": np.ones((12, 8), np.float16),
        f"{LINEAR}.qzeros": np.zeros((12, 1), np.int32),
    }
    with pytest.raises(ValueError, match=r"qweight in .*safetensors: .* N=12 must be a mult"):
        jax_awq.load_hf(write(tmp_path, tensors, {**CONFIG, "version": "gemv"}))


# Defects of the configuration


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"version": "gemv"},
            "version is 'gemv', must be 'gemm': .*qweight in .*model.safetensors",
        ),
        (
            {"version": "gemm2"},
            r"version must be one of \['gemm', 'gemv', .* got 'gemm2'.*qweight",
        ),
        (
            {"group_size": 64},
            r"scales in .* must have shape \(4, 64\), got \(2, 64\).*group_size 64",
        ),
        ({"group_size": 0}, "group_size must be -1 or a divisor of K=256, got 0"),
        ({"group_size": None}, "has no group_size"),
        ({"group_size": "128"}, "group_size must be int, got '128'"),
        ({"bits": 8}, "bits is 8, must be 4"),
        ({"bits": 4.0}, "bits must be int, got 4.0"),
        ({"zero_point": False}, "qzeros in .* is unused.*zero_point is False"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq', must be 'awq'"),
    ],
)
def test_defect_of_the_configuration(tmp_path, values, text):
    with pytest.raises(ValueError, match=text) as caught:
        jax_awq.load_hf(write(tmp_path, linear(), {**CONFIG, **values}))
    assert "config.json" in str(caught.value)


def test_configurations_that_disagree(tmp_path):
    write(tmp_path, linear())
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 64}))
    with pytest.raises(ValueError, match=r"group_size is 128, must be 64: .*/quant_config.json"):
        jax_awq.load_hf(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "must be a JSON object, got list"),
        ("{}", "has no quantization_config"),
        ('{"quantization_config": 4}', "quantization_config must be a JSON object"),
    ],
)
def test_config_file_is_damaged(tmp_path, text, message):
    (write(tmp_path, linear()) / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        jax_awq.load_hf(tmp_path)


def test_nothing_is_quantized(tmp_path):
    with pytest.raises(ValueError, match=r"model.safetensors has no quantized linear"):
        jax_awq.load_hf(write(tmp_path, {"a.weight": np.ones(4, np.float16)}))
