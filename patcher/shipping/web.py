"""``https://``: fsspec's, but read as one stream: a range may be answered with any length.

What lies beside a patch is found where the server lists the folder, or is called ``P.st.sig``.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from ..errors import ShippingError
from .anywhere import Anywhere
from .places import BESIDE, MAX_BESIDE, most_of

_MAX_LISTING_BYTES = 1 << 20


class WebFile(Anywhere):
    """A URL of a web server, which is sent to by ``PUT``."""

    def _open(self, path: str) -> Any:
        return self._fs.open(path, "rb", block_size=0)

    def _beside(self) -> dict[str, bytes]:
        listed = self._suffixes()[:MAX_BESIDE]
        beside = {one: self._read(self._path + one, most_of(one)) for one in listed}
        if not beside:
            with suppress(ShippingError):  # many patches have none
                beside[".sig"] = self._read(self._path + ".sig", most_of(".sig"))
        return beside

    def _suffixes(self) -> list[str]:
        folder, _, name = self._path.rpartition("/")
        try:
            page = self._read(f"{folder}/", _MAX_LISTING_BYTES).decode(errors="replace")
        except ShippingError:
            return []
        links = re.findall(rf"""["'/]{re.escape(name)}([\w.@+-]+)["']""", page)
        return sorted({one for one in links if BESIDE.fullmatch(one)})
