"""How one op is timed: inside a jitted loop over distinct weights."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

MIN_CALLS = 16  # of the op in one iteration of the loop
# Four times the 60 MB of an H200's L2 cache, and nothing that one call read is left for the next.
MIN_WEIGHT_BYTES = 240e6
MIN_COPIES = 3

METHOD = (
    "Microseconds per call inside one jitted lax.fori_loop: an iteration calls the op at least "
    f"{MIN_CALLS} times, in turn over at least {MIN_COPIES} distinct random weights that exceed "
    f"{MIN_WEIGHT_BYTES / 1e6:.0f} MB together, so that none is in the L2 cache, with XLA's "
    "command buffers as they are by default. Optimization barriers make every call wait for the "
    "one before and keep work on weights inside the loop; one element of every result is used. "
    "Several programs are dispatched, then awaited; us is the median of the repeats after a "
    "warm-up, divided by the calls."
)


def copies_for(weight_bytes: float, min_bytes: float) -> int:
    """How many weights exceed `min_bytes` together."""
    return max(MIN_COPIES, math.ceil(min_bytes / weight_bytes))


def calls_for(copies: int) -> int:
    """Calls in an iteration: every weight as often as the others."""
    return copies * math.ceil(MIN_CALLS / copies)


def chained_loop(op: Callable[..., Any], iterations: int) -> Callable[..., Array]:
    """A function of (xs, weights) that calls `op(x, *weight)` for all pairs, `iterations` times.

    Args:
      op: from x and the arrays of one weight to y, whose first array is a matrix.
      iterations: fixed, since a loop whose length is not known waits for the host every time.

    Returns:
      Function to be jitted; its result is a scalar that depends on every call.
    """

    def program(xs: Sequence[Array], weights: Sequence[Any]) -> Array:
        def body(_: Any, carry: Array) -> Array:
            seen = []
            # The weights take turns. No pair comes back, so that XLA cannot merge two calls even
            # where it drops the barriers first.
            for x, weight in itertools.product(xs, weights):
                # Behind the barrier, x and the weight depend on the call before: XLA can neither
                # reorder the calls nor move one, or an unpacked weight, out of the loop.
                x_now, weight_now, carry = lax.optimization_barrier((x, weight, carry))
                y, carry = lax.optimization_barrier((op(x_now, *weight_now), carry))
                seen.append(jax.tree.leaves(y)[0][0, 0].astype(jnp.float32))
            # One small kernel for all calls of the iteration.
            return carry + sum(seen)

        return lax.fori_loop(0, iterations, body, jnp.float32(0))

    return program


def time_program(program: Callable[[], Array], *, repeats: int, min_seconds: float) -> float:
    """Median seconds of one run of a compiled program."""

    def run(times: int) -> float:
        start = time.perf_counter()
        results = [program() for _ in range(times)]
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / times

    run(1)
    # So many at once that the host's dispatch is hidden behind the device's work.
    times = max(1, math.ceil(min_seconds / run(1)))
    return statistics.median(run(times) for _ in range(repeats))
