"""Patches in an OCI registry, and what a registry that lies can do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from patcher.errors import InvalidPatchError, ShippingError
from patcher.shipping import pull, push
from patcher.shipping.registry import MANIFEST, PATCH, SIGNATURE, SUFFIX
from tests.cli.running import document, run, run_on
from tests.fake_engine import FakeEngine
from tests.signing.reviewers import Reviewers
from tests.small_patch import small_patch


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.st"
    small_patch().write(path)
    return path


@pytest.fixture
def signed(tmp_path: Path, file: Path) -> dict[str, bytes]:
    (tmp_path / "people").mkdir()
    people = Reviewers(tmp_path / "people")
    bundles = {f".{who}.sig": people.bundle(who, small_patch()) for who in ("alice", "bob")}
    for suffix, data in bundles.items():
        file.with_name(file.name + suffix).write_bytes(data)
    return bundles


def blob(registry: str, name: str, data: bytes) -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    place = httpx.post(f"http://{registry}/v2/{name}/blobs/uploads/").headers["location"]
    httpx.put(f"{place}&digest={digest}", content=data).raise_for_status()
    return {"mediaType": PATCH, "digest": digest, "size": len(data)}


def manifest(registry: str, name: str, **changes: Any) -> str:
    """Put a manifest there that somebody else made; returns its place."""
    config = blob(registry, name, b"{}")
    body = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [], **changes}
    answer = httpx.put(
        f"http://{registry}/v2/{name}/manifests/latest",
        content=json.dumps(body).encode(),
        headers={"Content-Type": MANIFEST},
    )
    answer.raise_for_status()
    return f"oci://{registry}/{name}"


def test_a_patch_with_its_signatures_and_report_there_and_back(
    registry: str, file: Path, signed: dict[str, bytes], tmp_path: Path
) -> None:
    report = tmp_path / "r.HTML"
    report.write_text("<p>fine</p>")
    where = push(file, f"oci://{registry}/team/forget:v1", report=report)
    assert where.startswith(f"oci://{registry}/team/forget@sha256:")
    assert where.endswith(f"#sha256={small_patch().id}")
    for place in (where, f"oci://{registry}/team/forget:v1"):
        patch, beside = pull(place)
        assert patch == small_patch()
        assert beside == {**signed, ".report.html": b"<p>fine</p>"}
    again = push(file, f"oci://{registry}/team/forget:v1")
    assert again == where
    assert pull(where)[1].keys() == {*signed, ".report.html"}, "what was there stays"


def test_apply_of_a_place(
    registry: str, file: Path, signed: dict[str, bytes], fake: FakeEngine
) -> None:
    where = push(file, f"oci://{registry}/team/apply:v1")
    assert document(run_on(fake, "apply", where, "--json"))["stack"] == [small_patch().id]
    assert {bundle for _, bundle in fake.signatures} == set(signed.values())
    assert document(run("inspect", where, "--json"))["id"] == small_patch().id
    wrong = where.partition("#")[0] + "#sha256=" + "0" * 64
    assert run_on(fake, "apply", wrong).exit_code == 3


def test_the_commands(registry: str, file: Path, signed: dict[str, bytes], tmp_path: Path) -> None:
    sent = document(run("push", file, f"oci://{registry}/team/commands", "--json"))
    out = tmp_path / "here" / "q.st"
    out.parent.mkdir()
    words = ("pull", sent["url"], "-o", out)
    got = document(run(*words, "--id", small_patch().id, "--json"))
    assert (got["id"], got["bytes"]) == (small_patch().id, len(small_patch().data))
    assert sorted(got["beside"]) == [f"{out}{suffix}" for suffix in sorted(signed)]
    assert out.read_bytes() == small_patch().data
    out.unlink()
    assert run(*words, "--id", "0" * 64).exit_code == 3
    assert run(*words, "--id", "abc").exit_code == 2
    assert not out.exists()


def test_a_tag_that_is_not_there(registry: str) -> None:
    with pytest.raises(ShippingError, match="isn't there"):
        pull(f"oci://{registry}/no/such:thing")


def test_a_registry_that_is_not_there() -> None:
    with pytest.raises(ShippingError):
        pull("oci://127.0.0.1:9/x/y:z")


def test_an_image_is_no_patch(registry: str) -> None:
    with pytest.raises(ShippingError, match="holds no patch"):
        pull(manifest(registry, "evil/image"))


def test_another_file_lies_there(registry: str) -> None:
    layer = blob(registry, "evil/other", b"not a patch")
    with pytest.raises(InvalidPatchError):
        pull(manifest(registry, "evil/other", layers=[layer]))


@pytest.mark.parametrize("size", [2**40, -1, None])
def test_a_manifest_names_an_absurd_size(registry: str, size: int | None) -> None:
    layer = {**blob(registry, "evil/huge", small_patch().data), "size": size}
    with pytest.raises(ShippingError, match="are read at most"):
        pull(manifest(registry, "evil/huge", layers=[layer]))


def test_a_manifest_names_less_than_the_blob_has(registry: str) -> None:
    layer = {**blob(registry, "evil/longer", small_patch().data), "size": 10}
    with pytest.raises(ShippingError, match="more than it said"):
        pull(manifest(registry, "evil/longer", layers=[layer]))


@pytest.mark.parametrize("suffix", ["/../../evil.sig", "../x.sig", ".sig/x", "", ".exe", "\n.sig"])
def test_a_referrer_names_a_way_out_of_the_folder(
    registry: str, file: Path, suffix: str, tmp_path: Path
) -> None:
    name = f"evil/way{hashlib.sha256(suffix.encode()).hexdigest()[:8]}"
    where = push(file, f"oci://{registry}/{name}:latest")
    subject = where.partition("@")[2].partition("#")[0]
    layer = {**blob(registry, name, b"{}"), "mediaType": SIGNATURE}
    body = {"schemaVersion": 2, "mediaType": MANIFEST, "config": layer, "layers": [layer],
            "annotations": {SUFFIX: suffix}}  # fmt: skip
    raw = json.dumps(body).encode()
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    url = f"http://{registry}/v2/{name}/manifests/"
    httpx.put(url + digest, content=raw, headers={"Content-Type": MANIFEST}).raise_for_status()
    kind = "application/vnd.oci.image.index.v1+json"
    entry = {"mediaType": MANIFEST, "digest": digest, "size": len(raw), "artifactType": SIGNATURE}
    index = {"schemaVersion": 2, "mediaType": kind, "manifests": [entry]}
    tag = url + subject.replace(":", "-")
    httpx.put(tag, json=index, headers={"Content-Type": kind}).raise_for_status()
    assert pull(where) == (small_patch(), {})
