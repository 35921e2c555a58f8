"""Read and write the headers of safetensors files, and verify that the files hold what their headers promise.

Plain Python: a job rejects a damaged checkpoint before it imports torch, vLLM or transformers. No tensor is
read, so a checkpoint of 60 GB takes milliseconds. The format is described at
https://huggingface.co/docs/safetensors: 8 bytes length of the header, the header as JSON, the tensors' bytes
without gaps.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

INDEX = "model.safetensors.index.json"
"""File that names the shard of every tensor, in a folder of several shards."""
SINGLE = "model.safetensors"
"""The only file of a folder without index."""

LENGTH_BYTES = 8
ALIGNMENT = 8
"""A header's length is a multiple of this, so that tensors are aligned."""
MAX_HEADER = 100_000_000
"""Longest header in bytes that the safetensors library reads."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf")

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of an element by dtype."""


class InvalidCheckpoint(ValueError):
    """A file or folder is not what its header or index says. The message names the file and the tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry in a header."""

    file: str
    """Name of the file."""
    dtype: str
    """safetensors' name of the type, such as BF16."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    stop: int


class TensorEntry(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: str
    """safetensors' name of the type."""
    shape: list[int]
    nbytes: int


def write_header(tensors: Iterable[TensorEntry]) -> bytes:
    """The beginning of a file with these tensors, in the order in which their bytes follow it: the same as
    the library's for the order of the library, which is larger types first, then by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for tensor in tensors:
        start, stop = stop, stop + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(first: bytes | bytearray, size: int, file: str) -> int:
    """Length of the header in bytes, from the file's first LENGTH_BYTES and its size.

    Raises InvalidCheckpoint if the file cannot be a safetensors file of that size.
    """
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or not 0 < length <= min(size - LENGTH_BYTES, MAX_HEADER):
        raise InvalidCheckpoint(
            f"{file} is not a safetensors file, or is cut: it has {size} bytes, and its first "
            f"{LENGTH_BYTES} promise a header of {length}."
        )
    return length


def parse_header(header: bytes | bytearray, data_bytes: int, file: str) -> dict[str, StoredTensor]:
    """The tensors of a file by name. `data_bytes`: bytes that follow the header.

    Raises InvalidCheckpoint unless the tensors fill those bytes without gap or overlap.
    """
    entries = _json_object(header, f"{file}: its header")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise InvalidCheckpoint(f"{file}: the header's __metadata__ is not an object of texts.")
    tensors = {name: _entry(name, entry, file) for name, entry in entries.items()}
    covered = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != covered:
            raise InvalidCheckpoint(
                f"{file}: {name} begins at byte {tensor.start} of the data, and the tensors before it end at "
                f"{covered}."
            )
        if tensor.stop > data_bytes:
            raise InvalidCheckpoint(
                f"{file} is cut: {name} ends at byte {tensor.stop} of the data, which has {data_bytes}."
            )
        covered = tensor.stop
    if covered != data_bytes:
        raise InvalidCheckpoint(f"{file}: its tensors have {covered} bytes, and the file has {data_bytes}.")
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises InvalidCheckpoint as parse_header does, OSError if unreadable."""
    with path.open("rb") as file:
        size = path.stat().st_size
        first = file.read(len(LFS_POINTER))
        if first == LFS_POINTER:
            raise InvalidCheckpoint(
                f"{path.name} is a pointer of Git LFS, not the file. Run `git lfs pull` and copy again."
            )
        length = header_length(first, size, path.name)
        file.seek(LENGTH_BYTES)
        return parse_header(file.read(length), size - LENGTH_BYTES - length, path.name)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face checkpoint by name, from the headers of all its files.

    The files are those that INDEX names, or SINGLE without an index. Others, such as shards of an earlier
    save, are ignored if there is an index, as vLLM and transformers do. Raises InvalidCheckpoint, with the
    name of the file or tensor, unless all files are there and whole, and index and headers agree.
    """
    index = folder / INDEX
    try:
        if not index.is_file():
            return read_header(folder / _single_file(folder))
        weight_map = _weight_map(index)
        if SINGLE not in weight_map.values() and (folder / SINGLE).exists():
            raise InvalidCheckpoint(
                f"the folder holds two checkpoints: {SINGLE}, and the files that {INDEX} names. vLLM would "
                "read the second and transformers the first; remove one."
            )
        found: dict[str, StoredTensor] = {}
        for file in sorted(set(weight_map.values())):
            if not (folder / file).is_file():
                raise InvalidCheckpoint(f"{file}, which {INDEX} names, is missing.")
            for name, tensor in read_header(folder / file).items():
                if name in found:
                    raise InvalidCheckpoint(f"{name} is in {found[name].file} and again in {file}.")
                found[name] = tensor
    except OSError as error:
        raise InvalidCheckpoint(f"cannot be read: {error}") from error
    for name in sorted({*weight_map, *found}):
        if name not in found:
            raise InvalidCheckpoint(f"{name} is missing in {weight_map[name]}, where {INDEX} says it is.")
        if name not in weight_map:
            raise InvalidCheckpoint(f"{name} is in {found[name].file} but not in {INDEX}.")
        if weight_map[name] != found[name].file:
            raise InvalidCheckpoint(
                f"{name} is in {found[name].file}, and {INDEX} says that it is in {weight_map[name]}."
            )
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InvalidCheckpoint if there is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidCheckpoint(f"{path.name} cannot be read: {error}") from error
    return _json_object(content, path.name)


def _single_file(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files == [SINGLE]:
        return SINGLE
    if not files:
        others = sorted(path.name for form in OTHER_FORMATS for path in folder.glob(form))
        instead = f" It has {', '.join(others[:3])}; only safetensors are read." if others else ""
        raise InvalidCheckpoint(f"the folder has no *.safetensors file.{instead}")
    raise InvalidCheckpoint(
        f"the folder has {', '.join(files[:5])}{' …' if len(files) > 5 else ''} and no {INDEX}. Several "
        f"files need one, which the save writes; a single file is called {SINGLE}, with no other beside it."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor."""
    found = read_json_object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise InvalidCheckpoint(f"{INDEX} has no weight_map.")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InvalidCheckpoint(
                f"{INDEX}: the file of {name} is {file!r}, not the name of a *.safetensors file beside it."
            )
    return found


def _json_object(content: bytes | bytearray, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidCheckpoint(f"{where} has {twice} twice.")
        return found

    try:
        # UTF-8 without a byte order mark, as safetensors and transformers read it
        found = json.loads(content.decode(), object_pairs_hook=unique)
    except InvalidCheckpoint:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{where} is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise InvalidCheckpoint(f"{where} is not a JSON object.")
    return found


def _entry(name: str, entry: object, file: str) -> StoredTensor:
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise InvalidCheckpoint(f"{file}: the header's entry of {name} has no dtype, shape and data_offsets.")
    if dtype not in BITS:
        raise InvalidCheckpoint(f"{file}: {name} has the unknown dtype {dtype}.")
    start, stop = offsets
    if (stop - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise InvalidCheckpoint(
            f"{file}: {name} is {dtype} {list(shape)}, and its data_offsets {start} to {stop} hold "
            f"{stop - start} bytes."
        )
    return StoredTensor(file, dtype, tuple(shape), start, stop)


def _sizes(values: object) -> TypeGuard[list[int]]:
    """Whether it is a list of integers that are not negative."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
