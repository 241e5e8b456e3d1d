"""Strangers' patch files, made by changing others where it hurts, and what must hold of each.

Blind changes seldom get past the header's length and its one form. These know the container, and
mend what a change would break before the reader comes to what it was meant for. Shared by the
suite (hypothesis) and ``bench/fuzz.py`` (atheris), which brings a scrambler that knows coverage.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from patcher.errors import InvalidPatchError
from patcher.patch import Patch, canonical
from tests.golden.make_v1 import FOLDER

from .making import packed, parts

CORPUS = Path(__file__).parent / "corpus"
Scramble = Callable[[bytes], bytes]
MOST = 1 << 16  # bytes that a change makes a tensor of
WIDTH = {"F32": "I", "BF16": "H", "F16": "H"}
#: NaN, infinity, largest, smallest, one, minus zero of each stored dtype, as bits.
BITS = {
    "F32": (0x7FC00000, 0xFF800000, 0x7F7FFFFF, 1, 0x3F800000, 0x80000000, 0x44800000),
    "BF16": (0x7FC0, 0xFF80, 0x7F7F, 1, 0x3F80, 0x8000, 0x4480),
    "F16": (0x7E00, 0xFC00, 0x7BFF, 1, 0x3C00, 0x8000, 0x6400),
}
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 33, 2**24, 2**24 + 1, 2**31, 2**53 - 1, 2**53, 2**63, 2**64,
    -0.0, 0.5, 1e21, 1e300, 5e-324, float("nan"), float("inf"), "", "a", "é", "\ud800", "\x00",
    "\x1b[2J", "\u202e", "\U0001f600", "x" * 300, "y" * 2000, "0" * 64, "0f" * 32, "F32", "BF16",
    "F16", "F64", "2026-01-31T12:00:00Z", "2026-02-30T12:00:00Z", "a.b", "__metadata__", "patcher",
    "format", "critical", "bfloat16", [], {}, [0, 0], [1, 2**24], [[[]]], {"": {}}, {"patcher": ""},
)  # fmt: skip


def seeds() -> list[bytes]:
    """The golden files and the kept corpus, in one order."""
    paths = [*sorted(FOLDER.glob("*.safetensors")), *sorted(CORPUS.glob("*"))]
    return [path.read_bytes() for path in paths if path.is_file()]


def holds(data: bytes) -> bool:
    """Whether ``data`` is a patch; raises where the reader does anything but read or refuse it."""
    try:
        patch = Patch.from_bytes(data)
    except InvalidPatchError as error:  # FormatVersionError is one
        _check_refusal(error)
        return False
    again = Patch.build(patch.manifest, patch.deltas)
    assert again.data == data == patch.data, "what was read is written otherwise"
    return True


def _check_refusal(refusal: InvalidPatchError) -> None:
    text = str(refusal)
    assert refusal.message, "a refusal without a cause"
    assert refusal.cure, "a refusal without a cure"
    assert text.isprintable(), f"a refusal that could write to a terminal: {text!a}"
    assert len(text) < 2000, "a refusal as long as the file"


def mutate(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    """``data``, or one time in three a golden file, changed in one to three ways."""
    if draw.random() < 0.33:
        data = draw.choice(_GOLDEN)  # what coverage keeps is mostly small and refused
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change = draw.choice(_CHANGES)
        try:
            data = change(data, draw, scramble)
        except (ValueError, LookupError, TypeError, AttributeError, struct.error):
            data = scramble(data)  # no container any more
    return data


def noise(draw: Random) -> Scramble:
    """A scrambler without coverage: some bytes changed, cut out or doubled."""

    def scramble(data: bytes) -> bytes:
        found = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            place = draw.randint(0, len(found))
            match draw.randrange(4):
                case 0:
                    found[place : place + 1] = bytes([draw.randrange(256)])
                case 1:
                    del found[place : place + draw.randint(1, 9)]
                case 2:
                    found[place:place] = found[place : place + draw.randint(1, 9)]
                case _:
                    found[place:place] = draw.choice((b'"', b"\\", b"[", b"{", b",", b"0", b"\xff"))
        return bytes(found)

    return scramble


def _anything(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    return scramble(data)


def _length(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    other = draw.choice((0, 1, length - 1, length + 1, length + 8, 2**24, 2**32, 2**64 - 1))
    return struct.pack("<Q", other % 2**64) + data[8:]


def _header_text(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    text = scramble(data[8 : 8 + length])
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _header_node(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    header, body = parts(data)
    return packed(_node(header, draw), body)


def _manifest_text(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    header, body = parts(data)
    text = scramble(header["__metadata__"]["patcher"].encode())
    header["__metadata__"]["patcher"] = text.decode("utf-8", "replace")
    return packed(header, body)


def _manifest_node(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    header, body = parts(data)
    fields = _node(json.loads(header["__metadata__"]["patcher"]), draw)
    try:
        text = canonical.dumps(fields).decode()
    except ValueError:
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    header["__metadata__"]["patcher"] = text
    return packed(header, body)


def _module(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    """Rename a module, or take it out, in the manifest and in the tensors alike."""
    header, body = parts(data)
    fields = json.loads(header["__metadata__"]["patcher"])
    modules = fields["base"]["modules"]
    old, new = draw.choice(sorted(modules)), draw.choice(("a", "m.0", "Z_", "x" * 256, "ü", ""))
    modules[new] = modules.pop(old)
    header = {name.replace(old, new): entry for name, entry in header.items()}
    header["__metadata__"]["patcher"] = canonical.dumps(fields).decode()
    return packed(header, body)


def _values(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    """Odd numbers in a tensor, or all of it the same one."""
    header, body = parts(data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    dtype, (begin, end) = header[name]["dtype"], header[name]["data_offsets"]
    item = struct.pack("<" + WIDTH[dtype], draw.choice(BITS[dtype]))
    if draw.random() < 0.3:
        part = item * (len(body[begin:end]) // len(item))
    else:
        place = draw.randrange((end - begin) // len(item)) * len(item)
        part = body[begin:end][:place] + item + body[begin:end][place + len(item) :]
    return packed(header, body[:begin] + part + body[end:])


def _tensors(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    """Another shape, dtype or order of the tensors, with offsets and bytes that follow it."""
    header, body = parts(data)
    meta = header.pop("__metadata__")
    rank, dtype = draw.choice((None, 0, 1, 2, 3, 40)), draw.choice((None, "F32", "BF16", "F16"))
    entries = list(header.items())
    if draw.random() < 0.2:
        draw.shuffle(entries)
    result: dict[str, Any] = {"__metadata__": meta}
    blob = b""
    for name, entry in entries:
        rows, columns = entry["shape"]
        if rank is not None:
            rows, columns = (rank, columns) if name[-1] in "RB" else (rows, rank)
        kept = dtype or entry["dtype"]
        size = rows * columns * struct.calcsize(WIDTH[kept])
        if not 0 <= size <= MOST:
            raise ValueError("a stranger's own size")
        old = body[slice(*entry["data_offsets"])] or b"\0"
        result[name] = {"dtype": kept, "shape": [rows, columns]}
        result[name]["data_offsets"] = [len(blob), len(blob) + size]
        blob += (old * (1 + size // len(old)))[:size]
    return packed(result, blob)


def _body(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    header, body = parts(data)
    return packed(header, scramble(body))


def _crossed(data: bytes, draw: Random, scramble: Scramble) -> bytes:
    """One file's manifest or tensors over another's."""
    header, body = parts(data)
    other, others = parts(draw.choice(_GOLDEN))
    if draw.random() < 0.5:
        header["__metadata__"] = other["__metadata__"]
        return packed(header, body)
    return packed({**header, **other}, body + others)


def _node(tree: Any, draw: Random) -> Any:
    """``tree`` with one of its nodes replaced, taken out, doubled, or something put beside it."""
    places: list[tuple[Any, Any]] = []
    queue = [tree]
    while queue:
        here = queue.pop()
        for key in list(here) if isinstance(here, dict) else range(len(here)):
            places.append((here, key))
            if isinstance(here[key], dict | list):
                queue.append(here[key])
    if not places:
        return draw.choice(ODD)
    parent, key = draw.choice(places)
    match draw.randrange(5):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[str(draw.choice(ODD))] = draw.choice(ODD)
        case 1 | 2 if isinstance(parent, list):
            parent.insert(key, parent[key])
        case 3:
            source, other = draw.choice(places)
            held = source[other] if isinstance(source, list) else source.get(other)
            parent[key] = json.loads(json.dumps(held))
        case _:
            parent[key] = draw.choice(ODD)
    return tree


_GOLDEN = [path.read_bytes() for path in sorted(FOLDER.glob("*.safetensors"))]
_CHANGES = (
    _anything, _length, _header_text, _header_node, _manifest_text, _manifest_node, _manifest_node,
    _manifest_node, _module, _values, _values, _tensors, _tensors, _body, _crossed,
)  # fmt: skip
