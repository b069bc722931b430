"""The header of a GGUF file, read quickly and with suspicion."""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from nanoflow_compiler.errors import ModelLoadError

__all__ = ["GGUFHeader", "read_gguf_header"]

Scalar = int | float | bool | str

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Type number of the format -> code of ``struct``."""


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a GGUF file says about itself, arrays left out."""

    metadata: dict[str, Scalar]
    tensors: dict[str, tuple[int, int]]
    """Name -> offset and size in bytes, from the start of the file."""

    @property
    def architecture(self) -> str:
        """Such as ``llama``."""
        return str(self.metadata.get("general.architecture", "unknown"))


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header; refuse a file that is not GGUF, is cut short or contradicts itself."""
    size = path.stat().st_size
    if size < len(MAGIC):
        raise _broken(path, "it is empty or cut short")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(MAGIC)] != MAGIC:
            raise _broken(path, "it does not start with the letters GGUF")
        try:
            header = _parse(_Reader(data))
        except (struct.error, ValueError, KeyError, OverflowError) as error:
            raise _broken(path, f"its header cannot be read ({error})") from error
    end = max((offset + length for offset, length in header.tensors.values()), default=0)
    if end > size:
        raise _broken(path, f"its tensors end at byte {end:,}, the file at byte {size:,}")
    return header


class _Reader:
    """Takes values off the front of a buffer."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = len(MAGIC)

    def number(self, code: str) -> int | float | bool:
        value: int | float | bool
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def count(self, code: str = "Q") -> int:
        return int(self.number(code))

    def skip(self, length: int) -> None:
        self.position += length
        if self.position > len(self.data):
            raise ValueError("it is cut short")

    def string(self) -> str:
        length = self.count()
        start = self.position
        self.skip(length)
        return self.data[start : self.position].decode()

    def value(self, kind: int) -> Scalar | None:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            self._skip_array()
            return None
        return self.number(SCALARS[kind])

    def _skip_array(self) -> None:
        kind, length = self.count("I"), self.count()
        if kind in SCALARS:
            self.skip(length * struct.calcsize(f"<{SCALARS[kind]}"))
            return
        for _ in range(length):
            if kind == STRING:
                self.skip(self.count())
            else:
                self.value(kind)


def _parse(reader: _Reader) -> GGUFHeader:
    version = reader.count("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version} is unknown")
    num_tensors, num_values = reader.count(), reader.count()
    metadata: dict[str, Scalar] = {}
    for _ in range(num_values):
        key, kind = reader.string(), reader.count("I")
        value = reader.value(kind)
        if value is not None:
            metadata[key] = value
    extents = dict(_tensor(reader) for _ in range(num_tensors))
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    start = -(-reader.position // alignment) * alignment
    return GGUFHeader(
        metadata, {name: (start + offset, length) for name, (offset, length) in extents.items()}
    )


def _tensor(reader: _Reader) -> tuple[str, tuple[int, int]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = reader.string()
    num_elements = 1
    for _ in range(reader.count("I")):
        num_elements *= reader.count()
    block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(reader.count("I"))]
    return name, (reader.count(), num_elements // block_elements * block_bytes)


def _broken(path: Path, what: str) -> ModelLoadError:
    return ModelLoadError(f"{path} is not a usable GGUF file: {what}; download it again")
