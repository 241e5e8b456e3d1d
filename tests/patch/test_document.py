"""docs/format.md says what the code does: its bounds and its worked example."""

from __future__ import annotations

import re
from pathlib import Path

from patcher.patch import Patch, bounds, canonical, container, manifest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


def test_the_worked_example_is_the_golden_file() -> None:
    data = (ROOT / "tests/golden/v1/multiplicative.safetensors").read_bytes()
    patch = Patch.from_bytes(data)
    assert f"{len(data):,} bytes, id\n`{patch.id}`" in TEXT
    assert f"`{data[:8].hex(' ')}`" in TEXT
    body = data[8 + int.from_bytes(data[:8], "little") :]
    shown = "".join(re.findall(r"^    [LR ]  ((?:[0-9a-f]{8} )+) ", TEXT, re.MULTILINE))
    assert shown.replace(" ", "") == body.hex()


def test_the_bounds_are_those_of_the_code() -> None:
    assert container.MAX_FILE_BYTES == 2**29
    assert container.MAX_HEADER_BYTES == 2**24
    assert manifest.MAX_DIMENSION == 2**24
    for what, most in [
        ("tensor name", f"{container.MAX_TENSOR_NAME} characters"),
        ("modules", f"{manifest.MAX_MODULES:,}"),
        ("nesting of JSON", f"{canonical.MAX_DEPTH} levels"),
        ("digits of an integer", f"{canonical.MAX_DIGITS}"),
        ("characters of another number", f"{canonical.MAX_NUMBER}"),
        ("values in a JSON text", f"{canonical.MAX_VALUES:,}"),
        ("gain of a multiplicative delta", f"{bounds.MAX_GAIN:,.0f}"),
        ("spectral norm of an additive delta", f"{bounds.MAX_SPECTRAL_NORM:,.0f}"),
    ]:
        assert f"| {what} | {most} |" in TEXT


def test_every_field_of_the_manifest_is_described() -> None:
    for name in manifest.Manifest.model_fields:
        assert f"`{name}`" in TEXT or f"`{name}." in TEXT
