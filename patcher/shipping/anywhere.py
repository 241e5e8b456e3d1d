"""Any place that fsspec knows: ``file://``, ``s3://``, ``gs://`` …

What lies beside a patch is a file beside it,
for those places that can list a folder.
"""

from __future__ import annotations

from typing import Any

from ..errors import ShippingError
from ..patch import files
from ..patch.container import MAX_FILE_BYTES
from .needs import needed
from .places import BESIDE, MAX_BESIDE, Parcel, all_of, failed, most_of

_CURE = "Is it there, and may you? See docs/shipping.md."


class Anywhere:
    """A URL of one of fsspec's file systems."""

    def __init__(self, url: str) -> None:
        self.url = url
        fsspec = needed("fsspec")
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
        except Exception as error:  # every file system has its own
            cure = "Install the package that it names." if isinstance(error, ImportError) else _CURE
            raise failed(f"Can't ship to {url}", error, cure) from error

    def send(self, parcel: Parcel) -> str:
        """Write the patch last, so that whoever finds it finds its signatures, too."""
        try:
            for suffix, data in parcel.beside.items():
                self._write(self._path + suffix, data)
            self._write(self._path, parcel.data)
        except Exception as error:
            raise failed(f"Can't write {self.url}", error, _CURE) from error
        return self.url

    def fetch(self) -> Parcel:
        """The file and those beside it."""
        return Parcel(self._read(self._path, MAX_FILE_BYTES), self._beside())

    def _beside(self) -> dict[str, bytes]:
        listed = self._suffixes()[:MAX_BESIDE]
        return {one: self._read(self._path + one, most_of(one)) for one in listed}

    def _write(self, path: str, data: bytes) -> None:
        if "file" not in self._fs.protocol:  # a name, or several in a tuple
            self._fs.pipe_file(path, data)
            return
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        files.write(path, data)

    def _suffixes(self) -> list[str]:
        folder = self._path.rpartition("/")[0]
        try:
            names = [str(one) for one in self._fs.ls(folder, detail=False)]
        except Exception:  # it can't list, or may not
            return []
        suffixes = [one[len(self._path) :] for one in names if one.startswith(self._path)]
        return sorted(one for one in suffixes if BESIDE.fullmatch(one))

    def _open(self, path: str) -> Any:
        return self._fs.open(path, "rb")

    def _read(self, path: str, most: int) -> bytes:
        try:
            with self._open(path) as file:
                return all_of(file, most, self.url)
        except ShippingError:
            raise
        except Exception as error:
            raise failed(f"Can't read {self.url}", error, _CURE) from error
