"""`python -m jax_awq verify`: what it measures, what it writes, and when it fails."""

import dataclasses
import importlib
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_awq
from jax_awq import models
from jax_awq.testing import dequantize_float64, quantize_activation_numpy
from jax_awq.verify import model as in_model
from jax_awq.verify import round_trip, schemes
from jax_awq.weights import AWQWeight

testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from jax_awq.cli import app  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
LLAMA = GOLDEN / "llama-awq-gemm-g128"
NAMES = [scheme.name for scheme in schemes.SCHEMES]


def run(*arguments):
    return testing.CliRunner().invoke(app, ["verify", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    file = tmp_path_factory.mktemp("verify") / "sub" / "verify.json"
    return run("--json", file), json.loads(file.read_text())


def test_synthetic(synthetic):
    found, data = synthetic
    assert found.exit_code == 0, found.output
    assert "9 of 9 round trips are the same, bit for bit" in found.stdout
    assert found.stdout.endswith("no problems\n")
    assert data["build_info"] == jax_awq.build_info()
    assert data["platform"] == "cpu"
    assert data["exceeded"] == []
    assert [row["scheme"] for row in data["summary"]] == NAMES
    assert len(data["rows"]) == 4 * len(NAMES)
    assert all(row["same"] for row in data["round_trips"])
    for row in data["summary"]:
        own = [r["error"] for r in data["rows"] if r["scheme"] == row["scheme"]]
        assert row["mean_error"] == pytest.approx(np.mean(own))
        assert row["worst_error"] == max(own)
        assert row["perplexity"] is None
        assert f"{row['mean_error']:.3g}" in found.stdout


def test_fewer_bits_and_fewer_scales_cost_more(synthetic):
    mean = {row["scheme"]: row["mean_error"] for row in synthetic[1]["summary"]}
    assert mean["W4A16"] < mean["W4A8 token"] < mean["W4A8 tensor"] < mean["W4A4 token"]
    assert mean["W4A4 token"] < mean["W4A4 tensor"]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3-moe"])
def test_every_linear_of_a_checkpoint(tmp_path, rng, name):
    """Experts too; each is told by its name in the files."""
    np.save(tmp_path / "ids.npy", rng.integers(0, 128, (4, 12)))
    file = tmp_path / "verify.json"
    found = run("--awq-model-path", GOLDEN / name, "--tokens", tmp_path / "ids.npy", "--json", file)
    assert "Traceback" not in found.output
    data = json.loads(file.read_text())
    packed = {k for k, w in jax_awq.load_hf(GOLDEN / name).items() if isinstance(w, AWQWeight)}
    assert {row["layer"] for row in data["rows"]} == packed
    assert len(data["rows"]) == len(packed) * len(NAMES)
    assert (data["calibration_tokens"], data["tokens"]) == (12, 36)
    assert data["perplexity"] > 1
    assert found.exit_code == (1 if data["exceeded"] else 0)
    exact = next(row for row in data["summary"] if row["scheme"] == "W4A16")
    assert exact["perplexity"] == pytest.approx(data["perplexity"], rel=0.005)


def test_errors_are_those_of_numpy(rng):
    weight = jax_awq.load_hf(LLAMA)["model.layers.1.mlp.down_proj"]
    x = rng.standard_normal((40, 1536)).astype(np.float16).astype(np.float32)
    seen = jax_awq.ActivationRange.empty().update(x[:10])
    scales = {s.name: schemes.static_scale(s, seen) for s in schemes.SCHEMES}
    errors = schemes.Errors("float16")
    for part in (x[:15], x[15:]):  # in any number of batches
        errors.add([("a", 200), ("b", 312)], jax.numpy.asarray(part), weight, scales)
    dense = dequantize_float64(weight)
    exact = x @ dense
    for row in errors.rows():
        scheme = next(s for s in schemes.SCHEMES if s.name == row["scheme"])
        if scheme.codes not in ("int8", "int4") or (scheme.granularity, scheme.static) == (
            "tensor",
            False,  # has a scale for each batch
        ):
            continue
        bits = int(scheme.codes[3:])
        given = np.abs(x[:10]).max() * np.float32(1 / (2 ** (bits - 1) - 1))
        q, scale = quantize_activation_numpy(x, bits=bits, scale=given if scheme.static else None)
        part = slice(0, 200) if row["layer"] == "a" else slice(200, None)
        error = ((q * scale) @ dense - exact)[:, part]
        want = np.linalg.norm(error) / np.linalg.norm(exact[:, part])
        assert row["error"] == pytest.approx(want, rel=1e-3)
        want = np.abs(error).max() / np.abs(exact[:, part]).max()
        assert row["max"] == pytest.approx(want, rel=1e-3)


def test_inputs_and_perplexity_are_those_of_transformers():
    model = models.load(LLAMA, dtype="float32")
    want, whole = np.load(LLAMA / "expected_linears.npz"), np.load(LLAMA / "expected_model.npz")
    seen = {}
    for row in whole["input_ids"][:, :16]:
        in_model.Inputs(model).show(
            row, lambda path, x, weight: seen.setdefault(path, []).append(np.asarray(x[0]))
        )
    for module, path in (
        ("self_attn.k_proj", "self_attn.qkv_proj"),
        ("mlp.gate_proj", "mlp.gate_up_proj"),
        ("mlp.down_proj", "mlp.down_proj"),
    ):
        np.testing.assert_allclose(
            np.stack(seen[f"model.layers.0.{path}"]),
            want[f"linear_in/model.layers.0.{module}"],
            rtol=0,
            atol=1e-3,
        )
    found = in_model.perplexity(model.params, model.config, whole["valid_ids"], lambda: None)
    assert found == pytest.approx(float(whole["ppl_quantized"]), rel=1e-5)


def test_a_model_that_cannot_run(tmp_path):
    shutil.copytree(GOLDEN / "tiny-llama", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    found = run("--awq-model-path", tmp_path, "--json", tmp_path / "verify.json")
    assert found.exit_code == 0, found.output
    assert "the model cannot run, so activations are synthetic: " in found.stdout
    data = json.loads((tmp_path / "verify.json").read_text())
    packed = {k for k, w in jax_awq.load_hf(tmp_path).items() if isinstance(w, AWQWeight)}
    assert {row["layer"] for row in data["rows"]} == packed
    assert "gemma2" in data["without_model"]


# --- what fails


def test_a_product_that_is_off_exceeds_its_bound(monkeypatch, tmp_path):
    right = schemes.awq_gemm_w4a8
    monkeypatch.setattr(schemes, "awq_gemm_w4a8", lambda *a, **o: 1.1 * right(*a, **o))
    schemes._compare.clear_cache()
    found = run("--json", tmp_path / "verify.json")
    schemes._compare.clear_cache()
    assert found.exit_code == 1
    text = r"problem: W4A8 token: the mean error of the linears is 0\.1\d+, the bound 0\.06"
    assert re.search(text, found.stdout)
    assert "no problems" not in found.stdout
    (first, *_) = json.loads((tmp_path / "verify.json").read_text())["exceeded"]
    assert first.startswith("W4A8 token: the mean error")


def test_a_layout_that_loses_codes_is_told(monkeypatch):
    right = round_trip.convert

    def wrong(weight, layout):
        weight = right(weight, layout)
        return dataclasses.replace(weight, qweight=weight.qweight ^ (layout == "gemv"))

    monkeypatch.setattr(round_trip, "convert", wrong)
    found = run()
    assert found.exit_code == 1
    assert "6 of 9 round trips are the same" in found.stdout
    text = "problem: layout gemv: convert to each layout and back is not the same"
    assert text in found.stdout


def test_nan_and_perplexity_exceed_a_bound():
    rows = [
        {"layer": "a", "scheme": name, "error": float("nan"), "max": float("nan")} for name in NAMES
    ]
    worse = dict.fromkeys(NAMES, 200.0)
    found = schemes.exceeded(schemes.summary(rows, worse), 100.0)
    assert len(found) == 2 * len(NAMES)
    assert found[0] == "W4A16: the mean error of the linears is nan, the bound 0.005"
    assert found[1] == "W4A16: the perplexity is 200, the bound 1.005 times the 100 of float32"


def tokens_of(tmp_path, array, name="tiny-llama"):
    np.save(tmp_path / "ids.npy", array)
    return ["--awq-model-path", GOLDEN / name, "--tokens", tmp_path / "ids.npy"]


def tokens_in(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return ["--awq-model-path", LLAMA, "--tokens", tmp_path / name]


def saved(save):
    file = io.BytesIO()
    save(file, np.zeros((4, 9), np.int32))
    return file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda _: ["--awq-model-path", "/nowhere"], "verify: /nowhere is no folder"),
        (lambda path: ["--awq-model-path", path], r"has no config\.json"),
        (lambda path: ["--json", path], "verify: --json .* cannot be written: it is a folder"),
        (lambda path: ["--tokens", path], "verify: --tokens needs --awq-model-path"),
        (
            lambda path: tokens_of(path, np.zeros((1, 9), np.int32)),
            r"must have integers \(B, T\), both 2 or more, got int32 \(1, 9\)",
        ),
        (lambda path: tokens_of(path, np.zeros((4, 9))), "must have integers .* got float64"),
        (
            lambda path: tokens_of(path, np.full((4, 9), 128)),
            "must have tokens 0 to 127, at most .* a row, got 128 to 128, 9 a row",
        ),
        (
            lambda path: tokens_of(path, np.zeros((4, 4), np.int32), "tiny-qwen3-moe"),
            "must have more than 4 tokens a row, since the model has 8 experts, got 4",
        ),
        *(
            (
                lambda path, name=name, data=data: tokens_in(path, name, data),
                rf"verify: .*{name} must be {message}",
            )
            for name, data, message in (
                ("a.npy", b"", "a whole .npy, got: "),
                ("a.npz", b"", "a whole .npz, got: "),
                ("a.npz", b"PK\x03\x04 and no more", "a whole .npz, got: "),
                ("a.npz", saved(np.save), "a .npz, got a .npy"),
                ("a.npy", saved(np.savez), "a .npy, got a .npz"),
                ("a.txt", b"\xff\xff", "UTF-8 text, got: "),
            )
        ),
        (
            lambda path: tokens_in(path, "a.npz", saved(np.savez)),
            "verify: .*a.npz has no array valid_ids",
        ),
        (
            lambda path: [*tokens_of(path, np.zeros((4, 9)))[:3], path / "no.npz"],
            "No such file or directory: .*no.npz",
        ),
    ],
)
def test_what_is_wrong_is_told(tmp_path, arguments, message):
    found = run(*arguments(tmp_path))
    assert found.exit_code == 1
    assert re.search(f"error: .*{message}", found.stderr)
    assert "Traceback" not in found.output


def test_a_narrow_terminal_cuts_no_digits_off(synthetic):
    wide = synthetic[0].stdout
    found = testing.CliRunner().invoke(app, ["verify"], env={"COLUMNS": "40"})
    numbers = re.compile(r"\d\.\d+(?:e-\d+)?|\d+\.\d+")
    assert sorted(numbers.findall(found.stdout)) == sorted(numbers.findall(wide))


def test_where_to_write_is_looked_at_first(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(importlib.import_module("jax_awq.cli.verify"), "_run", runs.append)
    (tmp_path / "file").touch()
    for file in (tmp_path, tmp_path / "file" / "a.json"):
        found = run("--json", file)
        assert found.exit_code == 1
        assert f"error: verify: --json {file} cannot be written: " in found.stderr
    assert not runs


def test_a_broken_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"verify: .* must be a tokenizer, got: "):
        in_model.read_tokens(tmp_path / "a.txt", tmp_path, models.read_decoder_config(LLAMA))


def test_tokens_of_a_text(tmp_path):
    pytest.importorskip("tokenizers")
    config = models.read_decoder_config(LLAMA)
    file = tmp_path / "text.py"
    file.write_text("import unittest\n\n\nclass Test(unittest.TestCase):\n    pass\n" * 200)
    found = in_model.read_tokens(file, LLAMA, config)
    assert found.meaningful
    assert found.ids.shape[1] == 256
    assert len(found.calibration) + len(found.measured) == len(found.ids)
    file.write_text("x")
    with pytest.raises(ValueError, match="must have 8 tokens or more, got 1"):
        in_model.read_tokens(file, LLAMA, config)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json for the text of"):
        in_model.read_tokens(file, GOLDEN / "tiny-llama", config)


def test_bounds_are_in_the_help():
    found = run("--help").stdout
    for scheme in schemes.SCHEMES:
        assert f"{scheme.name}: error {scheme.error:g}, perplexity {scheme.perplexity:g} x" in found
