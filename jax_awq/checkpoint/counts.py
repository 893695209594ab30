"""What a checkpoint has to have: layers and experts are numbered, and alike."""

import collections
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_awq.checkpoint.config import read_model_config
from jax_awq.checkpoint.files import Tensor

_LAYER = re.compile(r"((?:model\.|language_model\.)*layers)\.(\d+)\.(?:(.*)\.)?[^.]*")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)\.[^.]*")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# By model_type, of models whose layers are alike: what may be in some layers alone.
_MAY_DIFFER = {"llama": (), "mistral": (), "qwen2": (), "qwen3": (), "qwen3_moe": ("mlp.",)}


def check_counts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Checks that no decoder layer and no expert is missing, as far as names and config.json tell.

    Raises:
      ValueError: a number is left out, experts of a layer have different modules, or there are
        fewer than config.json has. (More layers are let through: some models predict several
        tokens with extra ones.)
    """
    config = read_model_config(folder)
    wanted = config.get("num_hidden_layers")
    for stack, modules in _modules(_LAYER, tensors).items():
        _check_numbers(_files(tensors), stack, modules, wanted if isinstance(wanted, int) else 0)
    counts = [config[key] for key in _EXPERT_COUNTS if isinstance(config.get(key), int)]
    for stack, modules in _modules(_EXPERT, tensors).items():
        _check_numbers(_files(tensors), stack, modules, counts[0] if counts else 0)
        for number, there in modules.items():
            for missing in sorted(set.union(*modules.values()) - there):
                raise _missing(f"{stack}.{number}.{missing}", tensors)


def check_modules(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Checks that a model of a `model_type` whose layers are alike has all of its modules.

    Raises:
      ValueError: a layer lacks what half of the layers have, or the model, where config.json tells
        of a whole one, its embedding, its last norm or its head.
    """
    config = read_model_config(folder)
    may_differ = _MAY_DIFFER.get(str(config.get("model_type")))
    if may_differ is None:
        return
    for stack, layers in _modules(_LAYER, tensors).items():
        count = collections.Counter(itertools.chain.from_iterable(layers.values()))
        for number, there in sorted(layers.items()):
            for module in sorted(count.keys() - there):
                if 2 * count[module] >= len(layers) and not module.startswith(may_differ):
                    raise _missing(f"{stack}.{number}.{module}", tensors)
        if "num_hidden_layers" in config:
            for module in _ends(stack.removesuffix("layers"), config):
                if not any(name.rpartition(".")[0] == module for name in tensors):
                    raise _missing(module, tensors)


def _modules(pattern: re.Pattern[str], tensors: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Of each stack, of each of its numbers."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in tensors:
        if match := pattern.fullmatch(name):
            stack, number, module = match.groups(default="")
            found.setdefault(stack, {}).setdefault(int(number), set()).add(module)
    return found


def _ends(prefix: str, config: Mapping[str, Any]) -> Iterator[str]:
    """What stands before and behind the layers."""
    yield f"{prefix}embed_tokens"
    yield f"{prefix}norm"
    kinds = config.get("architectures") or ["ForCausalLM"]
    of_text = any(str(kind).endswith("ForCausalLM") for kind in kinds)
    if of_text and not config.get("tie_word_embeddings"):
        yield "lm_head"


def _check_numbers(files: str, stack: str, found: Collection[int], wanted: int) -> None:
    for number in range(max(wanted, max(found) + 1)):
        if number not in found:
            raise ValueError(
                f"load_hf: {stack}.{number} is missing in {files}, which has {len(found)} of "
                f"{max(wanted, max(found) + 1)}"
            )


def _missing(module: str, tensors: Mapping[str, Tensor]) -> ValueError:
    return ValueError(f"load_hf: {module} is missing in {_files(tensors)}")


def _files(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(t.file) for t in tensors.values()}))
