"""A LoRA on a frozen AWQ Llama: a Flax NNX model of one's own, with the weights of a checkpoint.

python examples/07_lora.py
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jax_awq
from jax_awq.flax import AWQLinear, AWQParam, replace_linears

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "llama-awq-gemm-g128"
RANK, STEPS, LEARNING_RATE = 8, 30, 1e-2
DTYPE = jnp.bfloat16


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)


class Attention(nnx.Module):
    def __init__(self, config: dict, rngs: nnx.Rngs):
        hidden, self.head_dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.theta = config["rope_theta"]
        self.q_proj = linear(hidden, heads * self.head_dim, rngs)
        self.k_proj = linear(hidden, kv_heads * self.head_dim, rngs)
        self.v_proj = linear(hidden, kv_heads * self.head_dim, rngs)
        self.o_proj = linear(heads * self.head_dim, hidden, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (
            project(x).reshape(*x.shape[:2], -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = jax.nn.dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.o_proj(y.reshape(*x.shape[:2], -1))

    def rotate(self, x: jax.Array) -> jax.Array:
        half = self.head_dim // 2
        angle = jnp.arange(x.shape[1])[:, None] * self.theta ** (-jnp.arange(half) / half)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class MLP(nnx.Module):
    def __init__(self, config: dict, rngs: nnx.Rngs):
        hidden, intermediate = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = linear(hidden, intermediate, rngs)
        self.up_proj = linear(hidden, intermediate, rngs)
        self.down_proj = linear(intermediate, hidden, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: dict, rngs: nnx.Rngs):
        size, epsilon = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    def __init__(self, config: dict, dtype, rngs: nnx.Rngs):
        size, vocabulary = config["hidden_size"], config["vocab_size"]
        self.embed_tokens = nnx.Embed(vocabulary, size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])
        self.norm = nnx.RMSNorm(size, epsilon=config["rms_norm_eps"], rngs=rngs)
        self.lm_head = linear(size, vocabulary, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def load(folder: Path, dtype=DTYPE) -> Llama:
    checkpoint = {
        name.removeprefix("model."): w for name, w in jax_awq.load_hf(folder, dtype=dtype).items()
    }
    config = json.loads((folder / "config.json").read_text())
    # Shapes alone: no float weight is made only to be thrown away.
    model = nnx.eval_shape(lambda: Llama(config, dtype, nnx.Rngs(0)))
    model = replace_linears(model, checkpoint)
    for path, module in nnx.iter_modules(model):
        value = checkpoint.get(".".join(map(str, (*path, "weight"))))
        if isinstance(module, nnx.RMSNorm):
            module.scale.set_value(value)
        elif isinstance(module, nnx.Embed):
            module.embedding.set_value(value)
        elif isinstance(module, nnx.Linear):
            module.kernel.set_value(value.T)
    return model


def add_lora(model: Llama, rngs: nnx.Rngs) -> Llama:
    """The model with every AWQ linear ``x @ w`` as ``x @ w + x @ a @ b``."""

    def wrap(path: tuple, node):
        if not isinstance(node, AWQLinear):
            return node
        sizes = node.in_features, RANK, node.out_features
        return nnx.LoRA(*sizes, base_module=node, dtype=DTYPE, rngs=rngs)

    return nnx.recursive_map(wrap, model)


def loss_of(model: Llama, ids: jax.Array) -> jax.Array:
    logits = model(ids[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


# wrt takes the adapters alone: the AWQ weights are no nnx.Param and no nnx.LoRAParam.
@nnx.jit
def step(model: Llama, optimizer: nnx.Optimizer, ids: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(
        model, ids
    )
    optimizer.update(model, gradients)
    return loss


def size_of(model: Llama, kind: type) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, kind)))


def main() -> int:
    model = add_lora(load(GOLDEN), nnx.Rngs(0))
    frozen = jax.tree.map(jnp.copy, nnx.state(model, AWQParam))
    optimizer = nnx.Optimizer(model, optax.adam(LEARNING_RATE), wrt=nnx.LoRAParam)
    print(f"AWQ weights: {size_of(model, AWQParam)} bytes, frozen")
    print(f"adapters of rank {RANK}: {size_of(model, nnx.LoRAParam)} bytes, trained")

    # Sentences that no language model can know, so the loss starts at that of a guess.
    ids = jax.random.randint(jax.random.key(1), (4, 32), 0, model.embed_tokens.num_embeddings)
    losses = [float(step(model, optimizer, ids)) for _ in range(STEPS)]
    for i in range(0, STEPS, 10):
        print(f"step {i}: loss {losses[i]:.3f}")
    last = float(loss_of(model, ids))
    print(f"step {STEPS}: loss {last:.3f}")

    same = jax.tree.map(lambda a, b: bool((a == b).all()), frozen, nnx.state(model, AWQParam))
    good = all(jax.tree.leaves(same)) and last < losses[0] / 4
    print("good" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
