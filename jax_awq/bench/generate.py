"""From a checkpoint on disk to tokens: a synthetic Llama is written, loaded and made to generate.

Unlike `decode`, which times one program, this goes the way of a user: `save_hf`, `models.load` and
`Model.stream`. It also counts memory, to show that no weight is there a second time as floats.
"""

import argparse
import dataclasses
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_awq
from jax_awq import models
from jax_awq.bench import arguments, decode, report, synthetic
from jax_awq.models.attention import make_cache
from jax_awq.models.config import DecoderConfig
from jax_awq.models.model import cache_slots, decode_program
from jax_awq.weights import WEIGHTS

METHOD = (
    "A checkpoint of random 4-bit weights is written by save_hf and loaded by models.load while "
    "its files are still in the page cache. Model.stream then makes `new` tokens, greedily, after "
    "`prompt` random ones: prefill is until the first token, the rest are the steps, each seen by "
    "the host; medians of the repeats after a warm-up. Bytes are those of memory_stats() of the "
    "device, null where it has none; peaks are those since the process began. Of memory that is "
    "preallocated, XLA's default, an array has what it asked for; where memory grows instead, up "
    "to twice as much, which counts as in use. beyond_weights is "
    "what is in use, less what was before loading and less the weights. beyond_arrays are float "
    "arrays that came to life, are no weights and are as large as the smallest packed weight. "
    "no_float_copy: there are none of these, and beyond_weights is less than a copy of the "
    "smallest packed weight in `dtype`, after loading and after generating. decode_temp_bytes is "
    "what the decode program has besides operands and results; one that dequantizes every weight "
    "needs at least largest_copy_bytes."
)


class Memory:
    """What a model occupies besides its weights; made before it is loaded."""

    def __init__(self) -> None:
        gc.collect()
        self.device = jax.devices()[0]
        self.before = {id(array) for array in jax.live_arrays()}
        self.bytes_before = self.stats()["bytes_in_use"]

    def stats(self) -> dict[str, Any]:
        return self.device.memory_stats() or {"bytes_in_use": None, "peak_bytes_in_use": None}

    def sizes(self, model: models.Model) -> dict[str, int]:
        """Bytes of the weights as they are, and as copies in the dtype of the model."""
        leaves = jax.tree.leaves(model.params, is_leaf=_is_packed)
        packed = [leaf for leaf in leaves if _is_packed(leaf)]
        width = jnp.dtype(model.config.dtype).itemsize
        copies = [math.prod(weight.shape) * width for weight in packed]
        packed_bytes = _bytes(packed)
        return {
            "packed_bytes": packed_bytes,
            "other_weight_bytes": _bytes(model.params) - packed_bytes,
            "copy_bytes": sum(copies),
            "smallest_copy_bytes": min(copies),
            "largest_copy_bytes": max(copies),
        }

    def now(self, model: models.Model) -> dict[str, Any]:
        """What is there at this moment beyond the weights, and whether a copy may be among it."""
        gc.collect()
        smallest = self.sizes(model)["smallest_copy_bytes"]
        known = self.before | {id(leaf) for leaf in jax.tree.leaves(model.params)}
        arrays = [
            f"{array.dtype}{list(array.shape)}"
            for array in jax.live_arrays()
            if id(array) not in known
            and jnp.issubdtype(array.dtype, jnp.floating)
            and array.size * jnp.dtype(model.config.dtype).itemsize >= smallest
        ]
        stats = self.stats()
        in_use, beyond = stats["bytes_in_use"], None
        if in_use is not None:
            beyond = in_use - self.bytes_before - _bytes(model.params)
        return {
            "in_use_bytes": in_use,
            "peak_bytes": stats["peak_bytes_in_use"],
            "beyond_weights": beyond,
            "beyond_arrays": arrays,
            "no_float_copy": not arrays and (beyond is None or beyond < smallest),
        }


def run(
    model: models.Model,
    memory: Memory,
    batches: Sequence[int],
    *,
    prompt: int,
    new: int,
    repeats: int,
    group_size: int,
) -> Iterator[dict[str, Any]]:
    """Yields a row for each batch."""
    for batch in batches:
        rng = np.random.default_rng(batch)
        ids = rng.integers(0, model.config.vocab_size, (batch, prompt))
        first_call, _, in_use = _time(model, memory, ids, new)
        timed = [_time(model, memory, ids, new) for _ in range(repeats)]
        prefill, steps = (statistics.median(t[part] for t in timed) for part in (0, 1))
        row = {
            "op": "generate",
            "batch": batch,
            "prompt": prompt,
            "new": new,
            "group_size": group_size,
            "dtype": model.config.dtype,
            "first_call_seconds": round(first_call, 2),
            "prefill_us": round(prefill * 1e6, 1),
            "prefill_tokens_per_second": round(batch * prompt / prefill, 1),
            "us": round(steps / (new - 1) * 1e6, 2),
            "tokens_per_second": round(batch * (new - 1) / steps, 1),
            "in_use_bytes": in_use,
            "peak_bytes": memory.stats()["peak_bytes_in_use"],
            **_decode_program(model, batch, prompt, new),
        }
        print(
            f"generate {row['dtype']} batch {batch}: prefill {prefill * 1e3:.1f} ms, "
            f"{row['tokens_per_second']:.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )
        yield row


def _time(model: models.Model, memory: Memory, ids: Any, new: int) -> tuple[float, float, Any]:
    """Seconds until the first token and for the others, and bytes in use before the last."""
    start = time.perf_counter()
    stream = model.stream(ids, new, eos_token_id=())
    next(stream)
    first = time.perf_counter()
    in_use = None
    for count, _ in enumerate(stream, 2):
        if count == new - 1:
            in_use = memory.stats()["bytes_in_use"]
    return first - start, time.perf_counter() - first, in_use


def _decode_program(model: models.Model, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Bytes of the cache and of what a decode step makes on its way, as compiled."""
    slots = cache_slots(prompt, new)
    cache = jax.eval_shape(lambda: make_cache(model.config, batch, slots, stacked=False))
    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    leaves = jax.tree.leaves(model.params)
    program = decode_program(model).lower(leaves, token, cache, None, np.int32(1)).compile()
    memory = program.memory_analysis()
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves((cache.k, cache.v)))
    return {
        "cache_bytes": size,
        "decode_temp_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def _is_packed(node: Any) -> bool:
    return isinstance(node, WEIGHTS)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# What the table reads of a row.
SHOWN = ("dtype", "batch", "prompt", "prefill_us", "us", "tokens_per_second", "peak_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--small", action="store_true", help="a decoder of two small layers")
    parser.add_argument(
        "--num-layers", type=arguments.positive, help="by default those of the decoder"
    )
    parser.add_argument("--batches", nargs="+", type=arguments.positive, default=[1, 16])
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument(
        "--prompt", type=arguments.positive, default=384, help="tokens of the prompt"
    )
    parser.add_argument("--new", type=int, default=128, help="tokens that are generated")
    parser.add_argument("--repeats", type=arguments.positive, default=3)
    parser.add_argument("--group-size", type=arguments.positive, default=128)
    parser.add_argument("--folder", type=Path, help="where a temporary folder is made for it")


def main(args: argparse.Namespace) -> int:
    """`python -m jax_awq.bench generate`."""
    config = decode.SMALL if args.small else decode.LLAMA_3_8B
    layers = config.num_layers if args.num_layers is None else args.num_layers
    config = dataclasses.replace(config, num_layers=layers, dtype=args.dtype)
    if not 3 <= args.new <= config.max_positions - args.prompt:
        raise SystemExit(
            f"--new must be from 3 to {config.max_positions} less --prompt {args.prompt}, "
            f"got {args.new}"
        )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        times = {"write_seconds": _written(Path(folder, "model"), config, args.group_size)}
        memory = Memory()
        start = time.perf_counter()
        model = models.load(Path(folder, "model"))
        jax.block_until_ready(model.params)
        times["load_seconds"] = time.perf_counter() - start
        size = sum(file.stat().st_size for file in Path(folder, "model").glob("*.safetensors"))
    top = report.environment() | {
        "model": dataclasses.asdict(model.config),
        "method": METHOD,
        "checkpoint": {"bytes": size, **{name: round(s, 6) for name, s in times.items()}},
        "weights": memory.sizes(model),
        "loaded": memory.now(model),
    }
    print(_told(top, "loaded"), file=sys.stderr, flush=True)
    rows = []
    for row in run(
        model,
        memory,
        args.batches,
        prompt=args.prompt,
        new=args.new,
        repeats=args.repeats,
        group_size=args.group_size,
    ):
        rows.append(row)
        top["generated"] = memory.now(model)
        if args.json is not None:  # after every row: a run that is cut off keeps what it has
            report.write(args.json, top, rows)
    print(_told(top, "generated"), file=sys.stderr)
    print(markdown(rows), end="")
    return 0


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row."""
    head = ["dtype", "batch", "prompt", "prefill ms", "us/step", "tokens/s", "peak GB"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * 6 + "|"]
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"| {row['dtype']} | {row['batch']} | {row['prompt']} | {row['prefill_us'] / 1e3:.1f} "
            f"| {row['us']:.0f} | {row['tokens_per_second']:.0f} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def _written(folder: Path, config: DecoderConfig, group_size: int) -> float:
    """Seconds in which the checkpoint is made and written; its host memory is free again."""
    start = time.perf_counter()
    params = synthetic.checkpoint(config, group_size=group_size)
    jax_awq.save_hf(folder, params, synthetic.config_json(config))
    return time.perf_counter() - start


def _told(top: dict[str, Any], moment: str) -> str:
    checkpoint, weights, now = top["checkpoint"], top["weights"], top[moment]
    beyond = now["beyond_weights"]
    return (
        f"{moment}: {checkpoint['bytes'] / 1e9:.2f} GB in {checkpoint['load_seconds']:.2f} s, "
        f"weights {(weights['packed_bytes'] + weights['other_weight_bytes']) / 1e9:.2f} GB, beyond "
        f"them {'unknown' if beyond is None else f'{beyond / 1e6:.1f} MB'}, "
        f"no float copy: {now['no_float_copy']}"
    )
