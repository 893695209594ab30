"""Writes tiny-*/: one small random AWQ checkpoint for each architecture, and what transformers
computes with it.

    pip install torch transformers==4.57.6 safetensors numpy
    python tests/golden/make_tiny_models.py

Nothing of this project runs here: weights are rounded to 4 bits and packed by the few lines of
numpy below, and transformers' own models compute in float32 with the weights ``(q - z) * s``.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = Path(__file__).parent
GROUP_SIZE = 32
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word holds columns 0 to 7: AutoAWQ's order
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What transformers is told, and how config.json then spells it.
MODELS = {
    "llama": {
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"rope_theta": 10000.0, "sliding_window": 7},
    "qwen2": {"rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {
        "rope_theta": 1e6,
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3_moe": {
        "rope_theta": 1e4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
}
QUANTIZED = re.compile(r"model\.layers\.\d+\.(self_attn\.\w_proj|mlp(\.experts\.\d+)?\.\w+_proj)")


def main() -> None:
    for seed, (model_type, special) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        write(GOLDEN / f"tiny-{model_type.replace('_', '-')}", model_type, {**SIZES, **special})


def write(folder: Path, model_type: str, values: dict) -> None:
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tensors = {}
    with torch.no_grad():
        for name, value in list(model.named_parameters()):
            module, _, part = name.rpartition(".")
            if value.ndim == 1:
                value.copy_(torch.randn_like(value) * 0.2 + ("norm" in name))
            value.copy_(value.half().float())
            if part == "weight" and QUANTIZED.fullmatch(module):
                packed, dequantized = quantize(value.numpy().T)
                value.copy_(torch.from_numpy(dequantized.T.copy()))
                tensors |= {f"{module}.{key}": array for key, array in packed.items()}
            else:
                tensors[name] = value.half().numpy()
    folder.mkdir(exist_ok=True)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config_json = {
        "architectures": [type(model).__name__],
        "model_type": model_type,
        **spelled(model_type, values),
        "quantization_config": {
            "bits": 4,
            "group_size": GROUP_SIZE,
            "modules_to_not_convert": ["gate"] if model_type == "qwen3_moe" else None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
    }
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
    np.savez_compressed(folder / "expected.npz", **expected(model, values["vocab_size"]))


def spelled(model_type: str, values: dict) -> dict:
    """Half of the files as transformers 4 writes them, half as transformers 5 does."""
    values = dict(values)
    if model_type not in ("llama", "qwen3"):
        return {**values, "rope_scaling": None, "torch_dtype": "float16"}
    rope = {"rope_theta": values.pop("rope_theta"), **values.pop("rope_scaling", {})}
    return {**values, "rope_parameters": {"rope_type": "default", **rope}, "dtype": "float16"}


def quantize(weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Round to nearest of a (K, N) weight: the packed arrays, and float32 ``(q - z) * s``."""
    k, n = weight.shape
    groups = weight.reshape(k // GROUP_SIZE, GROUP_SIZE, n)
    low, high = groups.min(axis=1), groups.max(axis=1)
    scales = ((high - low) / 15).astype(np.float16)
    step = scales.astype(np.float32)
    zeros = np.clip(np.rint(-low / step), 0, 15)
    codes = np.clip(np.rint(groups / step[:, None]) + zeros[:, None], 0, 15)
    dequantized = ((codes - zeros[:, None]) * step[:, None]).reshape(k, n).astype(np.float32)
    packed = {"qweight": pack(codes.reshape(k, n)), "qzeros": pack(zeros), "scales": scales}
    return packed, dequantized


def pack(codes: np.ndarray) -> np.ndarray:
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for column, nibble in enumerate(NIBBLES):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def expected(model: torch.nn.Module, vocab_size: int) -> dict[str, np.ndarray]:
    ids = torch.randint(2, vocab_size, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        padded = model.generate(ids, attention_mask=mask, **options)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded_logits = model(ids, attention_mask=mask, position_ids=positions).logits
        top = model(greedy).logits[:, ids.shape[1] - 1 : -1].topk(2).values
        print(model.config.model_type, "smallest margin", float((top[..., 0] - top[..., 1]).min()))
        return {
            "input_ids": ids.numpy().astype(np.int32),
            "logits": model(ids).logits.numpy(),
            "attention_mask": mask.numpy().astype(np.int32),
            "padded_logits": padded_logits[1, 6:].numpy(),
            "greedy_ids": greedy.numpy().astype(np.int32),
            "padded_greedy_ids": padded.numpy().astype(np.int32),
        }


if __name__ == "__main__":
    main()
