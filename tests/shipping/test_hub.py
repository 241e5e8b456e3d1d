"""Patches on the Hugging Face Hub, which is here a small server that answers as it does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patcher.errors import UsageError
from patcher.shipping import pull
from tests.cli.running import COMMAND, environment
from tests.shipping.fake_hub import REPO, FakeHub, hub_in_memory
from tests.signing.reviewers import Reviewers
from tests.small_patch import small_patch

PLACE = f"hf://{REPO}/2026/p.st"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with hub_in_memory() as server:
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.st"
    small_patch().write(path)
    return path


def patcher(hub: FakeHub, folder: Path, *words: object, **more: str) -> tuple[int, Any]:
    """The command as a process, since the library reads the Hub's address as it is imported."""
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", **more,
    }  # fmt: skip
    command = [*COMMAND, *map(str, words), "--json"]
    done = subprocess.run(
        command, env=environment(settings), capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("lfs", [False, True])
def test_one_commit_there_and_back(hub: FakeHub, file: Path, tmp_path: Path, lfs: bool) -> None:
    hub.lfs, hub.token = lfs, "hf_secret"
    (tmp_path / "people").mkdir()
    alice = Reviewers(tmp_path / "people").bundle("alice", small_patch())
    file.with_name("p.st.alice.sig").write_bytes(alice)
    report = tmp_path / "r.json"
    report.write_text("{}")
    code, sent = patcher(
        hub, tmp_path, "push", file, PLACE, "--report", report, HF_TOKEN="hf_secret"
    )
    assert code == 0, sent
    assert len(hub.commits) == 2, "all in one commit"
    commit = hub.branches["main"]
    assert sent["url"] == f"{PLACE}@{commit}#sha256={small_patch().id}"
    hub.commits["1" * 40] = {"2026/p.st": small_patch(1).data}
    hub.branches["main"] = "1" * 40
    out = tmp_path / "q.st"
    code, got = patcher(hub, tmp_path, "pull", sent["url"], "-o", out, HF_TOKEN="hf_secret")
    assert (code, got["id"]) == (0, small_patch().id), "of that commit, not what is newest"
    assert got["beside"] == [f"{out}.alice.sig", f"{out}.report.json"]
    assert Path(f"{out}.alice.sig").read_bytes() == alice
    code, told = patcher(hub, tmp_path, "pull", PLACE, "-o", out, HF_TOKEN="hf_wrong")
    assert code == 14
    assert "hf_" not in told["error"]["message"]


def test_other_bytes_than_pinned_and_files_that_are_not_there(
    hub: FakeHub, file: Path, tmp_path: Path
) -> None:
    hub.commits["1" * 40] = {
        "2026/p.st": small_patch(1).data,
        "2026/cut.st": file.read_bytes()[:-1],
    }
    hub.branches["main"] = "1" * 40
    out = tmp_path / "q.st"
    assert patcher(hub, tmp_path, "pull", PLACE, "-o", out, "--id", small_patch().id)[0] == 3
    assert patcher(hub, tmp_path, "pull", f"hf://{REPO}/2026/cut.st", "-o", out)[0] == 3
    for missing in (f"hf://{REPO}/none.st", f"{PLACE}@no-such-branch", "hf://team/nothing/p.st"):
        code, told = patcher(hub, tmp_path, "pull", missing, "-o", out)
        assert (code, told["error"]["code"]) == (14, "not-shipped")
    assert not list(tmp_path.glob("*q.st*"))


def test_a_hub_that_sends_without_end(hub: FakeHub, file: Path, tmp_path: Path) -> None:
    hub.commits["1" * 40] = {"2026/p.st": small_patch().data, "2026/p.st.sig": b"x"}
    hub.branches["main"] = "1" * 40
    sent = 0

    def endless(request: Any) -> bool:
        nonlocal sent
        if not request.path.endswith(".sig"):
            return False
        request.answer(200, Content_Length=str(1 << 40))
        try:
            while sent < 64 << 20:
                sent += request.wfile.write(b"x" * (1 << 16))
        except OSError:
            request.close_connection = True
        return True

    hub.lie = endless
    code, told = patcher(hub, tmp_path, "pull", PLACE, "-o", tmp_path / "q.st")
    assert code == 14
    assert "larger than 262144 bytes" in told["error"]["message"]
    assert sent < 16 << 20


@pytest.mark.parametrize("name", [
    "team/p.st", "team/patches/", "team/patches/../../etc/p.st", "team/patches/a//p.st",
    "team/patches/.git/p.st", "buckets/team/patches/p.st?x=y", "team@v1/patches/p.st",
    "team/patches@v1/p.st@v2", "team/patches/p.st@", "team/pat%2fches/p.st",
])  # fmt: skip
def test_a_name_that_is_a_trick(name: str) -> None:
    with pytest.raises(UsageError, match="names no file"):
        pull(f"hf://{name}")
