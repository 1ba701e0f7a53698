"""The files that hold pickles and tensors: what kind a file is, told by its content, and where its bytes lie."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from relu_doctor.checkpoints.nodes import DamagedPickleError, Global, StorageRef, StorageType
from relu_doctor.checkpoints.pickles import MOST_BYTES, read_pickle
from relu_doctor.checkpoints.streams import BoundedReader, StorageFile
from relu_doctor.errors import CheckpointError, UnsafeCheckpointError
from relu_doctor.text import clean_text, closest_name, name_some

ZIP = "PyTorch zip"
LEGACY = "PyTorch legacy"
SAFETENSORS = "safetensors"

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_ZIP_DAMAGE = (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError, EOFError)
_SIGNATURES = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras?)",
    b"\x1f\x8b": "gzip-compressed: unpack it first",
    b"\x93NUMPY": "a NumPy array, no checkpoint",
    b"GGUF": "a GGUF file",
    b"PK\x05\x06": "an empty zip archive",
    b"version https://git-lfs": "a Git LFS pointer: fetch the real file with 'git lfs pull'",
}
_WANTED = "Expected a checkpoint of torch.save (.pt, .pth) or a .safetensors file"


@dataclass(frozen=True, slots=True)
class Contents:
    """What a torch file holds: ``root`` is made of plain values and the nodes of ``nodes.py``."""

    root: object
    format: str


def check_file(path: Path) -> None:
    """See that ``path`` is a file that can be read.

    Raises:
        CheckpointError: it is missing (the closest name is suggested), a directory, or not readable.
    """
    shown = clean_text(path)
    try:
        if path.is_dir():
            inside = sorted(entry.name for entry in path.iterdir() if entry.name.lower().endswith(_SUFFIXES))
            if inside:
                noun = "checkpoint file" if len(inside) == 1 else "checkpoint files"
                raise CheckpointError(
                    f"'{shown}' is a directory with {len(inside)} {noun} in it; give a file: {name_some(inside)}."
                )
            raise CheckpointError(f"'{shown}' is a directory without checkpoint files ({', '.join(_SUFFIXES)}).")
        if not path.exists():
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            near = closest_name(path.name, siblings)
            hint = f" Did you mean '{clean_text(near)}'?" if near else ""
            raise CheckpointError(f"there is no file '{shown}'.{hint}")
        if not path.is_file():
            raise CheckpointError(f"'{shown}' is not a regular file. {_WANTED}.")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"'{shown}' cannot be read: {clean_text(error)}.") from error


def tell_format(path: Path) -> str:
    """The format of a file by its content: one of :data:`ZIP`, :data:`LEGACY`, :data:`SAFETENSORS`.

    Raises:
        CheckpointError: it is none of these; the message says what it seems to be.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return ZIP
    if _is_legacy(path, size):
        return LEGACY
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= max(size - 8, 2**20):
        return SAFETENSORS
    raise CheckpointError(f"'{clean_text(path)}' is {_describe(head)}. {_WANTED}.")


def _describe(head: bytes) -> str:
    if not head:
        return "empty"
    for signature, meaning in _SIGNATURES.items():
        if head.startswith(signature):
            return meaning
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it, or load and save it again with a newer PyTorch if torch.save wrote it"
    if head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05":
        return "a plain pickle, not written by torch.save"
    try:
        text = head.decode("utf-8", "ignore" if len(head) == 512 else "strict")
    except UnicodeDecodeError:
        return "of no known format"
    if any(ord(character) < 32 and character not in "\t\r\n" for character in text):
        return "of no known format"
    return f"a text file that begins with '{clean_text(text, 40)}'"


def read_archive(path: Path, kind: str) -> Contents:
    """Read a torch file without running anything in it.

    Args:
        path: the file.
        kind: :data:`ZIP` or :data:`LEGACY`, as :func:`tell_format` says.

    Raises:
        CheckpointError: it is truncated, damaged or a zip of something else; a TorchScript or exported program.
    """
    stat = path.stat()
    source = StorageFile(path, stat.st_size, stat.st_mtime_ns)
    reader = _read_zip if kind == ZIP else _read_legacy
    try:
        with path.open("rb") as file:
            return Contents(reader(file, source), kind)
    except DamagedPickleError as error:
        raise CheckpointError(
            f"'{clean_text(path)}' is damaged or truncated: {clean_text(error)}. Copy or save it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"'{clean_text(path)}' cannot be read: {clean_text(error.strerror)}.") from error


# The zip format: PREFIX/data.pkl, PREFIX/byteorder and PREFIX/data/KEY


def _read_zip(file: IO[bytes], source: StorageFile) -> object:
    records, names = _records(file, source)
    prefix = _check_names(source.path, names)
    if f"{prefix}data.pkl" not in records:
        raise DamagedPickleError("its records are compressed, which torch.save never does")
    order_at = records.get(f"{prefix}byteorder")
    if order_at is not None:
        file.seek(order_at[0])
        source.big_endian = file.read(min(order_at[1], 16)) == b"big"
    data = f"{prefix}data/"
    source.spans = {name.removeprefix(data): span for name, span in records.items() if name.startswith(data)}
    offset, nbytes = records[f"{prefix}data.pkl"]
    if nbytes > MOST_BYTES:
        raise DamagedPickleError(f"its pickle has {nbytes:,} bytes, more than {MOST_BYTES:,}")
    file.seek(offset)
    return read_pickle(BoundedReader(file, nbytes), _storage_loader(source, "zip"))


def _records(file: IO[bytes], source: StorageFile) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The place of every record that is stored plainly, inside the file and not overlapping; and all names."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except _ZIP_DAMAGE as error:
        raise DamagedPickleError("its zip directory, which stands at the end, is missing or broken") from error
    records: dict[str, tuple[int, int]] = {}
    total = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            continue  # torch.save never compresses; if the record is needed, its absence is said later
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size:
            raise DamagedPickleError("a zip record lies outside the file")
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        total += entry.file_size
        if signature != b"PK\x03\x04" or offset + entry.file_size > source.size or total > source.size:
            raise DamagedPickleError("a zip record lies outside the file")
        records[entry.filename] = (offset, entry.file_size)
    return records, [entry.filename for entry in entries]


def check_zip(path: Path) -> None:
    """See that a zip is a checkpoint of ``torch.save``, by the names in it.

    Raises:
        UnsafeCheckpointError: it is a TorchScript program.
        CheckpointError: its directory is broken, or it is a zip of something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _ZIP_DAMAGE as error:
        raise CheckpointError(f"'{clean_text(path)}' is damaged or truncated. Copy or save it again.") from error
    _check_names(path, names)


def _check_names(path: Path, names: list[str]) -> str:
    """The prefix of the records of a checkpoint of ``torch.save``.

    Raises:
        UnsafeCheckpointError: the archive is a TorchScript program.
        CheckpointError: it is an exported program, or a zip of something else.
    """
    shown = clean_text(path)
    pickles = sorted((name for name in names if name == "data.pkl" or name.endswith("/data.pkl")), key=len)
    prefix = pickles[0].removesuffix("data.pkl") if pickles else ""
    if any(name.startswith(f"{prefix}code/") or name == f"{prefix}constants.pkl" for name in names):
        raise UnsafeCheckpointError(
            f"'{shown}' is a TorchScript archive, which is a program: --trust does not cover it yet. "
            "Save the state_dict of the model that it was made from."
        )
    bases = {name.rpartition("/")[2] for name in names}
    if "archive_format" in bases or any(base.startswith("serialized_exported_program") for base in bases):
        raise CheckpointError(f"'{shown}' is a program of torch.export (.pt2). Save the model's state_dict instead.")
    if not pickles:
        inside = [name for name in names if name.lower().endswith(_SUFFIXES)]
        if names and all(name.endswith(".npy") for name in names):
            kind = "a NumPy .npz archive"
        elif inside:
            kind = f"a zip archive with {name_some(inside)} in it: unpack it and give that file"
        else:
            kind = "a zip archive of something else"
        raise CheckpointError(f"'{shown}' is {kind}. {_WANTED}.")
    return prefix


# The format before PyTorch 1.6: five pickles, then the storages


def _is_legacy(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        try:
            return read_pickle(BoundedReader(file, min(size, 64))) == _LEGACY_MAGIC
        except DamagedPickleError:
            return False


def _read_legacy(file: IO[bytes], source: StorageFile) -> object:
    reader = BoundedReader(file, min(source.size, MOST_BYTES))
    magic, protocol = read_pickle(reader), read_pickle(reader)
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise DamagedPickleError("its format is of an unknown version")
    read_pickle(reader)  # about the machine that wrote it; the data are little-endian always
    widths: dict[str, tuple[int, int]] = {}
    root = read_pickle(reader, _storage_loader(source, "legacy", widths))
    keys = read_pickle(reader)
    if not isinstance(keys, list):
        raise DamagedPickleError("its list of storages is malformed")
    position = file.tell()
    for key in keys:
        if not isinstance(key, str | int) or str(key) not in widths:
            raise DamagedPickleError("its list of storages names one that no tensor has")
        item_bytes, nbytes = widths[str(key)]
        file.seek(position)
        count = int.from_bytes(file.read(8), "little", signed=True)
        if count * item_bytes != nbytes or position + 8 + nbytes > source.size:
            raise DamagedPickleError("its tensor data end early or are not as long as they should be")
        source.spans[str(key)] = (position + 8, nbytes)
        position += 8 + nbytes
    if len(source.spans) < len(widths):
        raise DamagedPickleError("the data of some tensors are not in it")
    return root


def _storage_loader(
    source: StorageFile, layout: str, widths: dict[str, tuple[int, int]] | None = None
) -> Callable[[object], object]:
    """Makes a :class:`StorageRef` from a persistent id, and notes for the old format how long each one claims to be."""

    def load(identity: object) -> object:
        if not isinstance(identity, tuple) or not identity:
            raise DamagedPickleError("a reference to tensor data is malformed")
        if identity[0] == "module" and len(identity) == 4:  # a class saved with its source, in the oldest files
            return identity[1] if isinstance(identity[1], Global) else None
        if identity[0] != "storage" or len(identity) != (5 if layout == "zip" else 6):
            raise DamagedPickleError("a reference to tensor data is malformed")
        kind, name, count = identity[1], identity[2], identity[4]
        if not isinstance(kind, StorageType) or not isinstance(name, str | int) or type(count) is not int or count < 0:
            raise DamagedPickleError("a reference to tensor data is malformed")
        key = str(name)[:200]
        item_bytes = abs(kind.item_bytes)
        start, nbytes = 0, count * item_bytes
        if widths is None:
            held = source.spans.get(key, (0, 0))[1]
            if nbytes > held:
                raise DamagedPickleError(f"tensor data '{key}' are missing or shorter than they should be")
        elif widths.setdefault(key, (item_bytes, nbytes))[1] != nbytes:
            raise DamagedPickleError("two references to the same tensor data disagree")
        elif identity[5] is not None:
            start, nbytes = _view(identity[5], item_bytes, nbytes)
        return StorageRef(source, key, start, nbytes, kind.dtype, kind.item_bytes > 0)

    return load


def _view(metadata: object, item_bytes: int, nbytes: int) -> tuple[int, int]:
    """Where a view of a storage starts, and how long it is, in bytes."""
    if not isinstance(metadata, tuple) or len(metadata) != 3:
        raise DamagedPickleError("a view of tensor data is malformed")
    _, first, count = metadata
    if type(first) is not int or type(count) is not int or first < 0 or count < 0:
        raise DamagedPickleError("a view of tensor data is malformed")
    if (first + count) * item_bytes > nbytes:
        raise DamagedPickleError("a view reaches past the end of its tensor data")
    return first * item_bytes, count * item_bytes
