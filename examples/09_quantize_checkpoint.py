"""A float checkpoint, quantized with AWQ on tokens, saved for other engines, and loaded again.

python examples/09_quantize_checkpoint.py
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import jax_awq
import jax_awq.models

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "llama-awq-gemm-g128"
CALIBRATION = 4  # rows of text; the perplexity is that of the others
GROUP_SIZE = 64


def write_float(folder: Path) -> None:
    """A float checkpoint. Of one's own there is one already; here packed weights are unpacked."""
    tensors = {}
    for name, value in jax_awq.load_hf(GOLDEN).items():
        if isinstance(value, jax_awq.AWQWeight):
            tensors[f"{name}.weight"] = np.ascontiguousarray(value.dequantize(jnp.float16).T)
        else:
            tensors[name] = np.asarray(value)
    config = json.loads((GOLDEN / "config.json").read_text())
    del config["quantization_config"]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "tokenizer.json", folder)


def perplexity(model: jax_awq.models.Model, ids: np.ndarray) -> float:
    chances = jax.nn.log_softmax(model.logits(ids)[:, :-1])
    return float(jnp.exp(-jnp.take_along_axis(chances, ids[:, 1:, None], axis=-1).mean()))


def main() -> int:
    ids = np.load(GOLDEN / "expected_model.npz")["valid_ids"]
    calibration, held_out = ids[:CALIBRATION], ids[CALIBRATION:]
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary, "float"), Path(temporary, "awq")
        write_float(source)

        model = jax_awq.models.load(source)  # its dtype is that of the tensors that stay float
        awq = jax_awq.quantize(
            model, calibration, group_size=GROUP_SIZE, folder=Path(temporary, "state")
        )
        config = json.loads((source / "config.json").read_text())
        jax_awq.save_hf(target, awq, config)
        shutil.copy(source / "tokenizer.json", target)

        saved = jax_awq.models.load(target, dtype="float32")
        sizes = [(folder / "model.safetensors").stat().st_size for folder in (source, target)]
        print(f"float {sizes[0] / 1e6:.1f} MB, AWQ {sizes[1] / 1e6:.1f} MB")
        found = [perplexity(m, held_out) for m in (model, saved)]
        print("perplexity of other text: float {:.2f}, AWQ {:.2f}".format(*found))
    good = abs(found[1] / found[0] - 1) < 0.005 and sizes[1] < sizes[0] / 2
    print("good" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
