"""Layers and experts are numbered, so that one that is missing can be told."""

import collections
import re
from collections.abc import Mapping
from pathlib import Path

from jax_awq.checkpoint.config import read_model_config
from jax_awq.checkpoint.files import Tensor

_LAYER = re.compile(r"((?:model\.|language_model\.)*layers)\.(\d+)\.")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)\.[^.]*")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_counts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Checks that no decoder layer and no expert is missing, as far as names and config.json tell.

    Raises:
      ValueError: a number is left out, experts of a layer have different modules, or there are
        fewer than config.json has. (More layers are let through: some models predict several
        tokens with extra ones.)
    """
    config = read_model_config(folder)
    layers: dict[str, set[int]] = collections.defaultdict(set)
    experts: dict[str, dict[int, set[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(set)
    )
    for name in tensors:
        if match := _LAYER.match(name):
            layers[match[1]].add(int(match[2]))
        if match := _EXPERT.fullmatch(name):
            experts[match[1]][int(match[2])].add(match[3])
    files = ", ".join(sorted({str(t.file) for t in tensors.values()}))
    for stack, found in layers.items():
        wanted = config.get("num_hidden_layers")
        _check_numbers(files, stack, found, wanted if isinstance(wanted, int) else 0)
    for stack, modules in experts.items():
        counts = [config[key] for key in _EXPERT_COUNTS if isinstance(config.get(key), int)]
        _check_numbers(files, stack, set(modules), counts[0] if counts else 0)
        for number, there in modules.items():
            for missing in sorted(set.union(*modules.values()) - there):
                raise ValueError(f"load_hf: {stack}.{number}.{missing} is missing in {files}")


def _check_numbers(files: str, stack: str, found: set[int], wanted: int) -> None:
    for number in range(max(wanted, max(found) + 1)):
        if number not in found:
            raise ValueError(
                f"load_hf: {stack}.{number} is missing in {files}, which has {len(found)} of "
                f"{max(wanted, max(found) + 1)}"
            )
