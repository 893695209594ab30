"""Named weights of real models, as (K, N), for tests and benchmarks."""

from typing import NamedTuple


class Problem(NamedTuple):
    """A linear of a model: x (M, K) times a (K, N) weight."""

    k: int
    n: int


# Names are model/linear. qkv and gate_up are linears that a loader may fuse along N.
PROBLEMS: dict[str, Problem] = {
    "llama-3-8b/qkv_proj": Problem(4096, 6144),
    "llama-3-8b/o_proj": Problem(4096, 4096),
    "llama-3-8b/k_proj": Problem(4096, 1024),
    "llama-3-8b/gate_proj": Problem(4096, 14336),
    "llama-3-8b/gate_up_proj": Problem(4096, 28672),
    "llama-3-8b/down_proj": Problem(14336, 4096),
    "llama-3-70b/qkv_proj": Problem(8192, 10240),
    "llama-3-70b/o_proj": Problem(8192, 8192),
    "llama-3-70b/k_proj": Problem(8192, 1024),
    "llama-3-70b/gate_proj": Problem(8192, 28672),
    "llama-3-70b/down_proj": Problem(28672, 8192),
    "llama-2-7b/gate_proj": Problem(4096, 11008),
    "llama-2-7b/down_proj": Problem(11008, 4096),
    "llama-2-13b/o_proj": Problem(5120, 5120),
    "llama-2-13b/gate_proj": Problem(5120, 13824),
    "qwen2.5-7b/k_proj": Problem(3584, 512),
    "qwen2.5-7b/gate_proj": Problem(3584, 18944),
    "qwen2.5-7b/down_proj": Problem(18944, 3584),
    "qwen3-30b-a3b/qkv_proj": Problem(2048, 5120),
    "qwen3-30b-a3b/expert_gate_proj": Problem(2048, 768),
    "qwen3-30b-a3b/expert_down_proj": Problem(768, 2048),
}

# What the benchmark takes when it is told nothing: small, deep, wide and large weights.
BENCH_PROBLEMS = (
    "llama-3-8b/o_proj",
    "llama-3-8b/down_proj",
    "llama-3-8b/gate_up_proj",
    "llama-3-70b/gate_proj",
    "qwen3-30b-a3b/qkv_proj",
)
BENCH_ROWS = tuple(2**i for i in range(14))  # M = 1, 2, 4, ... 8192
W4A8_ROWS = (1, 16, 64, 256, 1024, 2048, 4096)

# What benchmarks/sweep.py times, and the plan of awq_gemm is held against.
SWEEP_PROBLEMS = (
    "llama-3-8b/o_proj",
    "llama-3-8b/qkv_proj",
    "llama-3-8b/down_proj",
    "llama-3-8b/gate_up_proj",
    "llama-3-70b/qkv_proj",
    "llama-3-70b/gate_proj",
    "llama-3-70b/down_proj",
    "llama-2-13b/o_proj",
    "qwen3-30b-a3b/qkv_proj",
    "llama-2-7b/down_proj",
    "llama-2-7b/gate_proj",
    "llama-2-13b/gate_proj",
    "qwen2.5-7b/gate_proj",
)
