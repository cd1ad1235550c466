"""Files of a folder or of a plain tar, as (path, key) pairs and a way to read one; a tar is read in place, never extracted."""

from __future__ import annotations

import os
import tarfile
import weakref
from pathlib import Path, PurePosixPath

from w2s_jax.data.images.imageset import Source
from w2s_jax.errors import UserError

BLOCK = 512
PACKED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z")


class TarSource(Source):
    """The regular files of a plain tar. Keys are (offset, size, name).

    UserError: no tar, compressed, cut short or damaged; a member that is a link, a device or sparse, has an absolute path or "..",
    or a name that occurs twice.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__()
        self.path = Path(path).expanduser()
        if self.path.name.lower().endswith(PACKED):
            unpack = "gunzip -k" if self.path.name.lower().endswith((".gz", ".tgz")) else "unpack it:"
            raise UserError(f"{self.path}: packed; images are read in place, from a plain .tar or a folder: {unpack} {self.path}")
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.path}: can't be read ({error.strerror})") from None
        weakref.finalize(self, os.close, self._file)  # read by offset for as long as the set lives
        stat = os.fstat(self._file)
        self.home = f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        self.files = self._index()

    def _index(self) -> list[tuple[str, tuple[int, int, str]]]:
        found, names = [], set()
        try:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isdir() and ".." not in PurePosixPath(name).parts:
                        continue
                    path = PurePosixPath(name)
                    if not member.isreg() or member.issparse():
                        raise UserError(f"{self.path}: member {member.name!r} is a link, a device or sparse; expected plain files")
                    if path.is_absolute() or ".." in path.parts:
                        raise UserError(f"{self.path}: member {member.name!r} leads out of the archive")
                    if str(path) in names:
                        raise UserError(f"{self.path}: member {str(path)!r} occurs more than once")
                    names.add(str(path))
                    found.append((str(path), (member.offset_data, member.size, str(path))))
                end = archive.offset
        except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
            raise UserError(f"{self.path}: no tar, or cut short or damaged ({error})") from None
        # tarfile takes a damaged header for the end: a real end is a block of zeros.
        if os.pread(self._file, BLOCK, end) != bytes(BLOCK):
            raise UserError(f"{self.path}: damaged or cut short: neither a member nor the end mark of a tar at byte {end:,}")
        return found

    def read(self, key) -> bytes:
        offset, size, _ = key
        parts, left = [], size
        while left:  # a single call reads 2 GiB at most
            part = os.pread(self._file, left, offset + size - left)
            if not part:
                raise OSError(f"{self.path} has become shorter")
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def stamp(self, key) -> str:
        return f"{key[0]} {key[1]}"


class FolderSource(Source):
    """The files of a folder and of those in it; links are followed, as torchvision and the hub's cache need. Keys are paths inside it."""

    def __init__(self, path: str | os.PathLike):
        super().__init__()
        self.path = Path(path).expanduser()
        self.home = str(self.path.resolve())
        self.files = [(name, name) for name in self._walk()]

    def _walk(self) -> list[str]:
        found = []

        def failed(error):
            raise UserError(f"{error.filename}: can't be read ({error.strerror})") from None

        above: dict[str, frozenset[str]] = {str(self.path): frozenset()}
        for here, folders, names in os.walk(self.path, followlinks=True, onerror=failed):
            parents = above.pop(here) | {os.path.realpath(here)}
            for folder in folders:
                inner = os.path.join(here, folder)
                if os.path.realpath(inner) in parents:
                    raise UserError(f"{inner}: a link to a folder above it")
                above[inner] = parents
            inside = os.path.relpath(here, self.path)
            found += [name if inside == "." else f"{Path(inside).as_posix()}/{name}" for name in names]
        return found

    def read(self, key) -> bytes:
        return (self.path / key).read_bytes()

    def stamp(self, key) -> str:
        stat = (self.path / key).stat()
        return f"{key} {stat.st_size} {stat.st_mtime_ns}"
