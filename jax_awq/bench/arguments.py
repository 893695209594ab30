"""What arguments of the command line may be; argparse names the argument and ends with code 2."""

import argparse
import math
from collections.abc import Sequence

from jax_awq.problems import PROBLEMS, Problem


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more, got {text!r}")
    return int(text)


def group_size(text: str) -> int:
    """-1, a single group, or a number of inputs."""
    try:
        return -1 if text == "-1" else positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be -1 or an integer of 1 or more, got {text!r}"
        ) from None


def megabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, got {text!r}")
    return size


def width(text: str) -> Problem:
    return Problem(positive(text), 0)


def problem(text: str) -> Problem:
    if text in PROBLEMS:
        return PROBLEMS[text]
    try:
        k, n = (int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither KxN nor one of {', '.join(PROBLEMS)}"
        ) from None
    if k < 1 or n < 1 or n % 8:
        raise argparse.ArgumentTypeError(
            f"K must be positive and N a positive multiple of 8, got {text!r}"
        )
    return Problem(k, n)


def check_group_size(parser: argparse.ArgumentParser, size: int, widths: Sequence[int]) -> None:
    """Ends with the parser's error unless the group size divides every K."""
    for k in widths:
        if size > 0 and k % size:
            parser.error(f"argument --group-size: must divide K={k}, got {size}")
