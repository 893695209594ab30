"""The decode benchmark: its decoder, its rows and its table. Nothing is timed here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_awq.bench import decode
from jax_awq.bench.__main__ import main
from jax_awq.models import decoder
from jax_awq.models.attention import make_cache

SMALL = decode.SMALL


def test_weight_bytes_of_the_real_shape():
    """From the sizes of Llama 3 8B by hand: codes, then scales and zeros of each 128 inputs."""
    inputs_times_outputs = 4096 * (6144 + 4096 + 28672) + 14336 * 4096
    packed = (
        inputs_times_outputs // 2
        + inputs_times_outputs // 128 * 2
        + (inputs_times_outputs // 128 // 2)
    )
    norms, head = (2 * 32 + 1) * 4096 * 2, 128256 * 4096 * 2
    for is_packed, layer in ((True, packed), (False, inputs_times_outputs * 2)):
        params = jax.eval_shape(
            lambda is_packed=is_packed: decode.random_params(
                decode.LLAMA_3_8B, packed=is_packed, stacked=False, group_size=128
            )
        )
        size = sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves({**params, "embed": None})
        )
        assert size == 32 * layer + norms + head


def test_weight_bytes_are_those_of_the_arrays():
    params = decode.random_params(SMALL, packed=True, stacked=True, group_size=128)
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert decode.weight_bytes(params) == everything - 512 * 256 * 2


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_that_of_the_decoder(packed, stacked):
    params = decode.random_params(SMALL, packed=packed, stacked=stacked, group_size=128)
    leaves = jax.tree.leaves(params["layers"])
    assert any(leaf.dtype == jnp.int32 for leaf in leaves) == packed
    ids = np.array([[3, 7, 400]], np.int32)
    logits = np.asarray(decoder.logits(params, ids, config=SMALL))[0]
    cache = make_cache(SMALL, 1, 8, stacked=stacked)
    for position in range(3):
        token, cache = decode.step(params, ids[:, position], cache, config=SMALL)
        assert logits[position, token[0]] >= logits[position].max() - 0.05
    assert int(cache.length) == 3
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01


def test_command_line(tmp_path, capsys):
    file = tmp_path / "results" / "decode.json"
    options = "--small --batches 1 3 --context 16 --steps 4 --repeats 1 --bandwidth-mb 1"
    assert main(["decode", *options.split(), "--json", str(file)]) == 0
    captured = capsys.readouterr()
    assert "decode jax_awq unrolled float16 batch 3, 1 a call: " in captured.err
    result = json.loads(file.read_text())
    assert {"build_info", "device", "jax", "date", "ceilings", "method", "model"} <= set(result)
    assert result["model"] == json.loads(json.dumps(dataclasses.asdict(SMALL)))
    rows = result["rows"]
    assert [(r["impl"], r["layers"], r["batch"]) for r in rows] == [
        (impl, layers, batch)
        for impl in ("jax_awq", "xla_dense")
        for layers in ("unrolled", "stacked")
        for batch in (1, 3)
    ]
    bandwidth = result["ceilings"]["read_bytes_per_second"]
    assert bandwidth == max(result["ceilings"]["measured"].values())
    for row in rows:
        assert row["us"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["us"] * 1e6, rel=1e-2)
        bound = row["weight_bytes"] / bandwidth * 1e6
        assert row["bound_us"] == pytest.approx(bound, abs=0.01)
        assert row["bound_fraction"] == pytest.approx(bound / row["us"], abs=1e-2)
    assert rows[0]["weight_bytes"] < rows[4]["weight_bytes"]
    assert main(["table", str(file)]) == 0
    assert capsys.readouterr().out == captured.out
    assert captured.out.startswith("| impl | layers | dtype | batch | steps/call | us/step |")


def test_several_steps_of_a_call():
    params = decode.random_params(SMALL, packed=True, stacked=False, group_size=128)
    token, cache = jnp.array([3]), make_cache(SMALL, 1, 8, stacked=False)
    many, filled = decode.step(params, token, cache, config=SMALL, steps=3)
    cache = make_cache(SMALL, 1, 8, stacked=False)
    for _ in range(3):
        token, cache = decode.step(params, token, cache, config=SMALL)
    assert int(many[0]) == int(token[0])
    assert int(filled.length) == int(cache.length) == 3
    options = {"context": 8, "steps": 4, "steps_per_call": (1, 4), "repeats": 1, "bandwidth": 1e9}
    rows = list(decode.run(SMALL, [1], chosen=["jax_awq"], layers=["unrolled"], **options))
    assert [row["steps_per_call"] for row in rows] == [1, 4]


def test_steps_must_fit():
    with pytest.raises(SystemExit, match="--steps must be from 1 to --context 8, got 9"):
        main(["decode", "--small", "--context", "8", "--steps", "9"])
    with pytest.raises(SystemExit, match="--steps-per-call must divide --steps 8, got 3"):
        main(["decode", "--small", "--context", "8", "--steps", "8", "--steps-per-call", "1", "3"])


def test_the_array_for_the_bandwidth_has_bytes():
    with pytest.raises(SystemExit, match=r"^--bandwidth-mb must be 1 or more, got 0$"):
        main(["decode", "--small", "--bandwidth-mb", "0"])
