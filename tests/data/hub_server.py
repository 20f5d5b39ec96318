"""A small Hugging Face Hub on loopback: what its client asks when it lists and downloads files.

Like the real one it redirects the content of large files to another origin, answers ranges, lists
folders in pages and lets only the bearers of a token read gated repositories. Faults are queued
for a file, or for the listing, and used up one per request.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

LISTING = "listing"
TOKEN = "hf_a_token_of_the_tests"
_PAGE = 2


@dataclass(frozen=True)
class Status:
    """Answer with this status instead."""

    code: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """Break the connection after so many bytes of content; `reset`: as a crash does."""

    after: int
    reset: bool = False


@dataclass(frozen=True)
class Stall:
    """Send so many bytes of content, then nothing until the client goes away."""

    after: int


@dataclass(frozen=True)
class Garbage:
    """Send this instead of the content."""

    content: bytes


@dataclass(frozen=True)
class Whole:
    """Ignore a range that is asked for, as some proxies do."""


Fault = Status | Cut | Stall | Garbage | Whole


@dataclass
class Repo:
    """A repository: its commits' files, oldest first, `main` being the last."""

    name: str
    kind: str
    commits: dict[str, dict[str, bytes]]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        newest = list(self.commits)[-1]
        return newest if revision == "main" else revision if revision in self.commits else None


@dataclass
class Request:
    """What was asked, and how many bytes of a file's content were sent."""

    path: str
    range: str | None
    token: str | None
    sent: int = 0


class HubServer:
    """Serves `repos` while its block runs; `url` is for HF_ENDPOINT."""

    def __init__(self, *repos: Repo, small: int = 0) -> None:
        """small: files up to so many bytes are kept in git, not in large file storage."""
        self.repos = repos
        self.small = small
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self)) for _ in range(2)]
        self.url, self.storage = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def sent(self, path: str) -> int:
        """Bytes of content that were sent of a file, in all requests for it."""
        return sum(r.sent for r in self.requests if r.path == path)

    def ranges(self, path: str) -> list[str | None]:
        """The ranges that were asked of a file's content, in order."""
        return [r.range for r in self.requests if r.path == path]

    def next_fault(self, what: str) -> Fault | None:
        return self.faults[what].pop(0) if self.faults[what] else None


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_hub = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer of two writes takes 40 ms
    server_hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        if path.startswith("storage/"):
            self._storage(*path.removeprefix("storage/").split("/", 1))
            return
        for repo in self.server_hub.repos:
            api = f"api/{repo.kind}s/{repo.name}/"
            resolve = f"{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}/resolve/"
            if path.startswith(api) or f"{path}/" == api:
                self._api(repo, path.removeprefix(api.rstrip("/")).strip("/"), url.query)
                return
            if path.startswith(resolve):
                self._resolve(repo, *path.removeprefix(resolve).split("/", 1))
                return
        self._answer(404, {"X-Error-Code": "RepoNotFound"})

    # -------------------------------------------------------------- the API

    def _api(self, repo: Repo, rest: str, query: str) -> None:
        self.server_hub.requests.append(self._request(LISTING))
        fault = self.server_hub.next_fault(LISTING)
        if isinstance(fault, Status):
            self._answer(fault.code, fault.headers)
            return
        what, _, rest = rest.partition("/")
        revision, _, folder = (rest or "main").partition("/")
        commit = repo.commit(revision)
        if commit is None:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            self._tree(repo.commits[commit], folder, int(parse_qs(query).get("cursor", ["0"])[0]))
        else:
            siblings = [{"rfilename": path} for path in repo.commits[commit]]
            about = {"id": repo.name, "sha": commit, "siblings": siblings, "gated": repo.gated}
            self._json(about)

    def _tree(self, files: dict[str, bytes], folder: str, start: int) -> None:
        within = sorted(p for p in files if p.startswith(f"{folder}/" if folder else ""))
        if not within:
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        entries = [{"type": "directory", "path": folder or "x", "size": 0, "oid": "0" * 40}]
        entries += [self._entry(path, files[path]) for path in within]
        more = start + _PAGE < len(entries)
        here = f"{self.server_hub.url}{urlsplit(self.path).path}?recursive=True"
        link = {"Link": f'<{here}&cursor={start + _PAGE}>; rel="next"'} if more else {}
        self._json(entries[start : start + _PAGE], link)

    def _entry(self, path: str, content: bytes) -> dict[str, object]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if len(content) > self.server_hub.small:
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        return entry

    def _json(self, values: object, headers: dict[str, str] | None = None) -> None:
        self._answer(200, {"Content-Type": "application/json", **(headers or {})}, values)

    def _answer(self, code: int, headers: dict[str, str], values: object = None) -> None:
        body = b"" if values is None else json.dumps(values).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    # -------------------------------------------------------------- content

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = repo.commit(revision)
        content = None if commit is None else repo.commits[commit].get(path)
        if content is None or commit is None:
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
        elif repo.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer(401, {"X-Error-Code": "GatedRepo"})
        elif len(content) > self.server_hub.small:
            place = f"{self.server_hub.storage}/storage/{hashlib.sha256(content).hexdigest()}"
            sizes = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{git_hash(content)}"'}
            self._answer(302, {"Location": f"{place}/{path}", "X-Repo-Commit": commit, **sizes}, {})
        else:
            self._content(path, content)

    def _storage(self, sha: str, path: str) -> None:
        for repo in self.server_hub.repos:
            for files in repo.commits.values():
                content = files.get(path)
                if content is not None and hashlib.sha256(content).hexdigest() == sha:
                    self._content(path, content)
                    return
        self._answer(404, {})

    def _content(self, path: str, content: bytes) -> None:
        request = self._request(path)
        self.server_hub.requests.append(request)
        fault = self.server_hub.next_fault(path)
        if isinstance(fault, Status):
            self._answer(fault.code, fault.headers)
            return
        if isinstance(fault, Garbage):
            content = fault.content
        start = 0
        if request.range is not None and not isinstance(fault, Whole):
            start = int(request.range.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self._answer(416, {"Content-Range": f"bytes */{len(content)}"})
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{git_hash(content)}"')
        self.end_headers()
        stop = fault.after if isinstance(fault, Cut | Stall) else len(content)
        self._send(request, content[start:stop])
        if isinstance(fault, Stall):
            self.server_hub.closing.wait(60)
        if isinstance(fault, Cut | Stall):
            self._break(reset=isinstance(fault, Cut) and fault.reset)

    def _send(self, request: Request, content: bytes) -> None:
        for i in range(0, len(content), 1 << 14):
            self.wfile.write(content[i : i + (1 << 14)])
            request.sent += len(content[i : i + (1 << 14)])

    def _break(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:
            self.connection.shutdown(socket.SHUT_WR)

    def _request(self, path: str) -> Request:
        return Request(path, self.headers["Range"], self.headers["Authorization"])


def git_hash(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
