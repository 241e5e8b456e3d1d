"""The Hugging Face Hub, by ``huggingface_hub``: a push is one commit, a pull is of one commit."""

from __future__ import annotations

import re
from itertools import islice

from ..errors import ShippingError, UsageError
from ..patch.container import MAX_FILE_BYTES
from .needs import needed
from .places import BESIDE, MAX_BESIDE, Parcel, all_of, failed, most_of

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_FILE = r"[A-Za-z0-9_+ -][A-Za-z0-9_.+ -]*"  # no name that begins with a dot, so no way upwards
_REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./-]*"
_NAME = re.compile(
    rf"hf://(?:(?P<kind>models|datasets|spaces)/)?(?P<repo>{_PART}/{_PART})"
    rf"(?:@(?P<before>{_PART}))?/(?P<path>{_FILE}(?:/{_FILE})*)(?:@(?P<after>{_REVISION}))?"
)
_MOST_LISTED = 10_000
_CURE = "Is it there, and may you? `hf auth login`, or HF_TOKEN, says who."


class HubFile:
    """``hf://[datasets/]owner/repo/path.st[@revision]``; the revision may also follow the repo."""

    def __init__(self, url: str) -> None:
        found = _NAME.fullmatch("hf" + url[2:])
        if found is None or (found["before"] and found["after"]):
            raise UsageError(
                f"{url} names no file of a repository.", "Write hf://owner/repo/path.st@revision."
            )
        self.url = url
        self._prefix = f"hf://{found['kind']}/" if found["kind"] else "hf://"
        self._repo, self._path = found["repo"], found["path"]
        self._revision = found["before"] or found["after"]
        self._kind = (found["kind"] or "models").removesuffix("s")
        self._hub = needed("huggingface_hub")
        self._api = self._hub.HfApi()

    def send(self, parcel: Parcel) -> str:
        """All of it or nothing, in one commit; the URL returned names that commit."""
        given = {"": parcel.data, **parcel.beside}
        adding = [
            self._hub.CommitOperationAdd(path_in_repo=self._path + suffix, path_or_fileobj=data)
            for suffix, data in given.items()
        ]
        try:
            commit = self._api.create_commit(
                self._repo,
                adding,
                commit_message=f"Add {self._path.rpartition('/')[2]}",
                repo_type=self._kind,
                revision=self._revision,
            )
        except Exception as error:  # the library's, its HTTP client's, and the Hub's odd answers
            raise failed(f"Can't push to {self.url}", error, _CURE) from error
        return f"{self._prefix}{self._repo}/{self._path}@{commit.oid}"

    def fetch(self) -> Parcel:
        """The file and those beside it, all of the commit that the revision is now."""
        try:
            commit = self._api.repo_info(
                self._repo, repo_type=self._kind, revision=self._revision
            ).sha
            data = self._read(self._path, commit, MAX_FILE_BYTES)
            beside = {
                suffix: self._read(self._path + suffix, commit, most_of(suffix))
                for suffix in self._suffixes(commit)[:MAX_BESIDE]
            }
        except ShippingError:
            raise
        except Exception as error:
            raise failed(f"Can't pull from {self.url}", error, _CURE) from error
        return Parcel(data, beside)

    def _suffixes(self, commit: str) -> list[str]:
        folder = self._path.rpartition("/")[0] or None
        listed = self._api.list_repo_tree(self._repo, folder, repo_type=self._kind, revision=commit)
        names = [str(one.path) for one in islice(listed, _MOST_LISTED)]
        suffixes = [one[len(self._path) :] for one in names if one.startswith(self._path)]
        return sorted(one for one in suffixes if BESIDE.fullmatch(one))

    def _read(self, path: str, commit: str, most: int) -> bytes:
        # As a stream: a download to the library's cache would end where the Hub wants it to.
        kind = "" if self._kind == "model" else f"{self._kind}s/"
        files = self._hub.HfFileSystem()
        place = f"{kind}{self._repo}@{commit}/{path}"
        with files.open(place, "rb", block_size=0) as file:
            return all_of(file, most, self.url)
