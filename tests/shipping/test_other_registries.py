"""Registries with the referrers API, with passwords, and those that lie on the wire."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patcher.client import Engine
from patcher.errors import InvalidPatchError, ShippingError, UsageError
from patcher.shipping import pull, push, registry
from patcher.shipping.registry import MANIFEST
from tests.cli.running import document, run
from tests.fake_engine import TOKEN, FakeEngine
from tests.shipping.conftest import registry_process
from tests.shipping.fake_registry import FakeRegistry, registry_in_memory, self_signed
from tests.signing.reviewers import Reviewers
from tests.small_patch import small_patch

# bcrypt of "open sesame", made with 16 rounds
HTPASSWD = "alice:$2y$04$TVGtWA03YhYsq9OgVMziA.m99Nyo2HgcQLRMbVcyZmVlpgJv0mJry\n"


@pytest.fixture
def other() -> Iterator[FakeRegistry]:
    with registry_in_memory() as server:
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.st"
    small_patch().write(path)
    return path


def logged_in(folder: Path, host: str, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `docker login`."""
    auth = {"auth": base64.b64encode(who.encode()).decode()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"auths": {host: auth}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))


def test_the_referrers_api_needs_no_tag(other: FakeRegistry, file: Path, tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    alice = Reviewers(tmp_path / "people").bundle("alice", small_patch())
    file.with_name("p.st.alice.sig").write_bytes(alice)
    where = push(file, f"oci://{other.host}/team/forget:v1")
    assert pull(where) == (small_patch(), {".alice.sig": alice})
    assert not [name for name in other.manifests if name.startswith("sha256-")]


def test_two_people_push_signatures_of_one_name(
    other: FakeRegistry, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "people").mkdir()
    people = Reviewers(tmp_path / "people")
    bundles = {people.bundle(who, small_patch()) for who in ("alice", "bob")}
    for bundle in bundles:
        file.with_name("p.st.sig").write_bytes(bundle)
        where = push(file, f"oci://{other.host}/team/forget:v1")
    assert set(pull(where)[1].values()) == bundles


def test_a_signature_of_another_patch_is_left_there(
    other: FakeRegistry, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "people").mkdir()
    bundle = Reviewers(tmp_path / "people").bundle("alice", small_patch(1))
    where = push(file, f"oci://{other.host}/team/forget:v1")
    subject = json.loads(other.manifests["v1"])
    told = registry._manifest(
        registry.SIGNATURE,
        [registry._descriptor(registry.SIGNATURE, bundle)],
        registry._descriptor(MANIFEST, registry._bytes(subject)),
        ".alice.sig",
    )
    raw = registry._bytes(told)
    other.blobs[registry._descriptor("", bundle)["digest"]] = bundle
    other.manifests[registry._descriptor("", raw)["digest"]] = raw
    assert pull(where) == (small_patch(), {})


def test_a_registry_that_gives_tokens(
    other: FakeRegistry, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.login = "alice:open sesame"
    target = f"oci://{other.host}/team/forget:v1"
    logged_in(tmp_path / "wrong", other.host, "alice:guess", monkeypatch)
    with pytest.raises(ShippingError, match="doesn't admit you") as refused:
        push(file, target)
    assert "docker login" in refused.value.cure
    assert "guess" not in str(refused.value)
    logged_in(tmp_path / "right", other.host, other.login, monkeypatch)
    assert pull(push(file, target))[0] == small_patch()


def test_a_registry_that_asks_for_the_password(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = f"auth: {{htpasswd: {{realm: test, path: {tmp_path}/htpasswd}}}}\n"
    with registry_process(tmp_path / "registry", auth) as host:
        target = f"oci://{host}/team/forget:v1"
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "nobody"))
        with pytest.raises(ShippingError, match="doesn't admit you"):
            push(file, target)
        logged_in(tmp_path / "wrong", host, "alice:guess", monkeypatch)
        with pytest.raises(ShippingError, match="doesn't admit you"):
            push(file, target)
        logged_in(tmp_path / "right", host, "alice:open sesame", monkeypatch)
        assert pull(push(file, target))[0] == small_patch()


def test_a_blob_of_other_bytes_than_its_digest(other: FakeRegistry, file: Path) -> None:
    where = push(file, f"oci://{other.host}/team/forget:v1")
    digest = f"sha256:{small_patch().id}"
    other.blobs[digest] = other.blobs[digest][:-1] + b"!"
    with pytest.raises(ShippingError, match="other bytes than"):
        pull(where)
    other.blobs[digest] = small_patch().data[:-1]
    with pytest.raises(ShippingError, match="other bytes than"):
        pull(where)


def test_a_blob_that_is_cut_off_on_its_way(other: FakeRegistry, file: Path, tmp_path: Path) -> None:
    where = push(file, f"oci://{other.host}/team/forget:v1")

    def hang_up(request: Any) -> bool:
        if "/blobs/" not in request.path:
            return False
        request.answer(200, small_patch().data[:100], Content_Length="1000")
        request.close_connection = True
        return True

    other.lie = hang_up
    out = tmp_path / "q.st"
    assert run("pull", where, "-o", out).exit_code == 14
    assert not list(tmp_path.glob("*q.st*"))


def test_a_manifest_of_other_bytes_than_its_digest(other: FakeRegistry, file: Path) -> None:
    where = push(file, f"oci://{other.host}/team/forget:v1")
    digest = where.partition("@")[2].partition("#")[0]
    other.manifests[digest] += b" "
    with pytest.raises(ShippingError, match="another manifest"):
        pull(where)


def test_a_tag_that_was_moved_to_another_patch(
    other: FakeRegistry, file: Path, tmp_path: Path
) -> None:
    push(file, f"oci://{other.host}/team/forget:v1")
    small_patch(1).write(tmp_path / "other.st")
    push(tmp_path / "other.st", f"oci://{other.host}/team/forget:v1")
    with pytest.raises(InvalidPatchError, match="Somebody exchanged it"):
        pull(f"oci://{other.host}/team/forget:v1#sha256={small_patch().id}")


def test_a_manifest_without_end(other: FakeRegistry, file: Path) -> None:
    where = push(file, f"oci://{other.host}/team/forget:v1")
    other.manifests["v1"] = b" " * (registry.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ShippingError, match="more than it said"):
        pull(where.partition("@")[0] + ":v1")


@pytest.mark.parametrize("reply", [b"", b"[]", b"{}", b'{"layers": 1}', b"<html>", b"\xff"])
def test_an_answer_that_is_no_manifest(other: FakeRegistry, reply: bytes) -> None:
    other.manifests["v1"] = reply
    with pytest.raises(ShippingError):
        pull(f"oci://{other.host}/team/forget:v1")


def test_a_manifest_names_a_digest_that_is_a_path(other: FakeRegistry, file: Path) -> None:
    push(file, f"oci://{other.host}/team/forget:v1")
    manifest = json.loads(other.manifests["v1"])
    manifest["layers"][0]["digest"] = "../../../secret"
    other.manifests["v1"] = json.dumps(manifest).encode()
    with pytest.raises(ShippingError, match="no SHA-256 digest"):
        pull(f"oci://{other.host}/team/forget:v1")
    assert not [one for one in other.seen if "secret" in one]


def test_a_redirect_to_a_file_of_this_machine(other: FakeRegistry, file: Path) -> None:
    where = push(file, f"oci://{other.host}/team/forget:v1")

    def away(request: Any) -> bool:
        if "/blobs/" in request.path:
            request.answer(307, Location=file.as_uri())
        return "/blobs/" in request.path

    other.lie = away
    with pytest.raises(ShippingError):
        pull(where)


def test_plain_http_to_another_machine(
    other: FakeRegistry, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "is_loopback", lambda _: False)
    with pytest.raises(ShippingError):
        push(file, f"oci://{other.host}/team/forget:v1")
    assert not other.seen
    where = push(file, f"oci://{other.host}/team/forget:v1", insecure=True)
    assert pull(where, insecure=True)[0] == small_patch()


def test_a_registry_with_tls_sends_us_to_plain_http(
    other: FakeRegistry, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(file, f"oci://{other.host}/team/forget:v1")
    seen = len(other.seen)
    certificate = self_signed(tmp_path / "tls.pem")
    monkeypatch.setattr(registry, "is_loopback", lambda _: False)
    with registry_in_memory(certificate) as secure:
        target = f"oci://{secure.host}/team/forget:v1"
        with pytest.raises(ShippingError, match="certificate"):
            push(file, target)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert pull(push(file, target))[0] == small_patch()

        def away(request: Any) -> bool:
            if request.command == "GET":
                request.answer(307, Location=f"http://{other.host}{request.path}")
            return bool(request.command == "GET")

        secure.lie = away
        with pytest.raises(ShippingError):
            pull(target)
    assert len(other.seen) == seen


def test_a_registry_on_this_machine_is_not_behind_the_proxy(
    other: FakeRegistry, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert pull(push(file, f"oci://{other.host}/team/forget:v1"))[0] == small_patch()


@pytest.mark.parametrize("name", [
    "team", "", "/team/forget", "127.0.0.1:1/Team/forget", "127.0.0.1:1/a//b",
    "127.0.0.1:1/../../forget", "127.0.0.1:1/team/forget?x=y", "127.0.0.1:1/team/forget:a b",
    "alice:secret@127.0.0.1:1/team/forget", "127.0.0.1:1/team/forget@sha256:abc",
    "127.0.0.1:1/team/forget:../x", "127.0.0.1:1/team/forget:" + "x" * 129,
])  # fmt: skip
def test_a_name_that_is_a_trick(file: Path, name: str) -> None:
    with pytest.raises(UsageError):
        push(file, f"oci://{name}")


def test_a_name_without_a_registry_is_not_taken_to_docker_hub(file: Path) -> None:
    with pytest.raises(ShippingError, match="host='invalid'"):  # the first part, always
        push(file, "oci://invalid/forget:v1")


def test_the_extra_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("oras.provider", "oras.container", "fsspec", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    for url in ("oci://127.0.0.1:9/a/b:c", "memory://x.st", "hf://a/b/c.st"):
        told = run("pull", url, "-o", tmp_path / "q.st")
        assert told.exit_code == 2
        assert "vllm-patcher[ship]" in told.stderr


def test_the_commands_say_what_went_wrong(other: FakeRegistry, tmp_path: Path) -> None:
    told = run("pull", f"oci://{other.host}/no/such:v1", "-o", tmp_path / "q.st", "--json")
    assert told.exit_code == 14
    assert document(told)["error"]["code"] == "not-shipped"


def test_urls_from_python(
    other: FakeRegistry, file: Path, tmp_path: Path, fake: FakeEngine
) -> None:
    (tmp_path / "people").mkdir()
    alice = Reviewers(tmp_path / "people").bundle("alice", small_patch())
    file.with_name("p.st.alice.sig").write_bytes(alice)
    where = push(file, f"oci://{other.host}/team/forget:v1")
    with Engine(fake.url, TOKEN) as engine:
        assert engine.apply(where)["stack"] == [small_patch().id]
        assert fake.signatures == [(small_patch().id, alice)]
        with pytest.raises(InvalidPatchError, match="Somebody exchanged it"):
            engine.replace(where.partition("#")[0] + f"#sha256={'0' * 64}", all=True)
        with pytest.raises(ShippingError, match="isn't there"):
            engine.plan(f"oci://{other.host}/team/forget:v2")
