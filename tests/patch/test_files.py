from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from patcher.errors import InvalidPatchError, UsageError
from patcher.patch import Patch, container, files

from . import making


def test_writes_and_reads(tmp_path: Path) -> None:
    path = tmp_path / "p.st"
    making.small().write(path)
    assert path.read_bytes() == making.small().data
    assert Patch.read(path) == making.small() == Patch.read(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["p.st"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "p.st"
    path.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UsageError, match="No space left"):
        making.small().write(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["p.st"]


def test_an_interruption_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        making.small().write(tmp_path / "p.st")
    assert not list(tmp_path.iterdir())


def test_the_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)

        def note(*args: Any, name: str = name, plain: Any = plain) -> Any:
            steps.append(name)
            return plain(*args)

        monkeypatch.setattr(os, name, note)
    making.small().write(tmp_path / "p.st")
    assert steps == ["fsync", "replace", "fsync"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.st"
    link.symlink_to(tmp_path / "real" / "p.st")
    making.small().write(link)
    assert link.is_symlink()
    assert Patch.read(tmp_path / "real" / "p.st") == making.small()


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        for refusing in (making.small().write, files.check_place):
            with pytest.raises(UsageError, match="no regular file is there"):
                refusing(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_is_looked_at_before_there_is_anything_to_write(tmp_path: Path) -> None:
    (tmp_path / "there.st").touch()
    (tmp_path / "link.st").symlink_to(tmp_path / "new.st")
    for name in ("there.st", "new.st", "link.st"):
        files.check_place(tmp_path / name)
    device, missing = Path("/dev/null"), tmp_path / "missing" / "p.st"
    ends: tuple[Path, ...] = (missing, tmp_path, tmp_path / "x\0y", device, tmp_path / "there.st/p")
    for path in ends:
        with pytest.raises(UsageError, match="Can't write"):
            files.check_place(path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link.st", "there.st"]


def test_a_pipe_that_is_standard_output_is_no_place(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    try:
        with pytest.raises(UsageError, match="no regular file"):
            files.check_place(f"/dev/fd/{theirs}")
    finally:
        os.close(ours)
        os.close(theirs)


def test_says_why_it_can_not_write(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "p.st", tmp_path, tmp_path / "x\0y"):
        with pytest.raises(UsageError, match="Can't write"):
            making.small().write(path)
    assert not list(tmp_path.iterdir())


def test_says_why_it_can_not_read(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "directory"),
        ("x\0y", "null"),
    ):
        with pytest.raises(InvalidPatchError, match=why):
            Patch.read(path)


def test_reads_no_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.st"
    making.small().write(path)
    assert files.read(path, 10) == making.small().data[:11]
    monkeypatch.setattr(container, "MAX_FILE_BYTES", 10)
    with pytest.raises(InvalidPatchError, match="larger than 10 bytes"):
        Patch.read(path)
