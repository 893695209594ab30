"""Layers of a problem, for the tests of Flax and Equinox."""

import numpy as np

from jax_awq.testing import random_problem


def problem_of(rng, m, dtype=np.float16, layout="gemm", bias=True, activation=None, batch=()):
    return random_problem(
        rng,
        m,
        128,
        48,
        group_size=64,
        dtype=dtype,
        scales_dtype=np.float16,
        layout=layout,
        bias=bias,
        activation=activation,
        batch=batch,
    )


def linear_of(problem, library):
    return library.AWQLinear(problem.weight, problem.bias, activation=problem.activation)


def dense_of(problem, library):
    module = library.AWQDense(48, use_bias=problem.bias is not None, activation=problem.activation)
    params = {} if problem.bias is None else {"params": {"bias": problem.bias}}
    return module, {**params, "awq": {"kernel": problem.weight}}
