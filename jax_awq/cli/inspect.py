"""`python -m jax_awq inspect`: what a checkpoint has, from the headers of its files alone."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jax_awq._packing import group_shapes, weight_size
from jax_awq.checkpoint.config import QuantConfig, read_config
from jax_awq.checkpoint.files import Tensor, find_tensors
from jax_awq.checkpoint.formats import Readable, format_of, is_linear
from jax_awq.models.config import DecoderConfig, read_decoder_config
from jax_awq.models.params import assemble
from jax_awq.weights import AWQWeight

# Of safetensors' names, those that end in a number have it as width in bits.
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A linear, or a tensor that is none.

    Attributes:
      kind: format of a linear, or dtype of a tensor.
      shape: (K, N) of a linear.
      group_size: of a linear, else None.
      size: bytes in the files.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    group_size: int | None
    size: int


@dataclasses.dataclass
class Survey:
    """What was found. Without problems `load_hf` takes the folder, and `models.load` if `model`."""

    entries: list[Entry] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    model: DecoderConfig | None = None


def inspect(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    every: Annotated[
        bool, typer.Option("--all", help="A line for each, not one for those that are alike.")
    ] = False,
) -> None:
    """List what a checkpoint has and what stands against loading it, if anything: then exit 1."""
    found = survey(folder)
    entries = [(e, 1) for e in found.entries] if every else _alike(found.entries)
    console = Console()
    table = Table(box=None)
    for name in ("tensor", "count", "kind", "shape", "group", "bytes"):
        side = "left" if name in ("tensor", "kind") else "right"
        table.add_column(name, justify=side, overflow="fold", no_wrap=name != "tensor")  # type: ignore[arg-type]
    for entry, count in entries:
        group = "" if entry.group_size is None else str(entry.group_size)
        shape = " x ".join(map(str, entry.shape))
        row = (entry.name, str(count), entry.kind, shape, group, f"{entry.size:,}")
        table.add_row(*map(escape, row))
    console.print(table)
    console.print("\n".join(_summary(found)), markup=False, highlight=False, soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)


def survey(folder: Path) -> Survey:
    """Reads headers and configuration of a folder; what is wrong is told, not raised."""
    found = Survey()
    try:
        tensors, config = find_tensors(folder), read_config(folder)
    except (OSError, ValueError, ImportError) as error:
        found.problems.append(str(error))
        return found
    modules: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules[module][part] = tensor
    abstract: dict[str, Any] = {}
    for module, parts in modules.items():
        if is_linear(parts):
            try:
                abstract[module] = _add_linear(found, module, parts, config)
                parts = {p: t for p, t in parts.items() if p == "bias"}
            except ValueError as error:
                found.problems.append(str(error))
        for tensor in parts.values():
            found.entries.append(
                Entry(tensor.name, tensor.dtype, tensor.shape, None, _size(tensor))
            )
            dtype = jnp.float32 if tensor.dtype in _FLOATS else jnp.int32
            abstract[tensor.name] = jax.ShapeDtypeStruct(tensor.shape, dtype)
    found.entries.sort(key=lambda entry: _natural(entry.name))
    try:
        model = read_decoder_config(folder)
        if not found.problems:
            _assemble(abstract, model)
            found.model = model
    except (OSError, ValueError) as error:
        found.problems.append(str(error))
    return found


def _add_linear(
    found: Survey, module: str, parts: dict[str, Tensor], config: QuantConfig
) -> AWQWeight:
    layout = format_of(parts, config)
    k, n, group_size = _geometry(layout, module, parts, config)
    size = sum(_size(tensor) for part, tensor in parts.items() if part != "bias")
    found.entries.append(Entry(module, layout.title, (k, n), group_size, size))
    scales, qzeros = group_shapes(k, n, group_size, "gemm")
    return AWQWeight(
        jax.ShapeDtypeStruct((k, n // 8), jnp.int32),
        jax.ShapeDtypeStruct(scales, jnp.float16),
        jax.ShapeDtypeStruct(qzeros, jnp.int32),
        group_size=group_size,
    )


def _geometry(
    layout: Readable, module: str, parts: dict[str, Tensor], config: QuantConfig
) -> tuple[int, int, int]:
    _, group_size = layout.geometry(module, parts, config)
    return *weight_size(parts["qweight"].shape, layout.layout), group_size  # type: ignore[attr-defined]


def _assemble(abstract: dict[str, Any], model: DecoderConfig) -> None:
    """What `models.load` does, without values; what it asks of these is left out."""
    tied = ("lm_head.weight",) if model.tie_embeddings else ()
    named = {
        name: value
        for name, value in abstract.items()
        if name not in tied and not name.endswith(".rotary_emb.inv_freq")
    }
    jax.eval_shape(lambda tensors: assemble(dict(tensors), model), named)


def _size(tensor: Tensor) -> int:
    bits = int(re.sub(r"\D+|_.*", "", tensor.dtype) or 8)
    return math.prod(tensor.shape) * bits // 8


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Sorts numbers as numbers."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]


def _alike(entries: Iterable[Entry]) -> list[tuple[Entry, int]]:
    """One entry, with the sum of bytes, for those that differ in numbers of their names only."""
    found: dict[Any, list[Entry]] = collections.defaultdict(list)
    for entry in entries:
        name = re.sub(r"\.\d+(?=\.)", ".*", entry.name)
        found[name, entry.kind, entry.shape, entry.group_size].append(entry)
    return [
        (
            dataclasses.replace(
                same[0],
                name=name if len(same) > 1 else same[0].name,
                size=sum(e.size for e in same),
            ),
            len(same),
        )
        for (name, *_), same in found.items()
    ]


def _summary(found: Survey) -> Iterable[str]:
    linears = [entry for entry in found.entries if entry.group_size is not None]
    others = [entry for entry in found.entries if entry.group_size is None]
    for what, some in (("quantized linears", linears), ("other tensors", others)):
        yield f"{len(some)} {what}, {sum(entry.size for entry in some) / 1e6:.1f} MB"
    if found.model is not None:
        m = found.model
        experts = (
            f", {m.experts.num_experts} experts, {m.experts.top_k} chosen" if m.experts else ""
        )
        yield (
            f"model: {m.model_type}, {m.num_layers} layers, hidden {m.hidden_size}, "
            f"{m.num_heads} heads, {m.num_kv_heads} of k and v, vocabulary {m.vocab_size}, "
            f"{m.max_positions} positions, {m.dtype}{experts}"
        )
    for problem in found.problems:
        yield f"problem: {problem}"
    if not found.problems:
        yield "no problems: jax_awq.models.load takes it"
