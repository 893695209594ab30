"""`quantize` on a language model: perplexity beside that of the weights that AutoAWQ made."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jax_awq
from jax_awq.models import quantization_blocks, read_decoder_config
from jax_awq.quantize import decoder_blocks, quantize

nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
awq_flax = pytest.importorskip("jax_awq.flax")

pytestmark = pytest.mark.usefixtures("optimized")

ROOT = Path(__file__).parents[1]
EXPECTED = np.load(ROOT / "tests/golden/llama-awq-gemm-g128/expected_model.npz")


@pytest.fixture(scope="module")
def example():
    """examples/07_lora.py, for its Llama."""
    spec = importlib.util.spec_from_file_location("lora_example", ROOT / "examples/07_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorded(nnx.Module):
    def __init__(self, linear, path, inputs):
        self.linear, self.path, self.inputs = linear, path, nnx.static(inputs)

    def __call__(self, x):
        self.inputs[self.path] = x
        return self.linear(x)


def dotted(path):
    return ".".join(map(str, ("model", *path)))


def inputs_of(model, ids):
    inputs = {}

    def record(path, node):
        if not isinstance(node, awq_flax.AWQLinear):
            return node
        return Recorded(node, dotted(path), inputs)

    nnx.recursive_map(record, model)(ids)
    return inputs


def perplexity(model, ids):
    logits = model(ids)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return float(jnp.exp(losses.mean()))


@pytest.mark.parametrize(
    ("group_size", "compared"), [(128, "linears"), (64, "linears"), (128, "block")]
)
def test_perplexity_of_a_llama(example, group_size, compared):
    """The dequantized checkpoint stands for a float one; queries share values in it."""
    ids = jnp.asarray(EXPECTED["valid_ids"])
    want = float(EXPECTED["ppl_quantized"])
    model = example.load(example.GOLDEN, jnp.float32)
    assert perplexity(model, ids) == pytest.approx(want, rel=1e-5)

    params = {}
    for name, value in jax_awq.load_hf(example.GOLDEN).items():
        if isinstance(value, jax_awq.AWQWeight):
            params[f"{name}.weight"] = value.dequantize(jnp.float32).T
        else:
            params[name] = value
    if compared == "block":
        blocks = quantization_blocks(params, read_decoder_config(example.GOLDEN))
    else:
        blocks = decoder_blocks(params)
    assert blocks[1].previous is None
    inputs = inputs_of(model, ids[:4])
    result = quantize(
        params, lambda block: [inputs[block.linears[0]]], blocks, group_size=group_size
    )

    for path, module in nnx.iter_modules(model):
        if isinstance(module, awq_flax.AWQLinear):
            module.kernel.set_value(result[dotted(path)])
        elif isinstance(module, nnx.RMSNorm):
            module.scale.set_value(result[f"{dotted(path)}.weight"].astype(jnp.float32))
    assert perplexity(model, ids) == pytest.approx(want, rel=0.005)

    norm = "model.layers.0.input_layernorm.weight"
    assert bool((jnp.abs(result[norm] / params[norm] - 1) > 0.01).any())  # scales are folded
