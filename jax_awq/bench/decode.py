"""Tokens per second of a synthetic decoder, 4-bit and dense, against the bandwidth of memory."""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_awq
from jax_awq.bench import arguments, impls, report
from jax_awq.models import decoder
from jax_awq.models.attention import KVCache, make_cache
from jax_awq.models.config import DecoderConfig
from jax_awq.models.layers import Linear
from jax_awq.models.params import stack
from jax_awq.models.rope import Rope

METHOD = (
    "A step takes the last tokens and the cache and gives the next tokens (argmax) and the cache. "
    "A call of a jitted program, which donates the cache, makes `steps_per_call` of them, in a "
    "loop inside the program where they are several; calls are dispatched one after the other "
    "from Python without looking at a token, until the cache is full, then awaited. "
    "us is the median of the repeats after a warm-up, divided by the steps. The cache is random "
    "and has `context` slots, all of which every step reads. weight_bytes are those that a step "
    "reads: layers, norms and lm_head, not the embedding. bound_us is weight_bytes at the "
    "read_bytes_per_second of the same run: a sum over a large array, or its copy, whichever "
    "moves more."
)
LLAMA_3_8B = DecoderConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope=Rope(500000.0),
    max_positions=8192,
)
SMALL = dataclasses.replace(
    LLAMA_3_8B,
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)
IMPLS = ("jax_awq", "xla_dense")
LAYERS = ("unrolled", "stacked")
SHOWN = (  # what the table reads of a row
    *("impl", "layers", "dtype", "batch", "us"),
    *("tokens_per_second", "weight_bytes", "bound_fraction"),
)


def random_params(
    config: DecoderConfig, *, packed: bool, stacked: bool, group_size: int
) -> dict[str, Any]:
    """Random weights on the device, never zeros; dense where not `packed`."""
    keys = iter(jax.random.split(jax.random.key(0), 8 * config.num_layers + 8))
    hidden, head = config.hidden_size, config.head_dim

    def dense(n: int, k: int) -> Array:
        return _dense(next(keys), n, k, config.dtype)

    def linear(k: int, n: int) -> Linear:
        if not packed:
            return Linear(dense(n, k))
        case = impls.Case(0, k, n, group_size, config.dtype)
        return Linear(jax_awq.AWQWeight(*_packed(next(keys), case), group_size=group_size))

    def layer() -> dict[str, Any]:
        qkv = (config.num_heads + 2 * config.num_kv_heads) * head
        return {
            "input_norm": jnp.ones(hidden, config.dtype),
            "post_norm": jnp.ones(hidden, config.dtype),
            "attention": {
                "qkv_proj": linear(hidden, qkv),
                "o_proj": linear(config.num_heads * head, hidden),
            },
            "mlp": {
                "gate_up_proj": linear(hidden, 2 * config.intermediate_size),
                "down_proj": linear(config.intermediate_size, hidden),
            },
        }

    layers = [layer() for _ in range(config.num_layers)]
    return {
        "embed": dense(config.vocab_size, hidden),
        "norm": jnp.ones(hidden, config.dtype),
        "lm_head": Linear(dense(config.vocab_size, hidden)),
        "layers": stack(layers) if stacked else tuple(layers),
    }


_packed = functools.partial(jax.jit, static_argnums=1)(
    impls.IMPLS["awq_gemm"]["jax_awq"].make_weight
)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dense(key: Array, n: int, k: int, dtype: str) -> Array:
    return 0.02 * jax.random.normal(key, (n, k), dtype)


def weight_bytes(params: dict[str, Any]) -> int:
    """Bytes of the weights that a step reads whole: all but the embedding."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves({**params, "embed": None}))


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="cache")
def step(
    params: dict[str, Any], token: Array, cache: KVCache, *, config: DecoderConfig, steps: int = 1
) -> tuple[Array, KVCache]:
    def one(_, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        logits, cache = decoder.decode_step(params, *carry, config=config)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    if steps == 1:
        return one(0, (token, cache))
    return lax.fori_loop(0, steps, one, (token, cache))


def read_bytes_per_second(size: int, *, calls: int = 8, repeats: int = 5) -> dict[str, float]:
    """Of one array of `size` bytes: summed (read once) and copied (read and written)."""
    array = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    rates = {}
    for name, run, moved in (
        ("sum", jax.jit(lambda a: jnp.sum(a, dtype=jnp.uint32)), size),
        ("copy", jax.jit(lambda a: a + jnp.uint32(1)), 2 * size),
    ):
        jax.block_until_ready(run(array))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            # Several at once: the dispatch of one would count as time of the memory.
            jax.block_until_ready([run(array) for _ in range(calls)])
            times.append((time.perf_counter() - start) / calls)
        rates[name] = moved / min(times)
    return rates


def run(
    config: DecoderConfig,
    batches: Sequence[int],
    *,
    chosen: Sequence[str] = IMPLS,
    layers: Sequence[str] = LAYERS,
    context: int = 512,
    steps: int = 64,
    steps_per_call: Sequence[int] = (1,),
    repeats: int = 5,
    group_size: int = 128,
    bandwidth: float,
) -> Iterator[dict[str, Any]]:
    """Yields a row for each implementation, form of the layers, batch and steps of a call."""
    for impl in chosen:
        for form in layers:
            packed, stacked = impl == "jax_awq", form == "stacked"
            params = random_params(config, packed=packed, stacked=stacked, group_size=group_size)
            bound = weight_bytes(params) / bandwidth * 1e6
            for batch, at_once in itertools.product(batches, steps_per_call):
                us, compile_seconds = _time(
                    params, config, batch, context, steps, at_once, repeats, stacked
                )
                row = {
                    "op": "decode",
                    "impl": impl,
                    "layers": form,
                    "batch": batch,
                    "context": context,
                    "steps_per_call": at_once,
                    "group_size": group_size if packed else 0,
                    "dtype": config.dtype,
                    "us": round(us, 2),
                    "tokens_per_second": round(batch / us * 1e6, 1),
                    "weight_bytes": weight_bytes(params),
                    "bound_us": round(bound, 2),
                    "bound_fraction": round(bound / us, 4),
                    "compile_seconds": round(compile_seconds, 1),
                }
                print(_line(row), file=sys.stderr, flush=True)
                yield row
            del params


def _time(params, config, batch, context, steps, at_once, repeats, stacked) -> tuple[float, float]:
    cache = make_cache(config, batch, context, stacked=stacked)
    leaves, tree = jax.tree.flatten((cache.k, cache.v))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    filled = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    k, v = jax.tree.unflatten(tree, filled)
    first = context - steps
    cache = cache._replace(k=k, v=v, length=jnp.int32(first))
    token = jnp.zeros(batch, jnp.int32)
    call = functools.partial(step, config=config, steps=at_once)
    start = time.perf_counter()
    token, cache = jax.block_until_ready(call(params, token, cache))
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(repeats + 1):
        cache = cache._replace(length=jnp.int32(first))
        jax.block_until_ready(cache)
        start = time.perf_counter()
        for _ in range(steps // at_once):
            token, cache = call(params, token, cache)
        jax.block_until_ready(token)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / steps * 1e6, compile_seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--small", action="store_true", help="a decoder of two small layers")
    parser.add_argument("--batches", nargs="+", type=arguments.positive, default=[1, 16])
    parser.add_argument("--impls", nargs="+", default=list(IMPLS), choices=IMPLS)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--dtypes", nargs="+", default=["float16"], choices=["float16", "bfloat16"])
    parser.add_argument(
        "--context", type=arguments.positive, default=512, help="slots of the cache"
    )
    parser.add_argument("--steps", type=int, default=64, help="steps of a repeat")
    parser.add_argument(
        "--steps-per-call",
        nargs="+",
        type=arguments.positive,
        default=[1],
        help="steps that one call of the program makes, divisors of --steps",
    )
    parser.add_argument("--repeats", type=arguments.positive, default=5)
    parser.add_argument("--group-size", type=arguments.group_size, default=128)
    parser.add_argument(
        "--bandwidth-mb", type=arguments.megabytes, default=4000, help="array for the bandwidth"
    )


def main(args: argparse.Namespace) -> int:
    """`python -m jax_awq.bench decode`."""
    if not 0 < args.steps <= args.context:
        raise SystemExit(f"--steps must be from 1 to --context {args.context}, got {args.steps}")
    for at_once in args.steps_per_call:
        if args.steps % at_once:
            raise SystemExit(f"--steps-per-call must divide --steps {args.steps}, got {at_once}")
    if args.bandwidth_mb < 1:
        raise SystemExit(f"--bandwidth-mb must be 1 or more, got {args.bandwidth_mb:g}")
    shape = SMALL if args.small else LLAMA_3_8B
    rates = read_bytes_per_second(int(args.bandwidth_mb * 1e6))
    top = report.environment() | {
        "model": dataclasses.asdict(shape),
        "ceilings": {"read_bytes_per_second": max(rates.values()), "measured": rates},
        "method": METHOD,
    }
    rows = []
    for dtype in args.dtypes:
        for row in run(
            dataclasses.replace(shape, dtype=dtype),
            args.batches,
            chosen=args.impls,
            layers=args.layers,
            context=args.context,
            steps=args.steps,
            steps_per_call=args.steps_per_call,
            repeats=args.repeats,
            group_size=args.group_size,
            bandwidth=max(rates.values()),
        ):
            rows.append(row)
            if args.json is not None:  # after every row: a run that is cut off keeps what it has
                report.write(args.json, top, rows)
    print(markdown(rows), end="")
    return 0


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row."""
    head = ["impl", "layers", "dtype", "batch", "steps/call", "us/step", "tokens/s", "weights GB"]
    head.append("of the bound")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "---:|" * 6]
    for row in rows:
        lines.append(
            f"| {row['impl']} | {row['layers']} | {row['dtype']} | {row['batch']} "
            f"| {row.get('steps_per_call', 1)} | {row['us']:.0f} | {row['tokens_per_second']:.0f} "
            f"| {row['weight_bytes'] / 1e9:.2f} | {row['bound_fraction']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    return (
        f"decode {row['impl']} {row['layers']} {row['dtype']} batch {row['batch']}, "
        f"{row['steps_per_call']} a call: "
        f"{row['us']:.1f} us, {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['bound_fraction']:.2f} of the bound, compiled in {row['compile_seconds']} s"
    )
