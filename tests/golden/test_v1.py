"""Files of format 1 stay readable, and stay what is written. Never change them; add."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from patcher.patch import Patch

from .make_v1 import FOLDER, expectations, patches

EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
names = pytest.mark.parametrize("name", sorted(EXPECTED))


def test_every_golden_file_is_expected() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(EXPECTED) == set(patches())


@names
def test_the_reader_finds_what_was_written(name: str) -> None:
    path = FOLDER / f"{name}.safetensors"
    patch = Patch.read(path)
    assert expectations(patch) == EXPECTED[name]
    assert patch.id == hashlib.sha256(path.read_bytes()).hexdigest()


@names
def test_the_writer_makes_the_same_bytes(name: str) -> None:
    assert patches()[name].data == (FOLDER / f"{name}.safetensors").read_bytes()


@names
def test_reading_and_building_again_gives_the_same_bytes(name: str) -> None:
    patch = Patch.read(FOLDER / f"{name}.safetensors")
    assert Patch.build(patch.manifest, patch.deltas) == patch
