"""What vLLM's own ``/metrics`` tells of patcher.

The metrics are in ``prometheus_client``'s default registry, or in the files of its
multiprocess mode where vLLM has several API servers (``vllm/v1/metrics/prometheus.py``).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_STALLS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_PAUSES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 120)


class Metrics:
    """This process's metrics; a gauge tells what the process that wrote last knows."""

    def __init__(self) -> None:
        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(name, text, labels, multiprocess_mode="mostrecent")

        self._depth = gauge("patcher_stack_depth", "Patches in force.")
        self._patch = gauge("patcher_patch_in_force", "1 for each patch in force.", ["patch"])
        self._drift = gauge(
            "patcher_drifted_modules", "Modules that something else changed, as last found."
        )
        self._last = gauge(
            "patcher_last_change_timestamp_seconds", "Unix time of the last change that was made."
        )
        self._changes = Counter(
            "patcher_changes",
            "Changes by outcome: done, unchanged, or the code of the error.",
            ["outcome"],
        )
        for outcome in ("done", "unchanged"):
            self._changes.labels(outcome)  # there from the start, so that a first one is a step
        self._seconds = Histogram(
            "patcher_change_seconds", "A change from the request to the answer.", buckets=_SECONDS
        )
        self._pause = Histogram(
            "patcher_pause_seconds", "The engine's stop in a change.", buckets=_PAUSES
        )
        self._stall = Histogram(
            "patcher_stall_seconds",
            "How long a rank worked for a change between two steps, which the next one waited for.",
            buckets=_STALLS,
        )
        self._named: set[str] = set()

    def in_force(self, ids: Sequence[str]) -> None:
        """Tell which patches are in force."""
        self._depth.set(len(ids))
        names = {patch_id[:12] for patch_id in ids}
        for name in self._named - names:
            # First 0: what multiprocess mode has on file stays there.
            self._patch.labels(name).set(0)
            self._patch.remove(name)
        for name in names:
            self._patch.labels(name).set(1)
        self._named = names

    def drifted(self, modules: int) -> None:
        """Tell how many modules are not what was put there."""
        self._drift.set(modules)

    def stalled(self, seconds: float) -> None:
        """Tell how long the slowest rank took for one call while the engine served."""
        self._stall.observe(seconds)

    def ended(self, outcome: str, seconds: float, pause_ms: float | None = None) -> None:
        """Count a change; ``pause_ms`` where it was made."""
        self._changes.labels(outcome).inc()
        self._seconds.observe(seconds)
        if pause_ms is not None:
            self._pause.observe(pause_ms / 1000)
            self._last.set(time.time())


@functools.cache
def metrics() -> Metrics:
    """The metrics of this process: a registry takes each name once."""
    return Metrics()
