"""The connection to an OCI registry: ``oras``, within bounds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ShippingError
from .needs import needed

_TIMEOUT = 60.0  # seconds without a byte


def opened(*, plain: bool, here: bool) -> Any:
    """An ``oras.provider.Registry``.

    Args:
        plain: by http; else only ever by https, wherever the registry sends us.
        here: it is on this machine, so not behind the environment's proxy.
    """
    provider, token = needed("oras.provider"), needed("oras.auth.token")

    class Registry(provider.Registry):  # type: ignore[misc, name-defined]
        def do_request(self, *request: Any, **options: Any) -> Any:
            # oras tries six times, two minutes in all; whoever waits can do that better.
            answer = provider.Registry.do_request.__wrapped__(self, *request, **options)
            if answer.status_code in (401, 403):
                raise _not_admitted(answer.status_code)
            return answer

    class Authentication(token.TokenAuth):  # type: ignore[misc, name-defined]
        """Oras' own for tokens; it would answer no registry that asks for the password itself."""

        def authenticate_request(
            self, original: Any, headers: dict[str, str], refresh: bool = False
        ) -> tuple[dict[str, str], bool]:
            asked = original.headers.get("Www-Authenticate", "").lower()
            given = original.request.headers.get("Authorization", "")
            password = getattr(self, "_basic_auth", None)
            headers, changed = headers or {}, False
            if asked.startswith("basic"):
                if password is not None and not given:
                    headers, changed = {**headers, "Authorization": f"Basic {password}"}, True
            elif asked:
                # A token that was refused is not given again: it may be for reading only.
                headers, changed = super().authenticate_request(
                    original, headers, refresh or bool(given)
                )
            if not changed:
                raise _not_admitted(original.status_code)
            return headers, True

    registry = Registry(insecure=plain)
    auth = Authentication()
    if folder := os.environ.get("DOCKER_CONFIG"):  # oras looks only into the home folder
        auth._auth_config = _docker_config(Path(folder) / "config.json")
    auth.session, auth.prefix, auth._tls_verify = registry.session, registry.prefix, True
    registry.auth = auth
    registry.session.adapters.clear()
    for scheme in ("https://", *(["http://"] if plain else [])):
        registry.session.mount(scheme, _bounded_waits())
    registry.session.trust_env = not here
    return registry


def _not_admitted(status: int) -> ShippingError:
    return ShippingError(
        f"The registry doesn't admit you to this ({status}).",
        "`docker login` tells patcher, too, who you are.",
    )


def _docker_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        config = {}
    except (OSError, ValueError):
        raise ShippingError(f"Can't read {path}.", "Look at DOCKER_CONFIG.") from None
    return config or {"auths": {}}  # oras reads its own where this is empty


def _bounded_waits() -> Any:
    adapters = needed("requests.adapters")

    class Bounded(adapters.HTTPAdapter):  # type: ignore[misc, name-defined]
        def send(self, request: Any, **options: Any) -> Any:
            options["timeout"] = options.get("timeout") or _TIMEOUT
            return super().send(request, **options)

    return Bounded()
