"""A real OCI registry on loopback: Debian's docker-registry, which `make install` fetches."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.engine.server import free_port

_CONFIG = """version: 0.1
log: {{level: error}}
storage:
  filesystem: {{rootdirectory: {folder}/data}}
  delete: {{enabled: true}}
http: {{addr: 127.0.0.1:{port}}}
"""


@contextmanager
def registry_process(folder: Path, more: str = "") -> Iterator[str]:
    """Its host and port; ``more`` of its configuration."""
    beside = Path(sys.executable).with_name("docker-registry")
    binary = str(beside) if beside.exists() else shutil.which("docker-registry")
    if binary is None:
        pytest.skip("no docker-registry here: `make install` fetches it on Debian")
    port = free_port()
    folder.mkdir(exist_ok=True)
    (folder / "config.yml").write_text(_CONFIG.format(folder=folder, port=port) + more)
    process = subprocess.Popen(
        [binary, "serve", str(folder / "config.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            try:
                httpx.get(f"http://127.0.0.1:{port}/v2/", timeout=1)
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its host and port."""
    with registry_process(tmp_path_factory.mktemp("registry")) as host:
        yield host
