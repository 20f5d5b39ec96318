"""Folders of files that lie on a disk or in an object store, behind the same few operations.

A `Place` is a `pathlib.Path`, or a `RemotePath` for a URI such as `s3://bucket/run`: the part of
pathlib that checkpoints need, on fsspec. Only where the two differ is there a function here. An
object store has no folders and no rename, but it shows an object only when all of it has arrived.
Credentials and endpoints are taken from the environment, as the store's own tools take them.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from modular_lm.errors import ConfigError, RunFailedError, UserFacingError, reason
from modular_lm.files import full_disk_named, replacing

# The package of an fsspec protocol that is not among the dependencies -> how to install it.
_BACKENDS = {"s3": "'modular-lm[s3]'", "s3a": "'modular-lm[s3]'", "gs": "gcsfs", "gcs": "gcsfs"}
_REFUSALS = ("Credentials", "Forbidden", "Unauthorized", "Token", "Auth")


@dataclass(frozen=True, order=True)
class RemotePath:
    """A URI of an object store. What the store refuses or fails to do is raised as ConfigError
    (no such bucket, no permission) or RunFailedError (it cannot be reached), naming the URI."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.uri.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> RemotePath:
        """What this lies in."""
        return RemotePath(self.uri.rstrip("/").rsplit("/", 1)[0])

    def resolve(self) -> RemotePath:
        """Itself: a URI is absolute."""
        return self

    def is_file(self) -> bool:
        """Whether this object exists."""
        return self._type() == "file"

    def is_dir(self) -> bool:
        """Whether there are objects below this."""
        return self._type() == "directory"

    def exists(self) -> bool:
        """Whether this object exists, or objects below it."""
        return self._type() is not None

    def _type(self) -> str | None:
        # Not fs.isfile: it takes an unreachable store for the absence of the file.
        with self.reaching(), contextlib.suppress(FileNotFoundError):
            fs, path = self._fs()
            return fs.info(path)["type"]
        self._check_bucket()
        return None

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly below this; nothing where there is nothing."""
        found = None
        with self.reaching(), contextlib.suppress(FileNotFoundError):
            fs, path = self._fs()
            found = [entry["name"].rstrip("/") for entry in fs.ls(path, detail=True)]
            found = sorted({name.rsplit("/", 1)[-1] for name in found if name != path.rstrip("/")})
        if found is None:
            self._check_bucket()
        yield from (self / name for name in found or ())

    def open(self, mode: str = "rb") -> IO[bytes]:
        """A stream of this object's bytes. Raises FileNotFoundError."""
        with self.reaching():
            fs, path = self._fs()
            return fs.open(path, mode)

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        with self.reaching():
            fs, path = self._fs()
            return fs.cat_file(path)

    def read_text(self) -> str:
        """The whole object, in UTF-8. Raises FileNotFoundError."""
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, content: bytes) -> None:
        """Put the object in one request: readers see all of it or none."""
        with self.reaching():
            fs, path = self._fs()
            fs.pipe_file(path, content)

    def rename(self, target: RemotePath) -> None:
        """Copy, then delete: not atomic."""
        with self.reaching():
            fs, path = self._fs()
            fs.mv(path, target._fs()[1])

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete this object."""
        with self.reaching():
            fs, path = self._fs()
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: an object store has no folders. Here so that a place can be used as a Path."""

    def size(self) -> int:
        """Of this object, in bytes. Raises FileNotFoundError."""
        with self.reaching():
            fs, path = self._fs()
            return fs.size(path)

    def rmtree(self) -> None:
        """Delete all objects below this; none there is no mistake."""
        with self.reaching(), contextlib.suppress(FileNotFoundError):
            fs, path = self._fs()
            fs.rm(path, recursive=True)

    # ------------------------------------------------------------------ the backend

    def _fs(self) -> tuple[Any, str]:
        """The file system, and the path in it. One instance per process and thread, by fsspec."""
        from fsspec.core import url_to_fs

        # Listings kept from before would hide what other ranks have written since.
        return url_to_fs(self.uri, use_listings_cache=False)

    def _check_bucket(self) -> None:
        """Raise ConfigError if not even the bucket exists."""
        with self.reaching():
            fs, path = self._fs()
            bucket = path.split("/", 1)[0]
            try:
                if bucket:
                    fs.info(bucket)
            except FileNotFoundError:
                raise ConfigError(
                    f"{self.uri}: there is no bucket {bucket}; create it, or correct its name"
                ) from None

    @contextlib.contextmanager
    def reaching(self) -> Iterator[None]:
        """Turn what a backend raises into an error that says what to do."""
        try:
            yield
        except (FileNotFoundError, UserFacingError):
            raise
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> UserFacingError:
        protocol, kind = self.uri.split("://", 1)[0], type(error).__name__
        if isinstance(error, ImportError):
            package = _BACKENDS.get(protocol)
            install = f"pip install {package}" if package else reason(error)
            return ConfigError(
                f"{self.uri}: the package for {protocol}:// is not installed: {install}"
            )
        if isinstance(error, ValueError) and "rotocol" in str(error):
            return ConfigError(f"{self.uri}: {protocol}:// is no protocol that fsspec knows")
        if isinstance(error, PermissionError) or any(word in kind for word in _REFUSALS):
            return ConfigError(
                f"{self.uri}: the store refuses access: {reason(error)}; check the credentials in "
                "the environment and their rights on the bucket"
            )
        return RunFailedError(f"{self.uri}: the store cannot be reached or fails: {reason(error)}")


Place: TypeAlias = Path | RemotePath


def is_uri(text: str) -> bool:
    """Whether a path given by a user names an object store."""
    return "://" in text and not text.startswith("file://")


def place(text: str) -> Place:
    """The place that a user named: a URI, or a path with `~` for the home folder."""
    if is_uri(text):
        return RemotePath(text.rstrip("/"))
    return Path(text.removeprefix("file://")).expanduser()


def write_text(target: Place, text: str) -> None:
    """Write a file so that readers, and a crash, find all of it or what was there before."""
    write_bytes(target, text.encode("utf-8"))


def write_bytes(target: Place, content: bytes) -> None:
    """`write_text` of bytes."""
    if isinstance(target, RemotePath):
        target.write_bytes(content)
    else:
        with replacing(target) as file:
            file.write(content)


def size_of(file: Place) -> int:
    """In bytes. Raises FileNotFoundError."""
    return file.size() if isinstance(file, RemotePath) else file.stat().st_size


def remove_folder(folder: Place) -> None:
    """Delete a folder and all files in it, as far as that is possible."""
    if isinstance(folder, RemotePath):
        folder.rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(folder: Place, key: str) -> None:
    """Write and delete a small object. Raises ConfigError or RunFailedError, naming `key`.

    Else the first checkpoint would find that a right is missing.
    """
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with full_disk_named(folder) if isinstance(folder, Path) else contextlib.nullcontext():
            probe.write_bytes(b"can this be written?")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{key}={folder}: cannot be written: {reason(error)}") from error
    except UserFacingError as error:
        raise type(error)(f"{key}={error}") from error


@functools.lru_cache
def local_copy(file: Place) -> Path:
    """A file on this machine's disk: itself, or a copy that lasts as long as this process."""
    if isinstance(file, Path):
        return file
    copy = Path(_copies().name) / f"{len(list(Path(_copies().name).iterdir()))}_{file.name}"
    copy.write_bytes(file.read_bytes())
    return copy


@functools.cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="modular-lm-")
