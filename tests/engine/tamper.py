"""A worker extension for tests: changes a live weight behind patcher's back."""

from __future__ import annotations

from typing import Any

from patcher.engine.vllm_worker import find_site


class Tamper:
    """Given to vLLM as ``--worker-extension-cls``; called over vLLM's development routes."""

    get_model: Any

    def tamper(self, name: str) -> None:
        site = find_site(self.get_model(), name)
        assert site is not None
        weight = site.read()
        weight[0, 0] += 1
        self._kept = site.stage(weight)
        self._kept.commit()
