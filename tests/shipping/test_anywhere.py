"""Patches at fsspec's URLs, the Hub's among them, and URLs that are tricks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from patcher.errors import InvalidPatchError, ShippingError, UsageError
from patcher.shipping import anywhere, moving, pull, push
from patcher.shipping.moving import save
from tests.cli.running import document, run
from tests.signing.reviewers import Reviewers
from tests.small_patch import small_patch


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.st"
    small_patch().write(path)
    return path


class _Web(SimpleHTTPRequestHandler):
    """A folder, which may be written to, and pages that are tricks."""

    def do_GET(self) -> None:
        trick = getattr(self, f"_{self.path.removeprefix('/trick/')}", None)
        if trick is None:
            super().do_GET()
        else:
            trick()

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        (Path(self.directory) / self.path[1:]).write_bytes(self.rfile.read(size))
        self.send_response(201)
        self.end_headers()

    def _away(self) -> None:
        self.send_response(302)
        self.send_header("Location", (Path(self.directory) / "p.st").as_uri())
        self.end_headers()

    def _short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(small_patch().data)))
        self.end_headers()
        self.wfile.write(small_patch().data[:-100])

    def _endless(self) -> None:
        """Says that it is a small part of the file, and goes on."""
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-999/1000")
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            while self.server.sent < 256 << 20:  # type: ignore[attr-defined]
                self.server.sent += self.wfile.write(b"x" * (1 << 16))  # type: ignore[attr-defined]
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """A web server over the test's folder."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Web, directory=str(tmp_path)))
    made.sent = 0  # type: ignore[attr-defined]
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def web(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def alice(tmp_path: Path) -> bytes:
    """Her signature of the small patch."""
    (tmp_path / "people").mkdir()
    return Reviewers(tmp_path / "people").bundle("alice", small_patch())


@pytest.mark.parametrize("place", ["memory://team/q.st", "file://{folder}/there/q.st"])
def test_there_and_back_with_what_lies_beside(
    file: Path, tmp_path: Path, alice: bytes, place: str
) -> None:
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


def test_over_http_with_what_the_server_lists(
    file: Path, web: str, tmp_path: Path, alice: bytes
) -> None:
    file.with_name("p.st.alice.sig").write_bytes(alice)
    file.with_name("p.st.bob.sig").write_bytes(b"{}")
    assert pull(f"{web}/p.st") == (small_patch(), {".alice.sig": alice})
    where = push(file, f"{web}/q.st")
    assert pull(where) == (small_patch(), {".alice.sig": alice})


def test_over_http_from_a_server_that_lists_nothing(
    file: Path, web: str, tmp_path: Path, alice: bytes
) -> None:
    (tmp_path / "index.html").write_text("welcome")
    file.with_name("p.st.sig").write_bytes(alice)
    assert pull(f"{web}/p.st") == (small_patch(), {".sig": alice})
    file.with_name("p.st.sig").unlink()
    assert pull(f"{web}/p.st?version=1") == pull(f"{web}/p.st") == (small_patch(), {})


@pytest.mark.parametrize("trick", ["away", "short"])
def test_a_redirect_to_a_file_of_this_machine_or_half_a_file(
    file: Path, web: str, trick: str
) -> None:
    with pytest.raises(ShippingError):
        pull(f"{web}/trick/{trick}")


def test_a_server_that_sends_without_end(
    server: ThreadingHTTPServer, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anywhere, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(ShippingError, match="larger than"):
        pull(f"{web}/trick/endless")
    assert server.sent < 64 << 20  # type: ignore[attr-defined]


def test_plain_http_to_another_machine(
    file: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "is_loopback", lambda _: False)
    for refused in (lambda: pull(f"{web}/p.st"), lambda: push(file, f"{web}/q.st")):
        with pytest.raises(UsageError, match="is plain http"):
            refused()
    assert not file.with_name("q.st").exists()
    pinned = push(file, f"{web}/q.st", insecure=True)
    assert pull(pinned)[0] == pull(f"{web}/q.st", insecure=True)[0] == small_patch()


def test_passwords_in_urls_are_not_shown(web: str, tmp_path: Path) -> None:
    secret = web.replace("//", "//bob:hunter2@") + "/none.st?signature=beef"
    told = run("pull", secret, "-o", tmp_path / "q.st")
    assert told.exit_code == 14
    assert "none.st" in told.stderr
    assert "hunter2" not in told.output
    assert "beef" not in told.output


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


def test_a_place_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShippingError):
        pull("no-such-scheme://x/y.st")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ShippingError, match="s3fs") as told:
        pull("s3://bucket/y.st")
    assert "Install" in told.value.cure


def test_a_push_that_is_killed_leaves_the_file_that_was_there(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there" / "q.st"
    push(file, there.as_uri())
    small_patch(1).write(file)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        push(file, there.as_uri())
    assert there.read_bytes() == small_patch().data
    assert [one.name for one in there.parent.iterdir()] == ["q.st"]


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
