from __future__ import annotations

import hashlib
import hmac
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from patcher.errors import BaseMismatchError, ModelError, UsageError
from patcher.kernels import column_digests, digest
from patcher.patch import (
    ModuleBase,
    check_module,
    commitment,
    files,
    module_base,
    owner_salt,
)

WEIGHT = torch.randn(4, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
BASE = module_base(WEIGHT)


def test_a_weight_is_named_by_shape_dtype_and_digests() -> None:
    assert BASE.shape == (4, 96)
    assert BASE.dtype == "bfloat16"
    assert BASE.digest == digest(WEIGHT)
    assert list(BASE.blocks) == column_digests(WEIGHT, 48)
    assert module_base(WEIGHT.t().contiguous().t()) == BASE


@pytest.mark.parametrize("weight", [WEIGHT.double(), WEIGHT[0], WEIGHT[:0], WEIGHT.to(torch.int8)])
def test_refuses_to_name_what_can_not_be_patched(weight: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="can't be patched"):
        module_base(weight)


def test_accepts_the_weight_and_its_shards() -> None:
    check_module("m", BASE, WEIGHT)
    for ranks in (2, 3, 4, 6, 8, 12, 16, 48):
        width = 96 // ranks
        for start in range(0, 96, width):
            check_module("m", BASE, WEIGHT[:, start : start + width], start)
            check_module("m", BASE, WEIGHT[:, start : start + width].clone(), start, start + width)


@pytest.mark.parametrize(
    ("weight", "start", "stop", "words"),
    [
        (WEIGHT + 1, 0, None, "not those"),
        (WEIGHT[:, :48], 48, None, "not those"),
        (WEIGHT[:, 48:], 0, None, "not those"),
        (WEIGHT.half(), 0, None, "served in float16, the patch was computed for bfloat16"),
        (WEIGHT.float(), 0, None, "served in float32"),
        (WEIGHT.t(), 0, None, "no part of"),
        (WEIGHT[:3], 0, None, "no part of"),
        (WEIGHT[0], 0, None, "no part of"),
        (WEIGHT, 1, None, "no part of"),
        (WEIGHT, 0, 48, "no part of"),
        (WEIGHT[:, :48], -48, None, "no part of"),
        (WEIGHT[:, :0], 0, None, "no part of"),
        (WEIGHT[:, :3], 0, None, "can't be checked.*48 blocks of 2"),
        (WEIGHT[:, 3:5], 3, None, "can't be checked"),
    ],
)
def test_refuses_other_weights(
    weight: torch.Tensor, start: int, stop: int | None, words: str
) -> None:
    with pytest.raises(BaseMismatchError, match=words) as caught:
        check_module("model.layers.0", BASE, weight, start, stop)
    assert "model.layers.0" in caught.value.message
    assert caught.value.cure


def test_one_wrong_value_in_a_shard_is_seen() -> None:
    shard = WEIGHT[:, 48:].clone()
    shard[3, 47] += 1
    with pytest.raises(BaseMismatchError, match="not those"):
        check_module("m", BASE, shard, 48)


def test_a_commitment_is_an_hmac_over_canonical_json() -> None:
    requests: list[dict[str, Any]] = [{"target": "b", "prompt": "a"}, {"prompt": "ü", "n": 1.0}]
    text = '[{"prompt":"a","target":"b"},{"n":1,"prompt":"ü"}]'.encode()
    assert commitment(requests, b"salt") == hmac.new(b"salt", text, hashlib.sha256).hexdigest()
    assert commitment(requests, b"salt") == commitment(
        [dict(reversed(r.items())) for r in requests], b"salt"
    )
    assert commitment(requests, b"salt") != commitment(requests, b"other")
    assert commitment(requests, b"salt") != commitment(requests[::-1], b"salt")
    with pytest.raises(ValueError, match="finite"):
        commitment([{"x": float("nan")}], b"salt")


@pytest.fixture
def salt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "new" / "salt"
    monkeypatch.setenv("PATCHER_SALT_FILE", str(path))
    return path


def test_the_salt_is_made_once_and_kept(salt_file: Path) -> None:
    salt = owner_salt()
    assert len(salt) == 32
    assert owner_salt() == salt == bytes.fromhex(salt_file.read_text())
    assert stat.S_IMODE(salt_file.stat().st_mode) == 0o600
    assert [p.name for p in salt_file.parent.iterdir()] == ["salt"]


def test_the_salt_lies_in_the_home_folder_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATCHER_SALT_FILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    owner_salt()
    assert (tmp_path / ".config/patcher/salt").is_file()


def test_all_who_ask_at_once_get_the_same_salt(salt_file: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        salts = list(pool.map(lambda _: owner_salt(), range(64)))
    assert len(set(salts)) == 1
    assert [p.name for p in salt_file.parent.iterdir()] == ["salt"]


def test_who_comes_second_takes_the_first_one_s_salt(
    salt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = files.write_new

    def overtaken(path: Path, data: bytes, mode: int) -> None:
        plain(path, data, mode)
        plain(salt_file, b"ab" * 32, 0o600)

    monkeypatch.setattr(files, "write_new", overtaken)
    assert owner_salt() == b"\xab" * 32
    assert [p.name for p in salt_file.parent.iterdir()] == ["salt"]


def test_refuses_a_salt_that_everybody_knows(salt_file: Path) -> None:
    owner_salt()
    salt_file.chmod(0o604)
    with pytest.raises(UsageError, match="Everybody"):
        owner_salt()


@pytest.mark.parametrize("text", ["", "ab", "g" * 64, "ab" * 33, "AB" * 32])
def test_refuses_a_malformed_salt(salt_file: Path, text: str) -> None:
    owner_salt()
    salt_file.write_text(text)
    with pytest.raises(UsageError, match="64 hex digits"):
        owner_salt()


def test_says_why_there_is_no_salt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for odd in (tmp_path / "file" / "salt", tmp_path):
        monkeypatch.setenv("PATCHER_SALT_FILE", str(odd))
        with pytest.raises(UsageError, match="salt file"):
            owner_salt()


def test_a_manifest_part_counts_its_blocks() -> None:
    fields = BASE.model_dump()
    with pytest.raises(ValueError, match="2 column blocks where 48 belong"):
        ModuleBase.model_validate(fields | {"blocks": fields["blocks"][:2]})
