"""What XLA executes: its thunks, as `--xla_dump_to` has them. HLO does not tell command buffers."""

import re
from pathlib import Path


def as_executed(file: Path) -> Path:
    """XLA writes it apart from what it first made, where it then changed something."""
    changed = file.with_name(file.name.replace(".txt", "_after_thunk_passes.txt"))
    return changed if changed.exists() else file


def calls_in_command_buffers(thunks: str) -> list[bool]:
    """For each custom call of a program as XLA executes it, whether it is in a command buffer.

    Args:
      thunks: lines "<id>: <kind> ...", indented below the line of which they are part.
    """
    found: list[bool] = []
    above: list[tuple[int, str]] = []
    for indent, kind in re.findall(r"^( *)\d+: (k\w+)", thunks, re.M):
        above = [(size, k) for size, k in above if size < len(indent)]
        if kind == "kCustomCall":
            found.append("kCommandBuffer" in [k for _, k in above])
        above.append((len(indent), kind))
    return found
