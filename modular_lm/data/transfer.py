"""One file over HTTP from the Hugging Face Hub to disk: continued, retried and verified.

`huggingface_hub` provides addresses, headers, the session and its errors. Its own download function
writes to a temporary file that only its process knows, and removes it on any failure; a job that
is killed would begin its file again. So the bytes are received here, into `<file>.part`, which
any later process continues. Which files belong to a data set is the business of
`modular_lm.data.hub`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from modular_lm.errors import DataError, RunFailedError, reason
from modular_lm.files import full_disk_named, sync

log = logging.getLogger(__name__)

PART = ".part"
_TRIES = 6  # in a row without a byte received: half a minute and more
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
_LONGEST_ASKED = 3600.0  # a server that asks for longer is not waited for so long
_SPOILED_TRIES = 2  # of a whole file whose content is not what the Hub says it is
_LOG_SECONDS = 5.0


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit.

    path: within the repository. size: in bytes. sha256: hex, of large files only. blob: git's
    name of the content, hex, which only for other files is a hash of it.
    """

    path: str
    size: int
    sha256: str | None
    blob: str


class Unreachable(RunFailedError):
    """The Hub gives no answer, or may not be asked."""


class Stopped(Exception):
    """Another transfer of the same download has failed."""


class Transfers:
    """What the transfers of one download share: its name, whether to stop, and the progress."""

    def __init__(self, what: str, files: int, size: int) -> None:
        """`size`: of all files together, in bytes."""
        self.what, self.stop = what, threading.Event()
        self._files, self._size = files, size
        self._files_done = self._bytes_done = self._received = 0
        self._lock = threading.Lock()
        self._start = self._logged = time.monotonic()

    def present(self, size: int) -> None:
        """Bytes that are on disk already; negative if they have to be received again."""
        with self._lock:
            self._bytes_done += size

    def received(self, size: int) -> None:
        """Bytes that have come. Raises Stopped if the download has failed elsewhere."""
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._bytes_done += size
            self._received += size
            self._log(last=False)

    def finished(self) -> None:
        """A file is whole."""
        with self._lock:
            self._files_done += 1
            self._log(last=self._files_done == self._files)

    def _log(self, *, last: bool) -> None:
        now = time.monotonic()
        if not last and now - self._logged < _LOG_SECONDS:
            return
        self._logged = now
        seconds = max(now - self._start, 1e-3)
        rate = self._received / seconds
        text = (
            f"download {self.what}: {self._files_done:,}/{self._files:,} files, "
            f"{self._bytes_done / 1e6:,.1f}/{self._size / 1e6:,.1f} MB in {seconds:,.0f} s, "
            f"{rate / 1e6:,.1f} MB/s"
        )
        if not last and rate:
            text += f", {(self._size - self._bytes_done) / rate:,.0f} s left"
        log.info(text)


class Retries:
    """Waits between failed attempts: as long as the server asks, else longer and longer."""

    def __init__(self, what: str, stop: threading.Event, tries: int = _TRIES) -> None:
        self._what, self._stop, self._tries = what, stop, tries
        self._failed = 0

    def progress(self) -> None:
        """An attempt has brought something: failures are counted anew."""
        self._failed = 0

    def wait(self, error: Exception) -> None:
        """Wait before the next attempt after `error`.

        Raises DataError for an answer that will not change, Unreachable if there was none for too
        often, RunFailedError if there were too many failures, Stopped if the download has failed.
        """
        status = _status(error)
        if status is not None and status < 500 and status not in (408, 429):
            raise refused(self._what, status, error) from error
        offline = type(error).__name__ == "OfflineModeIsEnabled"
        self._failed += 1
        if offline or self._failed >= self._tries:
            why = "HF_HUB_OFFLINE is set" if offline else reason(error)
            kind = Unreachable if status is None else RunFailedError
            raise kind(f"{self._what}: {why}") from error
        seconds = _asked_for(error)
        if seconds is None:
            seconds = min(_FIRST_WAIT * 2 ** (self._failed - 1), _LONGEST_WAIT)
        log.warning("%s: %s; trying again in %.0f s", self._what, reason(error), seconds)
        if self._stop.wait(seconds):
            raise Stopped


def refused(what: str, status: int, error: Exception) -> DataError:
    """The message for an answer of the Hub that says no."""
    if status in (401, 403):
        return DataError(
            f"{what}: the Hub refuses access ({status}): accept the licence on the page of the "
            "repository if it is gated, and set HF_TOKEN to a token that may read it"
        )
    if status == 404:
        return DataError(f"{what}: the Hub does not have it ({reason(error)})")
    return DataError(f"{what}: {reason(error)}")


def transient() -> tuple[type[Exception], ...]:
    """The exceptions after which `Retries.wait` decides how to go on."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    return (httpx2.HTTPError, OfflineModeIsEnabled)  # the Hub's own errors are of the first, too


def fetch(url: str, file: HubFile, target: Path, transfers: Transfers) -> None:
    """Bring `file` from `url` to `target`, which appears when all of it is there and verified.

    Continues what an earlier call left in `<target>.part`. Raises DataError if the Hub refuses,
    RunFailedError if it fails for too long or sends something else than it lists.
    """
    part = target.with_name(target.name + PART)
    retries = Retries(f"{transfers.what}: {file.path}", transfers.stop)
    spoiled = 0
    with full_disk_named(part):
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                found = _receive(url, file, part, transfers, retries)
            except transient() as error:
                retries.wait(error)
                continue
            if found is None:
                break
            spoiled += 1
            _discard(part, transfers)
            if spoiled >= _SPOILED_TRIES:
                raise RunFailedError(
                    f"{transfers.what}: {file.path} came {spoiled} times with {found}; "
                    "run the same command again later"
                )
            log.warning("%s: %s came with %s; trying again", transfers.what, file.path, found)
        sync(part)
        os.replace(part, target)
        sync(target.parent)
    transfers.finished()


def _receive(
    url: str, file: HubFile, part: Path, transfers: Transfers, retries: Retries
) -> str | None:
    """Append to `part` what it lacks; what is wrong with the whole, or None.

    What is in `part` counts as present in `transfers` when this returns or raises.
    """
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    part.touch()
    start = part.stat().st_size
    if start >= file.size:
        return _difference(file, part)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream(
        "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        if start and not _continues(response, start):
            start = _discard(part, transfers)
        # Without a buffer, so that what has come outlives the process.
        with open(part, "ab", buffering=0) as out:
            for chunk in response.iter_bytes():
                out.write(chunk)
                transfers.received(len(chunk))
                retries.progress()
                start += len(chunk)
                if start > file.size:
                    break
    return _difference(file, part)


def _continues(response: Any, start: int) -> bool:
    ranges = response.headers.get("Content-Range", "")
    return response.status_code == 206 and ranges.startswith(f"bytes {start}-")


def _discard(part: Path, transfers: Transfers) -> int:
    """Empty `part`; its new size."""
    transfers.present(-part.stat().st_size)
    os.truncate(part, 0)
    return 0


def _difference(file: HubFile, part: Path) -> str | None:
    """How `part` differs from what the Hub lists, or None."""
    size = part.stat().st_size
    if size != file.size:
        return f"{size:,} bytes instead of {file.size:,}"
    with open(part, "rb") as stream:
        if file.sha256 is not None:
            name, expected = "sha256", file.sha256
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        else:
            name, expected = "git hash", file.blob
            digest = hashlib.sha1(f"blob {size}\0".encode())
            digest.update(stream.read())
            found = digest.hexdigest()
    return None if found == expected else f"{name} {found[:12]} instead of {expected[:12]}"


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _asked_for(error: Exception) -> float | None:
    """Seconds that the server asks to wait: by its rate limit's window, else by Retry-After."""
    from huggingface_hub.utils import parse_ratelimit_headers

    response = getattr(error, "response", None)
    if response is None:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return min(float(limit.reset_in_seconds), _LONGEST_ASKED)
    seconds = _seconds(response.headers.get("Retry-After", ""))
    return None if seconds is None else min(seconds, _LONGEST_ASKED)


def _seconds(retry_after: str) -> float | None:
    """What a Retry-After asks for: seconds or a date (RFC 9110, section 10.2.3)."""
    with contextlib.suppress(ValueError, OverflowError):
        return max(0.0, float(int(retry_after)))
    with contextlib.suppress(ValueError, OverflowError):
        left = parsedate_to_datetime(retry_after).timestamp() - time.time()
        return max(0.0, left)
    return None
