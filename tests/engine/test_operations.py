"""What an operator sees of a running engine: metrics, health and logs; and its healing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from patcher.client import Engine
from patcher.errors import StackConflictError, VerificationError
from patcher.patch import Patch
from tests.engine.conftest import EAGER, answers, emptied
from tests.engine.patches import module_name, random_patch
from tests.engine.server import Server, serving
from tests.engine.test_refusals import patcher
from tests.engine.tiny import tiny_llama
from tests.signing.reviewers import Reviewers

pytestmark = pytest.mark.engine

PROMPTS = ["The capital of France is", "In the year 1914"]
LAYERS = (0, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def patch(model: Path) -> Patch:
    return random_patch(model, 1, layers=LAYERS, scale=20.0)


class Collector(ThreadingHTTPServer):
    """Takes spans as an OpenTelemetry collector does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Collecting)
        self.spans: list[Any] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def the(self, name: str, which: Callable[[Any], bool], patience: float = 20.0) -> Any:
        """The one span of that name, once it is there; they come in batches."""
        deadline = time.monotonic() + patience
        while not (found := [s for s in list(self.spans) if s.name == name and which(s)]):
            assert time.monotonic() < deadline, f"no span {name}"
            time.sleep(0.1)
        (one,) = found
        return one


class _Collecting(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector
        collector.shutdown()


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Reviewers:
    return Reviewers(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def revoked(model: Path) -> Patch:
    return random_patch(model, 2, layers=LAYERS)


@pytest.fixture(scope="module")
def watched(
    model: Path,
    collector: Collector,
    people: Reviewers,
    revoked: Patch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    head = f'signatures = 2\nunsigned = true\nrevoked-patches = ["{revoked.id}"]'
    server = Server(
        model,
        tmp_path_factory.mktemp("server"),
        EAGER,
        "--worker-extension-cls",
        "tests.engine.tamper.Tamper",
        "--otlp-traces-endpoint",
        f"http://127.0.0.1:{collector.server_port}/v1/traces",
        environment={
            "VLLM_SERVER_DEV_MODE": "1",
            "PATCHER_TRUST": str(people.policy(head, "alice", "bob", "carol")),
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        },
    )
    with serving(server):
        yield server


@pytest.fixture
def engine(watched: Server) -> Iterator[Engine]:
    with emptied(watched) as client:
        yield client


def metrics(server: Server) -> dict[str, float]:
    """The samples of ours in vLLM's own ``/metrics``."""
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("patcher_")]
    return {name: float(value) for name, value in pairs}


def health(server: Server) -> tuple[int, list[str]]:
    answer = httpx.get(f"{server.url}/plugins/patcher/v1/health", timeout=30)
    return answer.status_code, answer.json()["wrong"]


def on_workers(server: Server, method: str, *args: str) -> None:
    """Call a worker's method behind patcher's back, over vLLM's development route."""
    httpx.post(
        f"{server.url}/collective_rpc", json={"method": method, "args": list(args)}, timeout=60
    ).raise_for_status()


def test_metrics_tell_the_stack_and_what_became_of_changes(
    watched: Server, engine: Engine, patch: Patch, model: Path
) -> None:
    before = metrics(watched)
    named = f'patcher_patch_in_force{{patch="{patch.id[:12]}"}}'
    assert before["patcher_stack_depth"] == 0
    engine.apply(patch)
    after = metrics(watched)
    assert after["patcher_stack_depth"] == after[named] == 1
    done = 'patcher_changes_total{outcome="done"}'
    assert after[done] == before[done] + 1
    for name in ("patcher_pause_seconds", "patcher_change_seconds"):
        assert after[f"{name}_count"] == before[f"{name}_count"] + 1
        assert after[f"{name}_sum"] > before[f"{name}_sum"]
    # Modules are staged and read back one call each, and a step waits for one call at most.
    stalls = after["patcher_stall_seconds_count"] - before["patcher_stall_seconds_count"]
    assert stalls >= 2 * len(LAYERS)
    stale = engine.status()["weight_version"]
    engine.revert(all=True)
    with pytest.raises(Exception, match="weight version"):
        engine.set_stack([patch.id], expect=stale)
    last = metrics(watched)
    assert named not in last
    assert last["patcher_stack_depth"] == 0
    assert last['patcher_changes_total{outcome="stack-changed"}'] >= 1


def test_a_change_is_a_span_in_its_callers_trace(
    watched: Server, engine: Engine, patch: Patch, collector: Collector
) -> None:
    uploaded = engine.upload(patch)
    trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    answer = httpx.put(
        f"{watched.url}/plugins/patcher/v1/stack",
        json={"stack": [uploaded["id"]]},
        headers={
            "Authorization": f"Bearer {watched.token}",
            "If-Match": engine.status()["weight_version"],
            "traceparent": f"00-{trace}-{caller}-01",
        },
        timeout=60,
    ).json()

    def ours(span: Any) -> bool:
        return str(span.trace_id.hex()) == trace

    change = collector.the("patcher.change", ours)
    assert change.parent_span_id.hex() == caller
    told = {a.key: a.value for a in change.attributes}
    assert told["patcher.change"].string_value == answer["change"]
    assert told["patcher.pause_ms"].double_value == pytest.approx(answer["pause_ms"], abs=0.01)
    for step in ("stage", "pause", "read_back"):
        one = collector.the(f"patcher.{step}", ours)
        assert one.parent_span_id == change.span_id
        assert one.start_time_unix_nano < one.end_time_unix_nano
    with pytest.raises(StackConflictError):
        engine.set_stack([patch.id, patch.id], expect=answer["weight_version"])
    refused = collector.the(
        "patcher.change", lambda span: span.status.message == "StackConflictError"
    )
    assert refused.status.code == 2
    assert not refused.events  # an exception's own text could tell of the forget set


def test_signatures_go_along_and_what_is_revoked_is_refused(
    watched: Server,
    engine: Engine,
    model: Path,
    people: Reviewers,
    revoked: Patch,
    tmp_path: Path,
) -> None:
    patch = random_patch(model, 3, layers=LAYERS)
    file = tmp_path / "p.st"
    patch.write(file)

    def call(*words: object) -> tuple[int, Any]:
        return patcher(*map(str, words), token=watched.token, url=watched.url)

    trust = engine.status()["trust"]
    assert trust is not None
    assert trust["signers"] == ["alice", "bob", "carol"]
    (tmp_path / "p.st.alice.sig").write_bytes(people.bundle("alice", patch))
    (tmp_path / "p.st.carol.sig").write_bytes(people.bundle("carol", patch))
    code, answer = call("apply", file)
    assert (code, answer.get("stack")) == (0, [patch.id])
    assert len(engine.signatures(patch.id)) == 2
    done = [e for e in engine.ledger() if e["event"] == "change-done"][-1]
    assert done["detail"]["signers"] == {patch.id: ["alice", "carol"]}
    (started,) = [e for e in engine.ledger() if e["event"] == "start"]
    assert started["detail"]["trust"]["policy"] == trust["policy"]
    revoked.write(tmp_path / "revoked.st")
    assert call("plan", tmp_path / "revoked.st")[0] == 5
    code, answer = call("apply", tmp_path / "revoked.st")
    assert (code, answer["error"]["rule"]) == (5, "revoked-patches")


def test_a_reload_is_seen_and_the_next_change_heals_it(
    watched: Server, engine: Engine, patch: Patch, model: Path
) -> None:
    base = answers(watched, PROMPTS)
    engine.apply(patch)
    patched = answers(watched, PROMPTS)
    assert health(watched) == (200, [])
    on_workers(watched, "reload_weights")
    assert not engine.verify()["ok"]
    assert health(watched) == (503, ["drift"])
    assert metrics(watched)["patcher_drifted_modules"] == len(LAYERS)
    code, document = patcher("verify", "--heal", token=watched.token, url=watched.url)
    assert code == 0, document
    assert health(watched) == (200, [])
    assert metrics(watched)["patcher_drifted_modules"] == 0
    assert answers(watched, PROMPTS) == patched

    on_workers(watched, "reload_weights")  # and now without anybody asking
    above = random_patch(model, 2, layers=(1,), scale=20.0)
    engine.apply(above)
    engine.revert(above.id)
    assert engine.verify()["ok"]
    assert answers(watched, PROMPTS) == patched
    events = [entry["event"] for entry in engine.ledger()]
    assert events.count("drift-healed") == 2
    engine.revert(all=True)
    assert answers(watched, PROMPTS) == base


def test_log_lines_of_a_change_carry_its_id(watched: Server, engine: Engine, patch: Patch) -> None:
    change = engine.apply(patch, reason="request 17")
    assert [e for e in engine.ledger() if e["detail"].get("change") == change["change"]]
    lines = [line for line in watched.log().splitlines() if f"change={change['change']}" in line]
    assert any("actor=admin in_flight=recompute stack=0->1" in line for line in lines)
    assert any("outcome=done" in line and "pause_ms=" in line for line in lines)


def test_the_record_of_an_engine_is_proven_and_certified(
    watched: Server, engine: Engine, patch: Patch, tmp_path: Path
) -> None:
    def asked(*words: object) -> dict[str, Any]:
        code, document = patcher(*map(str, words), token=watched.token, url=watched.url)
        assert code == 0, document
        told: dict[str, Any] = document
        return told

    kept, exported = tmp_path / "head.json", tmp_path / "ledger.jsonl"
    kept.write_text(json.dumps(asked("log", "--head")))
    change = engine.apply(patch, reason="request 17")
    proof = asked("log", "--verify", "--expect-head", kept)
    assert proof["stack"] == [patch.id]
    assert proof["checked"] == ["chain", "engine", "head"]
    done = asked("log", "--event", "change-done", "--patch", patch.id[:8])["entries"][-1]
    assert done["detail"]["client"].startswith("patcher/")
    assert asked("log", "--at", done["time"])["stack"] == [patch.id]

    asked("log", "--export", exported)
    alone = asked("log", "--verify", "--file", exported)
    assert (alone["head"], alone["checked"]) == (proof["head"], ["chain"])
    exported.write_text(exported.read_text().replace("request 17", "request 71"))
    assert patcher("log", "--verify", "--file", str(exported))[0] == 9

    certificate = tmp_path / "cert.json"
    asked("certificate", "--patch", patch.id[:8], "-o", certificate)
    told = json.loads(certificate.read_text())["predicate"]
    assert told["ledger"]["entry"]["change"] == change["change"]
    assert told["inForce"]["weightVersion"] == change["weight_version"]
    (rank,) = told["weights"]
    live = {name: [digest] for name, digest in rank["modules"].items()}
    assert live == done["detail"]["digests"]
    assert live.keys() == told["model"]["base"].keys()
    engine.revert(all=True)
    asked("log", "--verify", "--expect-head", certificate)
    assert asked("log", "--at", told["time"])["stack"] == [patch.id]


def test_other_weights_are_refused_and_not_overwritten(watched: Server, patch: Patch) -> None:
    """The last one here: such an engine has to be restarted."""
    with Engine(watched.url, watched.token) as engine:
        engine.apply(patch)
        on_workers(watched, "tamper", module_name(LAYERS[0]))
        assert patcher("verify", "--heal", token=watched.token, url=watched.url)[0] == 9
        assert health(watched) == (503, ["drift"])
        with pytest.raises(VerificationError, match="Something else changed") as caught:
            engine.revert(all=True)
    assert caught.value.details["modules"] == [module_name(LAYERS[0])]
