"""`quantize` over a model: what is folded where, what it gains, and going on after a stop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder import HIDDEN, LAYERS, forward, inputs_of, random_params

import jax_awq
from jax_awq import AWQWeight
from jax_awq.quantize import (
    Block,
    collect_statistics,
    decoder_blocks,
    is_clipped,
    quantize,
    round_to_nearest,
    search_clip,
    search_scale,
)

GROUP = 32
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.fixture
def params(rng):
    return random_params(rng)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((8, 32, HIDDEN)), jnp.float32)


def same_weight(actual, want):
    assert (actual.layout, actual.group_size) == (want.layout, want.group_size)
    for part in ("qweight", "scales", "qzeros"):
        np.testing.assert_array_equal(getattr(actual, part), getattr(want, part))


def test_blocks_of_a_decoder(params):
    blocks = decoder_blocks(params)
    assert blocks[:4] == [
        Block(
            tuple(f"{ATTENTION}.{name}_proj" for name in "qkv"), "model.layers.0.input_layernorm"
        ),
        Block((f"{ATTENTION}.o_proj",), f"{ATTENTION}.v_proj"),
        Block((f"{MLP}.gate_proj", f"{MLP}.up_proj"), "model.layers.0.post_attention_layernorm"),
        Block((f"{MLP}.down_proj",), f"{MLP}.up_proj"),
    ]
    assert len(blocks) == 4 * LAYERS
    # Queries that share values: the outputs of v are not the inputs of o.
    params[f"{ATTENTION}.v_proj.weight"] = np.zeros((HIDDEN // 2, HIDDEN))
    assert decoder_blocks(params)[1].previous is None


def test_clipped_as_autoawq_does():
    clipped = {name: is_clipped(f"k_q_.{name}") for name in ("q_proj", "k_proj", "v_proj", "key")}
    assert clipped == {"q_proj": False, "k_proj": False, "v_proj": True, "key": False}


def test_promotion_of_ranks_may_be_an_error(params, x):
    with jax.numpy_rank_promotion("raise"):
        result = quantize(params, inputs_of(params, x), decoder_blocks(params), group_size=GROUP)
    assert isinstance(result[f"{MLP}.down_proj"], jax_awq.AWQWeight)


def test_scales_are_folded_on_both_sides(params, x):
    blocks = decoder_blocks(params)
    inputs = inputs_of(params, x)
    result = quantize(params, inputs, blocks, group_size=GROUP)

    def found(block):
        statistics = collect_statistics(inputs(block))
        weights = [jnp.asarray(params[f"{path}.weight"]).T for path in block.linears]
        return search_scale(weights, statistics, group_size=GROUP), statistics, weights

    qkv_scale, qkv_statistics, (q, _, v) = found(blocks[0])
    o_scale, o_statistics, (o,) = found(blocks[1])
    np.testing.assert_array_equal(
        result["model.layers.0.input_layernorm.weight"],
        params["model.layers.0.input_layernorm.weight"] / qkv_scale,
    )
    same_weight(
        result[f"{ATTENTION}.q_proj"], round_to_nearest(q * qkv_scale[:, None], group_size=GROUP)
    )
    np.testing.assert_array_equal(
        result[f"{ATTENTION}.v_proj.bias"], params[f"{ATTENTION}.v_proj.bias"] / o_scale
    )
    v = search_clip(
        v * qkv_scale[:, None] / o_scale, qkv_statistics.scaled(qkv_scale), group_size=GROUP
    )
    same_weight(result[f"{ATTENTION}.v_proj"], round_to_nearest(v, group_size=GROUP))
    o = search_clip(o * o_scale[:, None], o_statistics.scaled(o_scale), group_size=GROUP)
    same_weight(result[f"{ATTENTION}.o_proj"], round_to_nearest(o, group_size=GROUP))

    quantized = {path for block in blocks for path in block.linears}
    assert {name for name, w in result.items() if isinstance(w, AWQWeight)} == quantized
    assert set(result) == quantized | {
        name for name in params if name.removesuffix(".weight") not in quantized
    }
    for name in ("model.embed_tokens.weight", f"{ATTENTION}.q_proj.bias"):
        assert result[name] is params[name]


def test_beats_round_to_nearest_on_other_data(params, x, rng):
    other = jnp.asarray(rng.standard_normal((4, 32, HIDDEN)), jnp.float32)
    blocks = decoder_blocks(params)
    plain = dict(params)
    for block in blocks:
        for path in block.linears:
            plain[path] = round_to_nearest(plain.pop(f"{path}.weight").T, group_size=GROUP)

    want = forward(params, other)

    def error(quantized):
        return float(jnp.linalg.norm(forward(quantized, other) - want) / jnp.linalg.norm(want))

    awq = error(quantize(params, inputs_of(params, x), blocks, group_size=GROUP))
    print(awq, error(plain))
    assert awq < 0.9 * error(plain)


def test_float_linears_of_the_same_input(params, x):
    """As the router of experts, which reads the norm that a scale is folded into."""
    down, router = Block((f"{MLP}.down_proj",), f"{MLP}.up_proj"), f"{MLP}.gate_proj"
    block = Block((f"{MLP}.up_proj",), "model.layers.0.post_attention_layernorm", (router,))
    result = quantize(params, inputs_of(params, x), [block, down], group_size=GROUP)
    norm = "model.layers.0.post_attention_layernorm.weight"
    scale = params[norm] / result[norm]
    assert scale.std() > 0.1
    np.testing.assert_allclose(
        result[f"{router}.weight"], params[f"{router}.weight"] * scale, rtol=1e-6
    )
    assert f"{router}.weight" in result


def test_block_without_a_previous_op(params, x):
    path = f"{MLP}.down_proj"
    result = quantize(
        params, inputs_of(params, x), [Block((path,))], group_size=GROUP, clip=lambda path: False
    )
    want = round_to_nearest(params[f"{path}.weight"].T, group_size=GROUP)
    same_weight(result[path], want)
    assert all(result[name] is params[name] for name in params if name != f"{path}.weight")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_dtypes(params, x, dtype):
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    blocks = decoder_blocks(params)[2:4]
    result = quantize(
        params, inputs_of(params, x.astype(jnp.bfloat16)), blocks, group_size=GROUP, dtype=dtype
    )
    assert result[f"{MLP}.up_proj"].dtype == dtype
    assert result["model.layers.0.post_attention_layernorm.weight"].dtype == jnp.bfloat16


class Stopped(Exception):
    pass


def test_goes_on_where_it_was_stopped(params, x, tmp_path):
    blocks = decoder_blocks(params)
    inputs = inputs_of(params, x)
    want = quantize(params, inputs, blocks, group_size=GROUP)

    def until_second_layer(block):
        if "layers.1.mlp" in block.linears[0]:
            raise Stopped
        return inputs(block)

    with pytest.raises(Stopped):
        quantize(params, until_second_layer, blocks, group_size=GROUP, folder=tmp_path)
    asked = []

    def recorded(block):
        asked.append(block)
        return inputs(block)

    result = quantize(params, recorded, blocks, group_size=GROUP, folder=tmp_path)
    assert asked == [blocks[6], blocks[7]]
    again = quantize(params, until_second_layer, blocks, group_size=GROUP, folder=tmp_path)
    for found in (result, again):
        assert set(found) == set(want)
        for name, value in want.items():
            if isinstance(value, AWQWeight):
                same_weight(found[name], value)
            else:
                np.testing.assert_array_equal(found[name], value)
    assert not list(tmp_path.glob("*.part*"))


def test_state_of_bfloat16(params, x, tmp_path):
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    blocks, options = decoder_blocks(params)[2:4], {"group_size": GROUP, "folder": tmp_path}
    want = quantize(params, inputs_of(params, x), blocks, dtype=jnp.bfloat16, **options)
    found = quantize(params, lambda block: [], blocks, dtype=jnp.bfloat16, **options)
    for block in blocks:
        for path in block.linears:
            same_weight(found[path], want[path])


@pytest.mark.parametrize("change", ["weights", "group_size", "clip", "blocks"])
def test_state_of_another_run_is_refused(params, x, tmp_path, change):
    blocks = decoder_blocks(params)[:2]
    options = {"group_size": GROUP, "folder": tmp_path}
    quantize(params, inputs_of(params, x), blocks, **options)
    if change == "weights":
        name = f"{ATTENTION}.k_proj.weight"
        params = params | {name: np.nextafter(params[name], 1)}
    elif change == "group_size":
        options["group_size"] = 64
    elif change == "clip":
        options["clip"] = lambda path: True
    else:
        blocks = [blocks[1]]
    with pytest.raises(ValueError, match=r"quantize: .*00000.* is of another run"):
        quantize(params, inputs_of(params, x), blocks, **options)


@pytest.mark.parametrize("added", [True, False])
def test_state_of_other_blocks_is_refused(params, x, tmp_path, added):
    """The weights of v depend on whether there is a block of o that divides its outputs."""
    v = Block((f"{ATTENTION}.v_proj",), "model.layers.0.input_layernorm")
    runs = [[v], [v, Block((f"{ATTENTION}.o_proj",), f"{ATTENTION}.v_proj")]]
    first, second = runs if added else reversed(runs)
    options = {"group_size": GROUP, "folder": tmp_path}
    quantize(params, inputs_of(params, x), first, **options)
    with pytest.raises(ValueError, match=r"quantize: .*00000\.weights.* is of another run"):
        quantize(params, inputs_of(params, x), second, **options)


def test_state_of_other_weights_that_v_feeds_is_refused(params, x, tmp_path):
    options = {"group_size": GROUP, "folder": tmp_path}
    blocks = decoder_blocks(params)[:2]
    quantize(params, inputs_of(params, x), blocks, **options)
    for file in tmp_path.glob("00001.*"):
        file.unlink()
    name = f"{ATTENTION}.o_proj.weight"
    with pytest.raises(ValueError, match=r"quantize: .*00000\.weights.* is of another run"):
        quantize(params | {name: 2 * params[name]}, inputs_of(params, x), blocks, **options)


def test_bar(params, x, capfd):
    pytest.importorskip("rich")
    blocks = decoder_blocks(params)[2:4]
    quantize(params, inputs_of(params, x), blocks, group_size=GROUP, progress=True)
    captured = capfd.readouterr()
    assert "AWQ" in captured.err
    assert "100%" in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([Block(())], r"Block\(.*\) has no linears"),
        ([Block(("head",))], "there is no tensor head.weight"),
        ([Block((f"{MLP}.up_proj",), "norm")], "there is no tensor norm.weight"),
        (
            [Block((f"{MLP}.up_proj", f"{MLP}.down_proj"))],
            rf"{MLP}.down_proj.weight must have shape \(N, 64\), as .* has, got \(64, 96\)",
        ),
        ([Block((f"{MLP}.up_proj",))] * 2, f"{MLP}.up_proj is in two blocks"),
        (
            [Block((f"{ATTENTION}.q_proj",), f"{MLP}.up_proj")],
            rf"{MLP}.up_proj.weight must have 64 outputs, .* got shape \(96, 64\)",
        ),
        (
            [
                Block((f"{ATTENTION}.{name}_proj",), "model.layers.0.input_layernorm")
                for name in "qk"
            ],
            "model.layers.0.input_layernorm is the previous op of two blocks",
        ),
        (
            [Block((f"{ATTENTION}.v_proj",), f"{ATTENTION}.v_proj")],
            f"previous must make the inputs of {ATTENTION}.v_proj, got {ATTENTION}.v_proj of the",
        ),
        (
            [Block((f"{ATTENTION}.v_proj",), f"{ATTENTION}.o_proj", (f"{ATTENTION}.o_proj",))],
            f"previous must make the inputs of {ATTENTION}.v_proj, got {ATTENTION}.o_proj of the",
        ),
    ],
)
def test_errors_in_blocks(params, x, blocks, text):
    with pytest.raises(ValueError, match=f"quantize: {text}"):
        quantize(params, inputs_of(params, x), blocks, group_size=GROUP)


def test_errors(params, x):
    blocks = [Block((f"{MLP}.up_proj",))]
    with pytest.raises(ValueError, match=f"{MLP}.up_proj.weight: group_size must be -1 or a"):
        quantize(params, inputs_of(params, x), blocks)
    with pytest.raises(TypeError, match="quantize: dtype must be float16 or"):
        quantize(params, inputs_of(params, x), blocks, group_size=GROUP, dtype=np.int8)
    with pytest.raises(
        ValueError, match=r"inputs of .*up_proj must have shape \(..., 64\), got \(..., 8"
    ):
        quantize(params, lambda block: [np.zeros((3, 8))], blocks, group_size=GROUP)
    odd = {f"{MLP}.up_proj.weight": np.zeros((12, 64), np.float32)}
    with pytest.raises(ValueError, match=f"{MLP}.up_proj.weight: N=12 must be a multiple of 8"):
        quantize(odd, inputs_of(params, x), blocks, group_size=GROUP)
    with pytest.raises(ValueError, match=r"decoder_blocks: there is no tensor model\.layers\.0"):
        decoder_blocks({"embed": 0})
    with pytest.raises(TypeError, match=r"calibration of tensors must be a function .*, got list"):
        quantize(params, [x], blocks, group_size=GROUP)
    with pytest.raises(ValueError, match=f"calibration has no inputs of {MLP}.up_proj"):
        quantize(params, {"up_proj": [x]}, blocks, group_size=GROUP)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        *(
            ({"group_size": size}, TypeError, f"group_size must be an integer, got {size!r}")
            for size in (32.0, "32", None)
        ),
        ({"dtype": "junk"}, TypeError, "dtype must be a dtype or the name of one, got 'junk'"),
        ({"dtype": None}, TypeError, "dtype must be float16 or bfloat16 or float32, got None"),
        ({"blocks": [("v",)]}, TypeError, r"blocks must be of Block, got \('v',\)"),
        ({"blocks": Block(("v",))}, TypeError, "blocks must be a sequence, got Block"),
        ({"clip": None}, TypeError, "clip must be a function of a path, got None"),
        ({"model": None}, TypeError, "model must be a Model or a dict of tensors, got NoneType"),
        (
            {"calibration": lambda block: []},
            ValueError,
            f"inputs of {MLP}.up_proj: collect_statistics: the batches have no token",
        ),
        ({"folder": __file__}, FileExistsError, f"{__file__} must be a folder"),
    ],
)
def test_errors_in_options(params, x, options, error, text):
    arguments = {
        "model": params,
        "calibration": inputs_of(params, x),
        "blocks": [Block((f"{MLP}.up_proj",), NORM)],
        "group_size": GROUP,
    }
    with pytest.raises(error, match=f"^quantize: {text}"):
        quantize(**arguments | options)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("up_proj.weight", np.ones((96, 64), np.int32), TypeError, "float64, got int32"),
        ("up_proj.weight", [[1.0]], TypeError, "an array, got list"),
        ("up_proj.bias", np.ones(96, np.int32), TypeError, "float64, got int32"),
        ("up_proj.bias", np.ones(3), ValueError, r"shape \(96,\), got \(3,\)"),
        ("gate_proj.weight", np.ones((96, 64), np.int8), TypeError, "float64, got int8"),
        ("norm.weight", np.full(64, 3, np.int32), TypeError, "float64, got int32"),
        ("norm.bias", np.full(64, 3, np.int32), TypeError, "float64, got int32"),
        ("norm.bias", np.ones(3), ValueError, r"shape \(64,\), got \(3,\)"),
    ],
)
def test_tensors_that_take_no_scale(params, x, name, value, error, text):
    block = Block((f"{MLP}.up_proj",), f"{MLP}.norm", (f"{MLP}.gate_proj",))
    params[f"{MLP}.norm.weight"] = params[f"{NORM}.weight"]
    inputs = inputs_of(params, x)
    params[f"{MLP}.{name}"] = value
    with pytest.raises(error, match=f"^quantize: {MLP}.{name} must .*{text}$"):
        quantize(params, inputs, [block], group_size=GROUP)


class Embedding:
    """A model of one linear, whose inputs are rows of a table."""

    def __init__(self, params):
        self.params = params

    def quantization(self, tokens):
        assert [batch.ndim for batch in tokens] == [2]
        table = self.params["model.embed_tokens.weight"]
        return self.params, lambda block: [table[t] for t in tokens], [Block((f"{MLP}.up_proj",))]


def test_tokens_may_be_nested_lists(params, rng):
    tokens = rng.integers(0, 32, (4, 16))
    want, *others = (
        quantize(Embedding(params), calibration, group_size=GROUP)[f"{MLP}.up_proj"]
        for calibration in (
            tokens,
            tokens.tolist(),
            list(tokens),
            [tokens.tolist()],
            iter([tokens]),
        )
    )
    for found in others:
        same_weight(found, want)


@pytest.mark.parametrize(
    ("tokens", "error", "text"),
    [
        (None, TypeError, "got NoneType"),
        ([1, 2], ValueError, r"got int64 \(\)"),
        (np.arange(3), ValueError, r"got int64 \(3,\)"),
        ([[1, 2], [3]], ValueError, "with rows of equal length"),
        ([[[1, 2], [3]]], ValueError, "with rows of equal length"),
        ([[0.5]], ValueError, r"got float64 \(1, 1\)"),
        (np.zeros((2, 0), np.int64), ValueError, r"got int64 \(2, 0\)"),
    ],
)
def test_tokens_that_are_no_batch(params, tokens, error, text):
    want = r"calibration of a model must be integers \(B, T\) or several such batches"
    with pytest.raises(error, match=f"^quantize: {want}, {text}$"):
        quantize(Embedding(params), tokens, group_size=GROUP)


def test_blocks_of_a_decoder_are_the_default_and_calibration_may_be_a_dict(params, x):
    inputs = inputs_of(params, x)
    blocks = decoder_blocks(params)
    want = jax_awq.quantize(params, inputs, blocks, group_size=GROUP)
    found = jax_awq.quantize(
        params, {block.linears[0]: inputs(block) for block in blocks}, group_size=GROUP
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


NORM = "model.layers.0.post_attention_layernorm"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (f"{MLP}.up_proj.weight", np.nan, f"{MLP}.up_proj.weight must be finite, got NaN or inf"),
        (f"{MLP}.gate_proj.weight", np.inf, f"{MLP}.gate_proj.weight must be finite, got NaN"),
        (f"{NORM}.weight", np.nan, f"{NORM}.weight must be finite, got NaN"),
        (
            f"{MLP}.up_proj.weight",
            1e9,
            f"{MLP}.up_proj.weight must have groups whose scale is finite in float16, got values",
        ),
    ],
)
@pytest.mark.parametrize("searched", [True, False])
def test_weights_that_no_code_is_near(params, x, name, value, text, searched):
    inputs = inputs_of(params, x)
    array = np.array(params[name])
    array.flat[3] = value
    if name.startswith(NORM) and not searched:
        pytest.skip("stays as it is")
    block = Block((f"{MLP}.gate_proj", f"{MLP}.up_proj"), NORM if searched else None)
    with pytest.raises(ValueError, match=f"^quantize: {text}"):
        quantize(params | {name: array}, inputs, [block], group_size=GROUP)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("previous", [NORM, None])
def test_inputs_that_are_not_finite(params, x, value, previous):
    path = f"{MLP}.up_proj"
    with pytest.raises(ValueError, match=f"^quantize: inputs of {path}, and .* must be finite"):
        quantize(
            params, {path: [x.at[0, 0, 0].set(value)]}, [Block((path,), previous)], group_size=GROUP
        )


@pytest.mark.parametrize("content", [b"", b"half of it", b'\x02\0\0\0\0\0\0\0{"'])
def test_damaged_state(params, x, tmp_path, content):
    blocks = decoder_blocks(params)[:1]
    quantize(params, inputs_of(params, x), blocks, group_size=GROUP, folder=tmp_path)
    file = tmp_path / "00000.weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^quantize: {file} is damaged: "):
        quantize(params, inputs_of(params, x), blocks, group_size=GROUP, folder=tmp_path)


def test_damaged_settings_in_a_state(params, x, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    blocks = decoder_blocks(params)[:1]
    file = tmp_path / "00000.weights.safetensors"
    safetensors.save_file({"a": np.zeros(1)}, file, metadata={"run": "[" * 200_000})
    with pytest.raises(ValueError, match=f"^quantize: {file} is damaged: "):
        quantize(params, inputs_of(params, x), blocks, group_size=GROUP, folder=tmp_path)


def test_inputs_without_channels(params):
    blocks = [Block((f"{MLP}.up_proj",))]
    with pytest.raises(ValueError, match=r"must have shape \(..., K\), got \(3, 0\)"):
        quantize(params, lambda block: [np.zeros((3, 0))], blocks, group_size=GROUP)
