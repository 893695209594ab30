"""What `quantize` keeps on disk, so that it can go on where it was stopped."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


class State:
    """A folder of results, one file each, told apart from those of another run; None keeps nothing.

    Raises:
      ImportError: there is a folder, and safetensors is not installed.
      FileExistsError: the folder is a file.
    """

    def __init__(self, folder: str | os.PathLike[str] | None):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            try:
                import safetensors.numpy
            except ImportError as error:
                raise ImportError(
                    "quantize needs safetensors to keep its state: pip install 'jax_awq[hf]'"
                ) from error
            self.files = safetensors
            if self.folder.exists() and not self.folder.is_dir():
                raise FileExistsError(f"quantize: {self.folder} must be a folder")
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, run: Mapping[str, Any]) -> dict[str, Array] | None:
        """A result, or None where there is none yet.

        Raises:
          ValueError: it is of a run with other settings or weights, or the file is damaged.
        """
        if self.folder is None or not (file := self._file(name)).is_file():
            return None
        try:
            with self.files.safe_open(file, "np") as tensors:
                found = json.loads((tensors.metadata() or {}).get("run", "null"))
                arrays = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        except (self.files.SafetensorError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"quantize: {file} is damaged: {error}; without it its block is searched again"
            ) from error
        if found != json.loads(json.dumps(run)):
            raise ValueError(
                f"quantize: {file} is of another run: it has {found}, this run {dict(run)}"
            )
        return {key: jnp.asarray(array) for key, array in arrays.items()}

    def save(self, name: str, run: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        if self.folder is None:
            return
        part = self._file(f"{name}.part")
        self.files.numpy.save_file(
            {key: np.asarray(value) for key, value in arrays.items()},
            part,
            metadata={"run": json.dumps(run)},
        )
        part.replace(self._file(name))  # whole or not at all

    def fingerprint(self, array: Any) -> int:
        """CRC-32 of the bytes; 0 where nothing is kept."""
        if self.folder is None:
            return 0
        return zlib.crc32(np.asarray(array).tobytes())

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"
