"""The server with one thing broken: it doesn't drop what the old weights cached."""

from __future__ import annotations

from typing import Any

from patcher.engine import launch, vllm_client


async def no_flush(client: Any) -> None:
    """Drop nothing."""


if __name__ == "__main__":
    vllm_client.flush = no_flush
    launch.main()
