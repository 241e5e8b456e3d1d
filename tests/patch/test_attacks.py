"""Files made to harm: each is refused, as an invalid patch and as nothing else."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.errors import FormatVersionError, InvalidPatchError
from patcher.patch import Patch, container

from . import making
from .making import M, N, dumped, fields, file_of, floats, honest, packed, parts, with_manifest

GOOD = making.small().data
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


def refused(data: bytes, words: str = ".") -> InvalidPatchError:
    with pytest.raises(InvalidPatchError, match=words) as caught:
        Patch.from_bytes(data)
    assert caught.value.message
    assert caught.value.cure
    return caught.value


# -- bytes ---------------------------------------------------------------------------------------


def test_cuts_the_file_anywhere() -> None:
    for length in range(len(GOOD)):
        refused(GOOD[:length])


def test_adds_bytes_at_the_end() -> None:
    refused(GOOD + b"\0", "1 bytes after its last tensor")


def test_changes_any_byte_of_the_header() -> None:
    # Some changes make another sound file (another title); no change passes for the same.
    end = len(GOOD) - len(parts(GOOD)[1])
    original = Patch.from_bytes(GOOD)
    for place in range(end):
        for change in (0x01, 0x20, 0x80, 0xFF):
            data = bytearray(GOOD)
            data[place] ^= change
            try:
                patch = Patch.from_bytes(bytes(data))
            except InvalidPatchError:
                continue
            assert patch.id != original.id
            assert patch.manifest != original.manifest


def test_changes_bits_of_a_value() -> None:
    for place in range(len(GOOD) - len(parts(GOOD)[1]), len(GOOD)):
        data = bytearray(GOOD)
        data[place] ^= 1
        assert Patch.from_bytes(bytes(data)).id != making.small().id


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_sends_noise(data: bytes) -> None:
    refused(data)


@settings(max_examples=300)
@given(ANYTHING)
def test_sends_any_json_as_header_or_manifest(value: Any) -> None:
    refused(packed(json.dumps(value).encode(), b""))
    refused(with_manifest(json.dumps(value)))


@settings(max_examples=200)
@given(st.sampled_from(sorted(fields())), ANYTHING)
def test_puts_anything_into_any_field(name: str, value: Any) -> None:
    changed = fields() | {name: value}
    try:
        patch = Patch.from_bytes(with_manifest(changed))
    except InvalidPatchError:
        return
    assert json.loads(patch.manifest.canonical())[name] == value


@pytest.mark.parametrize("length", [0, 1, 2, len(GOOD), 2**24 + 1, 2**32, 2**63, 2**64 - 1])
def test_lies_about_the_header_length(length: int) -> None:
    refused(struct.pack("<Q", length) + GOOD[8:])


def test_sends_more_than_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_FILE_BYTES", len(GOOD) - 1)
    refused(GOOD, "larger than")


def test_sends_a_header_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", int.from_bytes(GOOD[:8], "little") - 1)
    refused(GOOD, "header length is out of bounds")


# -- the header's JSON ---------------------------------------------------------------------------


def test_names_a_tensor_twice() -> None:
    header, body = parts(GOOD)
    text = dumped(header)[:-1] + b"," + dumped(f"{M}.L") + b":" + dumped(header[f"{M}.L"]) + b"}"
    refused(packed(text, body), "twice")


def test_gives_the_metadata_twice() -> None:
    header, body = parts(GOOD)
    text = b'{"__metadata__":{"patcher":"{}"},' + dumped(header)[1:]
    refused(packed(text, body), "twice")


def test_nests_the_header_deeply() -> None:
    refused(packed(b"[" * 100_000 + b"]" * 100_000, b""), "deeper")
    refused(packed(b'{"a":' * 50 + b"1" + b"}" * 50, b""), "deeper")


def test_hides_brackets_in_strings() -> None:
    refused(packed(dumped({"a": "[" * 1000, '\\"[[[': 1}), b""), "no patch manifest")


def test_leaves_a_string_open_among_brackets() -> None:
    began = time.monotonic()
    refused(packed(b'{"' + b"[" * 1_000_000, b""))
    refused(packed(b'{"a":"' + b'\\"' * 1_000_000, b""))
    refused(packed(b'"\\' * 1_000_000, b""))
    assert time.monotonic() - began < 20  # hours, where each quote is tried as a string's begin


NO_OBJECTS = [b"\xff\xfe", b'{"a":NaN}', b'{"a":Infinity}', b"[]", b"1", b'"x"', b"", b"{'a':1}"]
NO_OBJECTS += [b'{"a":' + b"9" * 5000 + b"}", b'{"a":1,}', b"\xef\xbb\xbf{}"]


@pytest.mark.parametrize("text", NO_OBJECTS)
def test_sends_a_header_that_is_no_object(text: bytes) -> None:
    refused(packed(text, b""))


def test_formats_the_header_otherwise() -> None:
    header, body = parts(GOOD)
    others = [
        json.dumps(header).encode(),
        json.dumps(header, sort_keys=True).encode(),
        b" " + dumped(header),
        dumped(header) + b"        ",
        dumped(dict(reversed(header.items()))),
        dumped(header).replace(b'"F32"', b'"\\u004632"'),
    ]
    for text in others:
        refused(packed(text, body))


def test_pads_the_header_otherwise() -> None:
    header, body = parts(GOOD)
    text = dumped(header)
    if len(text) % 8 == 0:
        text += b" "
    refused(len(text).to_bytes(8, "little") + text + body, "one form")


@pytest.mark.parametrize(
    "metadata", [None, {}, {"other": "x"}, {"patcher": 1}, {"patcher": None}, [], "x"]
)
def test_leaves_out_the_manifest(metadata: Any) -> None:
    header, body = parts(GOOD)
    header["__metadata__"] = metadata
    refused(packed(header, body), "no patch manifest")


def test_is_some_other_safetensors_file() -> None:
    header, body = parts(GOOD)
    del header["__metadata__"]
    refused(packed(header, body), "no patch manifest")


def test_adds_metadata_beside_the_manifest() -> None:
    header, body = parts(GOOD)
    header["__metadata__"]["format"] = "pt"
    refused(packed(header, body), "beside the manifest")


# -- tensors -------------------------------------------------------------------------------------


def changed(name: str, **entry: Any) -> bytes:
    header, body = parts(GOOD)
    header[name] = header[name] | entry
    return packed(header, body)


@pytest.mark.parametrize(
    "dtype", ["F64", "I32", "U8", "F8_E4M3", "BOOL", "f32", "", 4, None, ["F32"], {}]
)
def test_uses_another_dtype(dtype: Any) -> None:
    refused(changed(f"{M}.L", dtype=dtype), "not F32, BF16 or F16")


SHAPES = [[], [8], [4, 2, 1], [4.0, 2], [4, True], ["4", 2], [-4, -2], [4, 2**70], None, 8]
SHAPES += [{"0": 4}, [2**31, 2**31], [0, 2], [2, 4], [4, 3]]


@pytest.mark.parametrize("shape", SHAPES)
def test_gives_another_shape(shape: Any) -> None:
    refused(changed(f"{M}.L", shape=shape))


OFFSETS = [[0, 31], [0, 33], [1, 33], [32, 0], [-32, 0], [0, 2**70], [0.0, 32], [False, 32], [0]]
OFFSETS += [[], None, "0:32", [8, 40], [32, 64]]


@pytest.mark.parametrize("offsets", OFFSETS)
def test_gives_other_offsets(offsets: Any) -> None:
    refused(changed(f"{M}.L", data_offsets=offsets))


def test_lays_tensors_over_each_other() -> None:
    header, body = parts(GOOD)
    header[f"{M}.R"]["data_offsets"] = header[f"{M}.L"]["data_offsets"]
    refused(packed(header, body), "overlap")


def test_leaves_a_hole_between_tensors() -> None:
    header, body = parts(GOOD)
    for entry in list(header.values())[2:]:
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    refused(packed(header, body[:32] + b"\0" * 8 + body[32:]), "hole")


@pytest.mark.parametrize("entry", [None, [], "x", {}, {"dtype": "F32"}])
def test_sends_a_malformed_entry(entry: Any) -> None:
    header, body = parts(GOOD)
    header[f"{M}.L"] = entry
    refused(packed(header, body), "malformed")


def test_adds_a_field_to_an_entry() -> None:
    refused(changed(f"{M}.L", note="x"), "malformed")


def test_orders_the_tensors_otherwise() -> None:
    tensors = honest()
    refused(file_of(dict(reversed(tensors.items()))), "order")
    refused(file_of(dict(sorted(tensors.items(), key=lambda item: item[1][0]))), "order")


@pytest.mark.parametrize(
    "name", ["extra", "extra.L", f"{M}.C", f"{M}.l", f"{M}.", ".L", "", M, f"{M}.L.L"]
)
def test_adds_a_tensor(name: str) -> None:
    tensors = honest() | {name: ("F32", (1, 1), floats(1.0))}
    order = {"F32": 0, "BF16": 1}
    ordered = sorted(tensors.items(), key=lambda item: (order[item[1][0]], item[0]))
    refused(file_of(dict(ordered)), "belongs to no module|neither L with R")


def test_names_a_tensor_at_length() -> None:
    refused(file_of(honest() | {"x" * 300: ("BF16", (1, 1), b"\0\0")}), "too long")


@pytest.mark.parametrize("name", [f"{M}.L", f"{M}.R", f"{N}.A", f"{N}.B"])
def test_leaves_out_a_tensor(name: str) -> None:
    tensors = honest()
    del tensors[name]
    refused(file_of(tensors), "neither L with R")


def test_leaves_out_all_tensors_of_a_module() -> None:
    refused(file_of({k: v for k, v in honest().items() if k.startswith(M)}), "has no tensors")
    refused(file_of({}), "has no tensors")


def test_mixes_the_kinds_within_a_module() -> None:
    tensors = honest()
    mixed = {f"{M}.B": tensors[f"{M}.R"], f"{M}.L": tensors[f"{M}.L"]}
    rest = {k: v for k, v in tensors.items() if k.startswith(N)}
    refused(file_of(mixed | rest), "neither L with R")
    both = {f"{M}.A": tensors[f"{M}.L"], f"{M}.B": ("F32", (2, 6), floats(*[1] * 12))}
    refused(file_of(both | {k: v for k, v in tensors.items() if k.startswith(M)} | rest), "neither")


def test_mixes_dtypes_within_a_module() -> None:
    tensors = honest()
    tensors[f"{M}.R"] = ("BF16", (2, 4), b"\0" * 16)
    order = {"F32": 0, "BF16": 1}
    ordered = sorted(tensors.items(), key=lambda item: (order[item[1][0]], item[0]))
    refused(file_of(dict(ordered)), "different dtypes")


@pytest.mark.parametrize(
    ("left", "right"),
    [((4, 3), (2, 4)), ((5, 2), (2, 5)), ((4, 2), (2, 6)), ((4, 0), (0, 4)), ((4, 5), (5, 4))],
)
def test_sends_matrices_that_do_not_fit_the_weight(
    left: tuple[int, int], right: tuple[int, int]
) -> None:
    tensors = honest()
    tensors[f"{M}.L"] = ("F32", left, b"\0" * 4 * left[0] * left[1])
    tensors[f"{M}.R"] = ("F32", right, b"\0" * 4 * right[0] * right[1])
    refused(file_of(tensors), "do not fit|beyond its weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7])
def test_hides_a_value_that_is_not_finite(value: float, place: int) -> None:
    tensors = honest()
    values = [1.0] * 8
    values[place] = value
    tensors[f"{M}.R"] = ("F32", (2, 4), floats(*values))
    refused(file_of(tensors), "not finite")


NARROW = [("BF16", 0x7F80), ("BF16", 0x7F81), ("BF16", 0xFFC0)]
NARROW += [("F16", 0x7C00), ("F16", 0x7C01), ("F16", 0xFC00)]


@pytest.mark.parametrize(("dtype", "bits"), NARROW)
def test_hides_one_in_a_narrow_dtype(dtype: str, bits: int) -> None:
    tensors = {k: v for k, v in honest().items() if k.startswith(M)}
    narrow = {name: (dtype, shape, struct.pack("<H", bits) * (shape[0] * shape[1]))
              for name, (_, shape, _) in tensors.items()}  # fmt: skip
    one = fields()
    del one["base"]["modules"][N]
    refused(file_of(narrow, json.dumps(one, separators=(",", ":"), sort_keys=True)), "not finite")


def test_subnormal_values_are_no_attack() -> None:
    tensors = honest()
    tensors[f"{M}.R"] = ("F32", (2, 4), floats(*[1e-45] * 8))
    assert Patch.from_bytes(file_of(tensors)).deltas[M].right[0, 0] > 0


# -- the manifest --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2, 3, 10**9, -1])
def test_claims_another_format(number: int) -> None:
    error = refused(with_manifest(fields() | {"format": number}), "format")
    assert isinstance(error, FormatVersionError)


def test_claims_another_format_with_other_rules() -> None:
    header, body = parts(GOOD)
    header["__metadata__"] = {"patcher": '{ "format": 2, "new": [] }', "more": "x"}
    assert isinstance(refused(packed(header, body)), FormatVersionError)


@pytest.mark.parametrize("number", [None, True, "1", 1.5, [1], {}])
def test_claims_no_format(number: Any) -> None:
    refused(with_manifest(fields() | {"format": number}), "names no format")


def test_needs_a_field_that_this_version_lacks() -> None:
    changed_fields = fields() | {"critical": ["layout"], "layout": "transposed"}
    assert isinstance(refused(with_manifest(changed_fields), "layout"), FormatVersionError)


@pytest.mark.parametrize("name", sorted(fields()))
def test_leaves_out_a_field(name: str) -> None:
    less = fields()
    del less[name]
    refused(with_manifest(less))


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "1", '"x"', "\ud83d" "x".encode("utf-8", "replace").decode(),
    '{"format":1,"format":1}', '{"format":NaN}', '{"format":' + "[" * 100 + "]" * 100 + "}",
])  # fmt: skip
def test_sends_a_manifest_that_is_none(text: str) -> None:
    refused(with_manifest(text))


def test_escapes_half_a_surrogate_pair() -> None:
    header, body = parts(GOOD)
    text = dumped(header).replace(b"small", rb"\\ud800")
    refused(packed(text, body))
    refused(packed(dumped(header).replace(b"__metadata__", rb"\ud800"), body))
    header["__metadata__"]["patcher"] = "HERE"
    refused(packed(dumped(header).replace(b"HERE", rb"\ud800"), body))


@pytest.mark.parametrize("change", [
    lambda text: text.replace('"title"', ' "title"'),
    lambda text: text.replace("small", "\\u0073mall"),
    lambda text: text.replace("0.5", "0.50"),
    lambda text: text.replace("0.5", "5e-1"),
    lambda text: text.replace('"count":2', '"count":2.0'),
    lambda text: text.replace('"format":1', '"format":1.0'),
    lambda text: text + "\n",
    lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")),
])  # fmt: skip
def test_writes_the_manifest_in_another_form(change: Any) -> None:
    text = making.small().manifest.canonical().decode()
    assert change(text) != text
    refused(with_manifest(change(text)))


def at(path: str, value: Any) -> dict[str, Any]:
    """The small patch's manifest with one field, given by its path, changed."""
    result = fields()
    *steps, last = path.replace("@", M.replace(".", "!")).split(".")
    target = result
    for step in steps:
        target = target[step.replace("!", ".")]
    target[last.replace("!", ".")] = value
    return result


HEX = "0f" * 32


WRONG: dict[str, list[Any]] = {
    "title": [1, None, "x" * 1025, "\x1b[31m", "a\u202eb", "a\n"],
    "created": [
        "2026-01-31",
        "2026-01-31T12:00:00+00:00",
        "2026-02-30T12:00:00Z",
        "２026-01-31T12:00:00Z",
        0,
    ],
    "tool": [[], "\x00"],
    "base": [{}, None],
    "base.model": [1],
    "base.architecture": [None],
    "base.modules": [{}, []],
    "base.modules.@": [None],
    "base.modules.@.shape": [
        [4],
        [4, 6, 1],
        [4, 0],
        [True, 6],
        [4.5, 6],
        ["4", 6],
        [6, 4],
        [2**25, 6],
    ],
    "base.modules.@.dtype": ["float64", "bf16", None],
    "base.modules.@.digest": [HEX[:-1], HEX.upper(), HEX + "\n", "g" * 64, "٣" * 64],
    "base.modules.@.blocks": [[], [HEX] * 5, [HEX] * 7, [1] * 6, HEX],
    "method": ["zero"],
    "method.name": ["\t"],
    "method.hyperparameters": [[], None, {"a": 2**53 + 1}],
    "requests": [None],
    "requests.count": [-1, True, 1.5, "2", 2**53],
    "requests.commitment": ["x", None],
    "requires": [[HEX, HEX], ["abcd"], HEX, None],
    "conflicts": [{}, [None]],
    "evaluation": [[], 1],
    "critical": ["title", [1], None, ["title", "title"]],
}


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in WRONG.items() for value in values]
)
def test_puts_something_wrong_into_the_manifest(path: str, value: Any) -> None:
    refused(with_manifest(at(path, value)), "manifest")


@pytest.mark.parametrize("name", [
    "", ".", "a..b", ".a", "a.", "a b", "a/b", "../a", "a-b", "ä.b", "а.b", "a\u200b", "a\n",
    "a" * 257, "a\0b", "a;b",
])  # fmt: skip
def test_names_a_module_oddly(name: str) -> None:
    changed_fields = fields()
    modules = changed_fields["base"]["modules"]
    modules[name] = modules.pop(M)
    refused(with_manifest(changed_fields), "manifest is malformed")


def test_requires_what_it_conflicts_with() -> None:
    refused(with_manifest(fields() | {"requires": [HEX], "conflicts": [HEX]}), "same patch")


def test_floods_the_manifest() -> None:
    ids = [f"{number:064x}" for number in range(4097)]
    refused(with_manifest(fields() | {"requires": ids}), "requires")
    many = fields()
    many["base"]["modules"] |= {f"m{number}": many["base"]["modules"][M] for number in range(4096)}
    refused(with_manifest(many), "modules")
    refused(with_manifest(at("method.hyperparameters", json.loads("[" * 30 + "]" * 30))))


def test_numbers_that_are_not_finite_do_not_get_in() -> None:
    text = making.small().manifest.canonical().decode()
    refused(with_manifest(text.replace("0.5", "1e999")), "not finite")
    refused(with_manifest(text.replace("0.5", "NaN")), "NaN")


def test_the_error_does_not_repeat_what_the_file_says() -> None:
    error = refused(with_manifest(at("title", "secret\x1b[2J")))
    assert "secret" not in str(error)
    assert str(refused(changed(f"{M}.L", dtype="\x1b[2J"))).isprintable()
