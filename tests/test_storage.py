"""The same operations on a disk and in an object store, and what a store's failures say."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest

from modular_lm.errors import ConfigError, RunFailedError
from modular_lm.storage import (
    Place,
    RemotePath,
    check_writable,
    is_uri,
    local_copy,
    place,
    remove_folder,
    size_of,
    write_text,
)


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return tmp_path if request.param == "disk" else place(f"memory://{uuid.uuid4().hex}/run")


def names(folder: Place) -> list[str]:
    return sorted(inner.name for inner in folder.iterdir())


def test_files_come_and_go(root: Place) -> None:
    folder = root / "a"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "x", "first")
    write_text(folder / "x", "second é")
    assert (folder / "x").read_text() == "second é"
    assert size_of(folder / "x") == 9
    with (folder / "y").open("wb") as stream:
        stream.write(b"12")
        stream.write(b"3")
    assert (folder / "y").read_bytes() == b"123"
    assert names(folder) == ["x", "y"]
    assert names(root) == ["a"]
    assert (folder.is_dir(), folder.is_file()) == (True, False)
    assert ((folder / "x").is_dir(), (folder / "x").is_file()) == (False, True)
    (folder / "x").rename(folder / "z")  # type: ignore[arg-type]
    assert names(folder) == ["y", "z"]
    (folder / "z").unlink()
    (folder / "z").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "z").read_bytes()
    remove_folder(folder)
    remove_folder(folder)
    assert not folder.exists()
    assert names(root) == []


def test_what_a_user_writes_becomes_a_place() -> None:
    assert place("s3://bucket/run/") == RemotePath("s3://bucket/run")
    assert place("file:///x/y") == Path("/x/y")
    assert place("~/x") == Path.home() / "x"
    assert [is_uri(text) for text in ("gs://b", "a/b", "file:///x")] == [True, False, False]
    remote = place("s3://bucket/run")
    assert (str(remote / "5"), (remote / "5").name) == ("s3://bucket/run/5", "5")
    assert (remote / "5").parent == remote == remote.resolve()


def test_a_remote_file_is_copied_once(root: Place) -> None:
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / "tokenizer.model", "x")
    copy = local_copy(root / "tokenizer.model")
    assert copy.read_text() == "x"
    assert copy == local_copy(root / "tokenizer.model")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"^gs://b/x: .* not installed: pip install gcsfs$"):
        place("gs://b/x").is_file()
    with pytest.raises(ConfigError, match=r"^nosuch://b/x: nosuch:// is no protocol"):
        list(place("nosuch://b/x").iterdir())


def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder", "checkpoint.path")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    for where in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(ConfigError, match=f"^checkpoint.path={where}: cannot be written"):
            check_writable(where, "checkpoint.path")


def test_a_store_that_is_not_writable_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    folder = place(f"memory://{uuid.uuid4().hex}")
    check_writable(folder, "checkpoint.path")
    assert names(folder) == []

    def refuse(*args: object, **kwargs: object) -> None:
        raise refusal

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    refusal: Exception = PermissionError("Access Denied")
    with pytest.raises(ConfigError, match=r"^checkpoint.path=memory.*Access Denied.*credentials"):
        check_writable(folder, "checkpoint.path")
    refusal = TimeoutError("connect timed out")
    with pytest.raises(RunFailedError, match="cannot be reached or fails: connect timed out"):
        check_writable(folder, "checkpoint.path")
