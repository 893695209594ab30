"""`python -m jax_awq inspect`: what a checkpoint has, from the headers of its files alone."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jax_awq._packing import group_shapes
from jax_awq.checkpoint.config import find_config, read_config
from jax_awq.checkpoint.files import Tensor, check_readable, find_tensors
from jax_awq.checkpoint.formats import Geometry
from jax_awq.checkpoint.load import (
    Linear,
    check_quantized,
    check_whole,
    linear_parts,
    other_tensors,
    read_linear,
)
from jax_awq.models.config import DecoderConfig, read_decoder_config
from jax_awq.models.params import assemble
from jax_awq.weights import AWQWeight

_WIDE = 1000  # columns of a file or pipe, in which no name is folded


@dataclasses.dataclass(frozen=True)
class Entry:
    """A linear, or a tensor that is none.

    Attributes:
      kind: format of a linear, or dtype of a tensor.
      shape: (K, N) of a linear, (E, K, N) of experts in one tensor.
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
    """What was found. Without problems `models.load` takes the folder, and `load_hf` if it has a
    quantized linear.
    """

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
    plain: Any = {"markup": False, "highlight": False, "soft_wrap": True}
    try:
        if found.entries:
            _print_entries(found, every)
        Console().print("\n".join(_summary(found)), **plain)
    except OSError as error:  # of stdout, such as a full disk
        Console(stderr=True).print(f"error: {error}", style="red", **plain)
        raise typer.Exit(1) from error
    if found.problems:
        raise typer.Exit(1)


def _print_entries(found: Survey, every: bool) -> None:
    entries = [(e, 1) for e in found.entries] if every else _alike(found.entries)
    table = Table(box=None)
    for name in ("tensor", "count", "kind", "shape", "group", "bytes"):
        side = "left" if name in ("tensor", "kind") else "right"
        table.add_column(name, justify=side, overflow="fold", no_wrap=name != "tensor")  # type: ignore[arg-type]
    for entry, count in entries:
        group = "" if entry.group_size is None else str(entry.group_size)
        shape = " x ".join(map(str, entry.shape))
        row = (entry.name, str(count), entry.kind, shape, group, f"{entry.size:,}")
        table.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console.width = _WIDE
    console.print(table)
    linears = [entry for entry in found.entries if entry.group_size is not None]
    others = [entry for entry in found.entries if entry.group_size is None]
    for what, some in (("quantized linears", linears), ("other tensors", others)):
        size = sum(entry.size for entry in some) / 1e6
        console.print(f"{len(some)} {what}, {size:.1f} MB", highlight=False)


def survey(folder: Path) -> Survey:
    """Reads headers and configuration of a folder; what is wrong is told, not raised."""
    found = Survey()
    try:
        tensors = find_tensors(folder)
        modules = linear_parts(tensors)
        config = read_config(folder) if modules else find_config(folder)
    except (OSError, ValueError, ImportError) as error:
        found.problems.append(str(error))
        return found
    linears: dict[str, Linear] = {}
    for module, parts in modules.items():
        assert config is not None
        try:
            linears[module] = read_linear(module, parts, config)
        except ValueError as error:
            found.problems.append(str(error))
    plain = other_tensors(tensors, linears)
    found.entries += [_linear_entry(module, linear) for module, linear in linears.items()]
    found.entries += [
        Entry(name, tensor.dtype, tensor.shape, None, _size(tensor))
        for name, tensor in plain.items()
    ]
    found.entries.sort(key=lambda entry: _natural(entry.name))
    try:
        model = read_decoder_config(folder)
        if not found.problems:
            if config is not None:
                check_quantized(folder, tensors, linears)
            check_whole(folder, tensors, linears)
            for tensor in plain.values():
                check_readable(tensor)
            _assemble(folder, linears, plain, model)
            found.model = model
    except (OSError, ValueError) as error:
        found.problems.append(str(error))
    return found


def _linear_entry(module: str, linear: Linear) -> Entry:
    geometry = linear.geometry
    shape = (*geometry.batch, geometry.k, geometry.n)
    size = sum(map(_size, linear.parts.values()))
    return Entry(module, linear.format.title, shape, geometry.group_size, size)


def _assemble(
    folder: Path,
    linears: Mapping[str, Linear],
    plain: Mapping[str, Tensor],
    model: DecoderConfig,
) -> None:
    """What `models.load` does, without values; where it compares these, shape and dtype count."""
    named: dict[str, Any] = {name: _abstract_array(tensor) for name, tensor in plain.items()}
    for name, shape in _compared(plain, model).items():
        array = named.pop(name)
        if (array.shape, array.dtype) != (shape, jnp.float32):
            raise ValueError(
                f"load: {plain[name]} must have a floating dtype and shape {shape}, got "
                f"{plain[name].dtype} {array.shape}"
            )
    named |= {module: _abstract_weight(linear.geometry) for module, linear in linears.items()}
    jax.eval_shape(lambda tensors: assemble(dict(tensors), model, place=folder), named)


def _compared(plain: Iterable[str], model: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that say again what is known, with their shapes."""
    frequencies = model.rope.frequencies(model.head_dim).shape
    found = {name: frequencies for name in plain if name.endswith(".rotary_emb.inv_freq")}
    if model.tie_embeddings and "lm_head.weight" in plain:
        found["lm_head.weight"] = (model.vocab_size, model.hidden_size)
    return found


def _abstract_array(tensor: Tensor) -> jax.ShapeDtypeStruct:
    dtype = jnp.float32 if tensor.dtype.startswith(("F", "BF")) else jnp.int32
    return jax.ShapeDtypeStruct(tensor.shape, dtype)


def _abstract_weight(geometry: Geometry) -> AWQWeight:
    """In layout "gemm", whatever the format: the shape of the weight is what counts."""
    batch, k, n = geometry.batch, geometry.k, geometry.n
    scales, qzeros = group_shapes(k, n, geometry.group_size, "gemm")
    return AWQWeight(
        jax.ShapeDtypeStruct((*batch, k, n // 8), jnp.int32),
        jax.ShapeDtypeStruct((*batch, *scales), jnp.float16),
        jax.ShapeDtypeStruct((*batch, *qzeros), jnp.int32),
        group_size=geometry.group_size,
    )


def _size(tensor: Tensor) -> int:
    # Of safetensors' names, those that end in a number have it as width in bits.
    bits = int(re.sub(r"\D+|_.*", "", tensor.dtype) or 8)
    return math.prod(tensor.shape) * bits // 8


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Sorts numbers as numbers."""
    # Python takes neither other digits, as of an exponent, nor thousands of them for a number.
    parts = ((part, part.isdecimal() and len(part) < 20) for part in name.split("."))
    return [(number, int(part) if number else part) for part, number in parts]


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
