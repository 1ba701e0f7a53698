"""Reading bytes from a checkpoint file, never more than there are."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from relu_doctor.errors import CheckpointError
from relu_doctor.text import clean_text


@dataclass(slots=True)
class BoundedReader:
    """Reads from a binary file and never allocates more than is left of a limit."""

    file: IO[bytes]
    left: int
    consumed: int = 0

    def read(self, count: int = -1) -> bytes:
        """At most ``count`` bytes; fewer at the end of the file or of the limit."""
        data = self.file.read(self.left if count < 0 else min(count, self.left))
        self.left -= len(data)
        self.consumed += len(data)
        return data

    def readline(self) -> bytes:
        """The rest of the line, with its newline."""
        data = self.file.readline(self.left)
        self.left -= len(data)
        self.consumed += len(data)
        return data


@dataclass(eq=False, slots=True)
class StorageFile:
    """Where the bytes of the storages lie in a checkpoint file.

    The file is opened for each read and held to the size and time it had at first: a training run that overwrites its
    checkpoint gives a clean error, never a mixture.
    """

    path: Path
    size: int
    modified_ns: int
    big_endian: bool = False
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # key -> (offset, bytes)

    def read(self, key: str, dtype: torch.dtype) -> torch.UntypedStorage:
        """One storage, in memory and in native byte order.

        Raises:
            CheckpointError: the file has changed or shrunk since it was opened, or cannot be read.
        """
        offset, nbytes = self.spans[key]
        flat = torch.empty(nbytes, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if (stat.st_size, stat.st_mtime_ns) != (self.size, self.modified_ns):
                    raise CheckpointError(f"'{clean_text(self.path)}' was changed while it was being read; run again.")
                file.seek(offset)
                if file.readinto(flat.numpy().data) != nbytes:
                    raise CheckpointError(f"'{clean_text(self.path)}' is truncated: tensor data end early.")
        except OSError as error:
            raise CheckpointError(f"'{clean_text(self.path)}' cannot be read: {clean_text(error.strerror)}.") from error
        unit = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        if self.big_endian != (sys.byteorder == "big") and unit > 1:
            flat.numpy().view(f"u{unit}").byteswap(inplace=True)
        if dtype == torch.bool:
            flat = flat.ne(0).view(torch.uint8)  # any other byte in a bool tensor is undefined behaviour
        return flat.untyped_storage()
