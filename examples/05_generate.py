"""A whole model from a checkpoint: logits, and text, greedy and drawn.

python examples/05_generate.py
"""

import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import jax_awq.models

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "llama-awq-gemm-g128"
PROMPT = "def __init__(self"
TOLERANCE = 1e-3  # float32, of tests/golden/README.md


def main() -> int:
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    # What the transformers library computed with the same checkpoint.
    expected = np.load(GOLDEN / "expected_model.npz")

    model = jax_awq.models.load(GOLDEN, dtype="float32")
    print(f"{model.config.model_type}, {model.config.num_layers} layers")
    logits = np.asarray(model.logits(expected["input_ids"]))[:, 5::6]
    error = np.abs(logits - expected["logits_fp32"]).max()
    print(f"max error of the logits {error:.1e}, tolerance {TOLERANCE:.1e}")
    greedy = expected["greedy_ids"]
    same = bool((model.generate(greedy[:, :16], 24) == greedy).all())
    print(f"the tokens of transformers: {same}")

    ids = np.array([tokenizer.encode(PROMPT).ids])
    print("float32, greedy:", text(tokenizer, model.generate(ids, 24)))
    model = jax_awq.models.load(GOLDEN, dtype="float16")
    print("float16, greedy:", text(tokenizer, model.generate(ids, 24)))
    for seed in (1, 2):
        drawn = model.generate(ids, 24, temperature=0.8, top_p=0.9, seed=seed)
        print("float16, drawn:", text(tokenizer, drawn))
    return 0 if same and error < TOLERANCE else 1


def text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return repr(tokenizer.decode(ids[0].tolist()))


if __name__ == "__main__":
    sys.exit(main())
