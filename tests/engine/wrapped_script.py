"""A draft model beside the patched one, then a language model inside a multimodal one: ``FOLDER``.

The folder holds ``target``, ``merged``, ``draft``, ``patch.st``, and ``multimodal``,
``multimodal-merged``, and in ``names/`` the same patch under several module names.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import patcher
from patcher.engine.vllm_worker import find_site
from patcher.kernels import digest
from tests.engine.llms import answers, error_of, start
from tests.engine.patches import module_name
from tests.engine.scripts import say


def draft(folder: Path) -> dict[str, Any]:
    conf = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 3}
    llm = start(folder / "target", speculative_config=conf)
    found: dict[str, Any] = {"base": answers(llm), "draft before": weight_of_draft(llm)}
    with patcher.attach(llm) as engine:
        engine.apply(folder / "patch.st")
        found["patched"] = answers(llm)
        found["draft after"] = weight_of_draft(llm)
        found["verified"] = engine.verify()
    found["reverted"] = answers(llm)
    del llm
    gc.collect()
    found["merged"] = answers(start(folder / "merged", speculative_config=conf))
    gc.collect()
    return found


def weight_of_draft(llm: Any) -> str:
    model = llm.llm_engine.model_executor.driver_worker.worker.get_draft_model()
    site = find_site(model, module_name(0))
    assert site is not None, "the draft has a module of that name too"
    return digest(site.read())


def multimodal(folder: Path) -> dict[str, Any]:
    only_text = {"limit_mm_per_prompt": {"image": 0}}
    llm = start(folder / "multimodal", **only_text)
    found: dict[str, Any] = {"base": answers(llm), "patched": {}}
    patches = sorted((folder / "names").iterdir())
    for path in patches:
        with patcher.attach(llm) as engine:
            engine.apply(path)
            found["patched"][path.stem] = [answers(llm), engine.verify()["ok"]]
    found["reverted"] = answers(llm)
    with patcher.attach(llm) as engine:
        found["two names"] = error_of(engine.apply, *patches[:2])
        found["after"] = [engine.status()["stack"], answers(llm)]
    del llm
    gc.collect()
    found["merged"] = answers(start(folder / "multimodal-merged", **only_text))
    return found


def main(folder: str) -> None:
    say({"draft": draft(Path(folder)), "multimodal": multimodal(Path(folder))})


if __name__ == "__main__":
    main(*sys.argv[1:])
