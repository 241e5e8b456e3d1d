"""Who made a patch: keys, OpenSSF Model Signing bundles, and whom an engine trusts.

What is signed is the file's bytes: the one resource in a bundle's manifest has the patch's id as
its digest. ``model_signing`` is imported only where a bundle is made or checked.
"""

from __future__ import annotations

from .bundles import (
    MAX_BUNDLE_BYTES,
    Identity,
    bundle_subject,
    bundles_of,
    by_subject,
    normalised,
    sign,
)
from .envelope import enveloped, opened
from .keys import fingerprint, generate
from .policy import TrustPolicy

__all__ = [
    "MAX_BUNDLE_BYTES",
    "Identity",
    "TrustPolicy",
    "bundle_subject",
    "bundles_of",
    "by_subject",
    "enveloped",
    "fingerprint",
    "generate",
    "normalised",
    "opened",
    "sign",
]
