"""Patches at fsspec's URLs, the Hub's among them, and URLs that are tricks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from patcher.errors import InvalidPatchError, ShippingError, UsageError
from patcher.shipping import anywhere, pull, push
from patcher.shipping.moving import save
from tests.cli.running import document, run
from tests.signing.reviewers import Reviewers
from tests.small_patch import small_patch


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.st"
    small_patch().write(path)
    return path


class _Quiet(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", (Path(self.directory) / "p.st").as_uri())
            self.end_headers()
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server over the test's folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("place", ["memory://team/q.st", "file://{folder}/there/q.st"])
def test_there_and_back_with_what_lies_beside(file: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "people").mkdir()
    alice = Reviewers(tmp_path / "people").bundle("alice", small_patch())
    file.with_name("p.st.alice.sig").write_bytes(alice)
    file.with_name("p.st.other.sig").write_text("no signature")
    report = tmp_path / "r.json"
    report.write_text("{}")
    where = push(file, place.format(folder=tmp_path), report=report)
    assert where.endswith(f"q.st#sha256={small_patch().id}")
    patch, beside = pull(where)
    assert (patch, beside) == (small_patch(), {".alice.sig": alice, ".report.json": b"{}"})
    others = save(patch, beside, tmp_path / "r.st")
    assert [one.name for one in others] == ["r.st.alice.sig", "r.st.report.json"]


def test_over_http(file: Path, web: str) -> None:
    assert pull(f"{web}/p.st")[0] == small_patch()
    assert document(run("inspect", f"{web}/p.st", "--json"))["id"] == small_patch().id
    with pytest.raises(ShippingError):
        pull(f"{web}/none.st")


def test_a_redirect_to_a_file_of_this_machine(file: Path, web: str) -> None:
    with pytest.raises(ShippingError):
        pull(f"{web}/away")


def test_another_file_than_pinned(file: Path) -> None:
    where = push(file, "memory://pinned.st")
    fsspec.filesystem("memory").pipe_file("/pinned.st", small_patch(1).data)
    with pytest.raises(InvalidPatchError, match="Somebody exchanged it"):
        pull(where)
    with pytest.raises(InvalidPatchError):
        pull("memory://pinned.st", pin=small_patch().id)


def test_a_file_that_is_cut_off(file: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/cut.st", small_patch().data[:-1])
    with pytest.raises(InvalidPatchError, match="cut off"):
        pull("memory://cut.st")


def test_a_file_that_is_too_large(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anywhere, "MAX_FILE_BYTES", 100)
    push(file, "memory://large.st")
    with pytest.raises(ShippingError, match="larger than 100 bytes"):
        pull("memory://large.st")


@pytest.mark.parametrize("url", [
    "simplecache::memory://x.st", "memory://a.st::memory://b.st", "memory://x.st#sha256=abc",
    "memory://x.st#fragment", "p.st", "", "memory://x\n.st",
])  # fmt: skip
def test_more_than_one_place_or_none(file: Path, url: str) -> None:
    with pytest.raises(UsageError):
        pull(url)
    with pytest.raises(UsageError):
        push(file, url)


def test_a_place_whose_package_is_missing() -> None:
    with pytest.raises(ShippingError):
        pull("no-such-scheme://x/y.st")


def test_what_may_not_be_sent(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Leave the pin out"):
        push(file, f"memory://x.st#sha256={'0' * 64}")
    (tmp_path / "r.exe").touch()
    with pytest.raises(UsageError, match="no kind of report"):
        push(file, "memory://x.st", report=tmp_path / "r.exe")
    file.write_bytes(small_patch().data[:-1])
    with pytest.raises(InvalidPatchError):
        push(file, "memory://x.st")
    assert run("push", tmp_path / "none.st", "memory://x.st").exit_code == 2
    assert run("pull", "file:///no/such/file.st", "-o", tmp_path / "q.st").exit_code == 14
    assert not (tmp_path / "q.st").exists()
