"""`python -m jax_awq generate`: text from a checkpoint, as it comes."""

import enum
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jax_awq.models import Model, load


class Dtype(enum.StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Layers(enum.StrEnum):
    unrolled = "unrolled"
    stacked = "stacked"


def generate(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder with tokenizer.json.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Probability drawn from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="By default config.json's.")] = None,
    layers: Annotated[Layers, typer.Option(help="How the layers are compiled.")] = Layers.unrolled,
) -> None:
    """Continue a text; it goes to stdout, what it took to stderr."""
    console = Console(stderr=True)
    try:
        _check_text(prompt)
        tokenizer = _tokenizer(folder)
        ids = tokenizer.encode(prompt).ids
        if not ids:
            raise ValueError("generate: --prompt must have at least one token, got none")
        start = time.perf_counter()
        with console.status(f"Loading {folder}"):
            model = load(folder, dtype=dtype and dtype.value, layers=layers.value)
        console.print(f"loaded in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        tokens = model.stream(
            [ids], max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        typer.echo(prompt, nl=False)
        times = [start]
        for piece in _pieces(tokenizer, model, tokens, times):
            typer.echo(piece, nl=False)
    except (OSError, ValueError, ImportError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    typer.echo()
    console.print(_told(len(ids), times), soft_wrap=True)


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python keeps bytes that it cannot decode as surrogates
        raise ValueError(f"generate: --prompt must be UTF-8 text, got {prompt!r}") from error


def _tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("generate needs tokenizers: pip install 'jax_awq[models]'") from error
    if not folder.is_dir():
        raise FileNotFoundError(f"generate: there is no folder {folder}")
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"generate: {folder} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no class of its own
        raise ValueError(f"generate: {file} must be a tokenizer, got: {error}") from error


def _pieces(
    tokenizer: Any, model: Model, tokens: Iterator[Any], times: list[float]
) -> Iterator[str]:
    """Text of the tokens, as soon as it is whole characters, up to the end of the text."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        times.append(time.perf_counter())
        piece = stream.step(tokenizer, int(token[0]))
        if piece and int(token[0]) not in model.config.eos_token_ids:
            yield piece


def _told(prompt_tokens: int, times: list[float]) -> str:
    first = f"{prompt_tokens} tokens of prompt, the first new one after {times[1] - times[0]:.2f} s"
    count, seconds = len(times) - 2, times[-1] - times[1]
    if count < 1 or seconds <= 0:
        return f"{first} (with compilation)"
    return f"{first} (with compilation), then {count / seconds:.1f} tokens/s"
