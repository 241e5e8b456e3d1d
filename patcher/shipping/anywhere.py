"""Any place that fsspec knows: ``file://``, ``https://``, ``s3://``, ``gs://``, ``hf://`` …

``hf://owner/repo/path.st@revision`` is ``huggingface_hub``'s own file system. What lies beside a
patch is a file beside it; a place that can't list (plain https) gives the patch alone.
"""

from __future__ import annotations

from typing import Any

from ..errors import ShippingError
from ..patch.container import MAX_FILE_BYTES
from ..signing import MAX_BUNDLE_BYTES
from .needs import needed
from .places import BESIDE, Parcel

_MOST_BESIDE = 64
MAX_REPORT_BYTES = 16 << 20


class Anywhere:
    """A URL of one of fsspec's file systems."""

    def __init__(self, url: str) -> None:
        self.url = url
        fsspec = needed("fsspec")
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ShippingError(
                f"Can't ship to {url}: {error}.", "Install the package that it names."
            ) from None

    def send(self, parcel: Parcel) -> str:
        """Write the patch last, so that whoever finds it finds its signatures, too."""
        try:
            parent = self._path.rpartition("/")[0]
            if parent and self._fs.protocol in ("file", ("file", "local")):
                self._fs.makedirs(parent, exist_ok=True)
            for suffix, data in parcel.beside.items():
                self._fs.pipe_file(self._path + suffix, data)
            self._fs.pipe_file(self._path, parcel.data)
        except Exception as error:  # every file system has its own
            raise _failed(f"Can't write {self.url}", error) from error
        return self.url

    def fetch(self) -> Parcel:
        """The file and those beside it."""
        data = self._read(self._path, MAX_FILE_BYTES)
        beside = {}
        for name in self._names()[:_MOST_BESIDE]:
            suffix = name[len(self._path) :]
            most = MAX_BUNDLE_BYTES if suffix.endswith(".sig") else MAX_REPORT_BYTES
            beside[suffix] = self._read(name, most)
        return Parcel(data, beside)

    def _names(self) -> list[str]:
        parent = self._path.rpartition("/")[0]
        try:
            found = [str(one) for one in self._fs.ls(parent, detail=False)]
        except Exception:  # it can't list, or may not
            return []
        return sorted(
            one
            for one in found
            if one.startswith(self._path) and BESIDE.fullmatch(one[len(self._path) :])
        )

    def _read(self, path: str, most: int) -> bytes:
        try:
            with self._fs.open(path, "rb") as file:
                data: bytes = _all_of(file, most)
        except Exception as error:
            raise _failed(f"Can't read {self.url}", error) from error
        if len(data) > most:
            raise ShippingError(
                f"{self.url} is larger than {most} bytes, the most that is read.",
                "Is that the right file?",
            )
        return data


def _all_of(file: Any, most: int) -> bytes:
    """Up to one byte more than ``most``; a stream may give less at a time than it is asked for."""
    parts, left = [], most + 1
    while left > 0 and (part := file.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _failed(what: str, error: Exception) -> ShippingError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return ShippingError(f"{what}: {reason}.", "Is it there, and may you? See docs/shipping.md.")
