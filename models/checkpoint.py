"""Checks of safetensors files that need only their headers, before anything is loaded."""

import json
import struct
from pathlib import Path
from typing import Any

from nanoflow_compiler.errors import ModelLoadError

__all__ = ["check_checkpoint", "read_json"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def check_checkpoint(folder: Path) -> None:
    """Refuse a directory whose weight files are absent, cut short or lack a tensor of the index."""
    if (folder / INDEX).is_file():
        _check_index(folder)
    elif (folder / WEIGHTS).is_file():
        _tensor_names(folder / WEIGHTS)
    elif list(folder.glob("*.bin")):
        raise ModelLoadError(
            f"{folder} has only .bin weights, which can run code when loaded; convert them to safetensors"
        )
    else:
        raise ModelLoadError(
            f"{folder} has a configuration but no {WEIGHTS} or {INDEX}; download the weights, "
            'or pass load_format="dummy" for random ones'
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; a file that is not one is refused."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object; download it again")
    return values


def _check_index(folder: Path) -> None:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{folder / INDEX} has no weight_map; download it again")
    files = sorted({str(file) for file in weight_map.values()})
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ModelLoadError(
            f"{folder} lacks {len(missing)} of {len(files)} weight files that its index names, "
            f"first {missing[0]}; download the model again"
        )
    present = {file: _tensor_names(folder / file) for file in files}
    for name, file in weight_map.items():
        if name not in present[file]:
            raise ModelLoadError(
                f"{folder / file} lacks the tensor {name} that the index promises; download it again"
            )


def _tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file whose size is what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == LENGTH_BYTES else size
        if length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
            raise _broken(path, "its header is cut short")
        text = file.read(length)
    try:
        tensors = {
            name: entry for name, entry in json.loads(text).items() if name != "__metadata__"
        }
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise _broken(path, "its header is not what the format says") from error
    expected = LENGTH_BYTES + length + end
    if size != expected:
        raise _broken(path, f"it has {size:,} bytes and its header promises {expected:,}")
    return set(tensors)


def _broken(path: Path, what: str) -> ModelLoadError:
    return ModelLoadError(f"{path} is not a whole safetensors file: {what}; download it again")
