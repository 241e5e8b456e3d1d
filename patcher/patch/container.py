"""The container: safetensors, read strictly and written in one form only.

A file is 8 bytes of header length, a JSON header padded with spaces to a multiple
of 8, then the tensors' bytes. The reader checks everything against the buffer
before it takes anything out of it, and refuses a header that differs by a byte
from what the writer makes of the same content, so that one content has one id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidPatchError
from . import canonical

MAX_FILE_BYTES = 1 << 29  # SQLite, which stores patches, holds values up to 10^9 bytes
MAX_HEADER_BYTES = 16 << 20
MAX_TENSOR_NAME = 260
METADATA_KEY = "patcher"
# In the order that safetensors lays tensors out: by dtype, then by name.
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_ORDER = {dtype: place for place, dtype in enumerate(ITEM_BYTES)}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: ``data`` holds its row-major little-endian bytes."""

    name: str
    dtype: str
    shape: tuple[int, int]
    data: bytes | memoryview


@dataclass(frozen=True)
class Header:
    """A header whose JSON is sound, its entries not yet checked.

    ``manifest``: its text in UTF-8, as a string of one wide character takes four times as much.
    """

    raw: bytes
    manifest: bytes
    others: int  # metadata beside the manifest
    entries: dict[str, Any]
    body: memoryview


def damaged(cause: str, cure: str = "") -> InvalidPatchError:
    """The error for a file that is not as the format asks."""
    return InvalidPatchError(
        cause, cure or "Fetch the file again, or compute the patch again; nothing was changed."
    )


def encode(manifest: bytes, tensors: Sequence[Tensor]) -> bytes:
    """The bytes of a file; the same content gives the same bytes."""
    ordered = sorted(tensors, key=lambda t: (_ORDER[t.dtype], t.name))
    return b"".join([_preamble(manifest, ordered), *(t.data for t in ordered)])


def read_header(data: bytes) -> Header:
    """The header of a file, with its metadata, before its tensors are looked at.

    Raises:
        InvalidPatchError: too short, too long, no JSON, no manifest.
    """
    if len(data) < 8:
        raise damaged(f"The file is cut off: {len(data)} bytes are no patch.")
    if len(data) > MAX_FILE_BYTES:
        raise damaged(f"The file is larger than {MAX_FILE_BYTES} bytes, the most that is read.")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise damaged("The file's header length is out of bounds: this is no patch file.")
    if 8 + length > len(data):
        raise damaged("The file is cut off within its header.")
    raw = data[8 : 8 + length]
    try:
        entries = canonical.loads(raw)
    except ValueError as error:
        raise damaged(f"The file's header can't be read: {error}.") from None
    if not isinstance(entries, dict):
        raise damaged("The file's header is not a JSON object.")
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        raise damaged("The file carries no patch manifest.", "Give a file made by patcher.")
    try:
        manifest = metadata.pop(METADATA_KEY).encode()
    except UnicodeEncodeError:
        raise damaged("The file's manifest has text with half a surrogate pair.") from None
    return Header(raw, manifest, len(metadata), entries, memoryview(data)[8 + length :])


def read_tensors(header: Header) -> dict[str, Tensor]:
    """The tensors of a file, as views of its own bytes.

    Raises:
        InvalidPatchError: an entry that is off, data with holes, overlaps or a
            trailing part, a header in another form than the writer's.
    """
    if header.others:
        raise damaged("The file has metadata beside the manifest.")
    tensors: list[Tensor] = []
    end = 0
    for name, entry in header.entries.items():
        tensor = _tensor(name, entry, end, header.body)
        end += len(tensor.data)
        tensors.append(tensor)
    if end != len(header.body):
        raise damaged(f"The file has {len(header.body) - end} bytes after its last tensor.")
    if _preamble(header.manifest, tensors)[8:] != header.raw:
        raise damaged("The file's header is not in the one form that the format has.")
    if [t.name for t in sorted(tensors, key=lambda t: (_ORDER[t.dtype], t.name))] != [
        t.name for t in tensors
    ]:
        raise damaged("The file's tensors are not in the order that the format has.")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, entry: Any, begin: int, body: memoryview) -> Tensor:
    shown = ascii(name[:80])[:80]
    if len(name) > MAX_TENSOR_NAME:
        raise damaged(f"The tensor name {shown} is too long.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(f"The header's entry for the tensor {shown} is malformed.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise damaged(f"The tensor {shown} is of dtype {ascii(dtype)[:40]}, not F32, BF16 or F16.")
    if not _two_integers(shape) or not _two_integers(offsets):
        raise damaged(f"The tensor {shown} has no proper shape or offsets.")
    size = shape[0] * shape[1] * ITEM_BYTES[dtype]
    if offsets[0] != begin or offsets[1] != begin + size:
        raise damaged(f"The bytes of the tensor {shown} overlap others, leave a hole, or misfit.")
    if begin + size > len(body):
        raise damaged(f"The file is cut off within the tensor {shown}.")
    return Tensor(name, dtype, (shape[0], shape[1]), body[begin : begin + size])


def _two_integers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(item) is int and 0 <= item <= MAX_FILE_BYTES for item in value)
    )


def _preamble(manifest: bytes, tensors: Sequence[Tensor]) -> bytes:
    """The header and its length; ``manifest`` is canonical, so it has no control characters."""
    entries: dict[str, Any] = {}
    begin = 0
    for tensor in tensors:
        end = begin + len(tensor.data)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    try:
        rest = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise damaged("The file's header has text with half a surrogate pair.") from None
    quoted = manifest.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    head = b'{"__metadata__":{"%s":"' % METADATA_KEY.encode()
    text = b"".join([head, quoted, b'"}', b"," if entries else b"", rest[1:]])
    text += b" " * (-len(text) % 8)  # the tensors' bytes begin on a multiple of 8
    return len(text).to_bytes(8, "little") + text
