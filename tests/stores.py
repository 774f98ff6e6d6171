"""Stand-ins for the places that models come from: the Hugging Face Hub and Google Cloud Storage, as local servers."""

import collections
import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

TOKEN = "hf_donttellanybody"
SIGNATURE = "Signature=donttellanybody"
Files = dict[str, bytes]
Answer = tuple[int, bytes, dict[str, str]]


def files_of(folder: pathlib.Path) -> Files:
    """The files of a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Store:
    """What a server has, and what was asked of it.

    Attributes:
        asked: Method and path of every request.
        status: Answers everything with this code, unless it is 0.
    """

    def __init__(self):
        self.asked: list[str] = []
        self.status = 0
        self.url = ""

    def answer(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes = b"") -> Answer:
        """Code, content and headers of an answer."""
        raise NotImplementedError

    def names(self, method: str = "GET") -> list[str]:
        """Last parts of the paths that were asked for."""
        return [
            urllib.parse.unquote(path).rpartition("/")[2]
            for one, path in (line.split(" ", 1) for line in self.asked)
            if one == method
        ]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Answers at `url` while the block lasts."""
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer is one write: in two, the second one would wait for the first to be acknowledged

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                url = urllib.parse.urlsplit(self.path)
                path = url.path
                store.asked.append(f"{self.command} {path}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                code, content, headers = store.status, b"{}", {}
                if not code:
                    query = dict(urllib.parse.parse_qsl(url.query))
                    code, content, headers = store.answer(self.command, path, query, self.headers, body)
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if wanted and code == 200:
                    begin, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
                    headers |= {"Content-Range": f"bytes {begin}-{end}/{len(content)}"}
                    code, content = (206, content[begin : end + 1]) if begin < len(content) else (416, b"")
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_DELETE = do_HEAD  # noqa: N815

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}"
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


class Hub(Store):
    """The part of the Hub's API that its client asks for a model.

    Attributes:
        gated: Repositories that only `TOKEN` opens.
    """

    def __init__(self):
        super().__init__()
        self.gated: set[str] = set()
        self._commits: dict[str, dict[str, Files]] = collections.defaultdict(dict)
        self._names: dict[tuple[str, str], str] = {}

    def push(self, repository: str, files: Files, name: str = "main") -> str:
        """A new commit that a branch or tag points to from now on."""
        content = repr(sorted(files.items())) + str(len(self._commits[repository]))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self._commits[repository][commit] = files
        self._names[repository, name] = commit
        return commit

    def answer(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes = b"") -> Answer:
        """As huggingface.co does."""
        asked = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        if path.startswith("/blobs/"):
            return self._blob(path.removeprefix("/blobs/"))
        if asked is None or asked[1] not in self._commits:
            return 401, b"{}", {"X-Error-Code": "RepoNotFound"}
        repository, kind, revision, file = (part and urllib.parse.unquote(part) for part in asked.groups())
        commit = self._names.get((repository, revision or "main"), revision)
        if commit not in self._commits[repository]:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        files = self._commits[repository][commit]
        token = headers.get("Authorization", "")
        if token and token != f"Bearer {TOKEN}":
            return 401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"}
        if kind in (None, "revision"):
            return 200, json.dumps({"id": repository, "sha": commit, "siblings": []}).encode(), {}
        if repository in self.gated and not token:
            return 401, b"{}", {"X-Error-Code": "GatedRepo"}
        if kind == "tree":
            return 200, json.dumps([self._entry(name, content) for name, content in files.items()]).encode(), {}
        etag = _sha256(files[file])
        found = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if not file.endswith(".safetensors"):
            return 200, files[file], found
        found |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(files[file]))}
        elsewhere = self.url.replace("127.0.0.1", "localhost")  # large files lie on another host
        return 302, b"", found | {"Location": f"{elsewhere}/blobs/{etag}?{SIGNATURE}"}

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _sha256(content)[:40]}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    def _blob(self, etag: str) -> tuple[int, bytes, dict[str, str]]:
        every = (
            content for commits in self._commits.values() for files in commits.values() for content in files.values()
        )
        return 200, next(content for content in every if _sha256(content) == etag), {}


class Bucket(Store):
    """The part of Google Cloud Storage's JSON API that TensorStore asks for: `gs://bucket/…`.

    Attributes:
        broken: Names of files whose content nobody may read.
        refuses: Names of files that nobody may write.
        read_only: Whether nothing may be written.
        written: Method and name of all that was written or removed.
    """

    def __init__(self):
        super().__init__()
        self._objects: dict[str, tuple[bytes, int]] = {}
        self._generation = 1_700_000_000_000_000
        self._one = threading.RLock()  # a request after the other
        self.broken: set[str] = set()
        self.refuses: set[str] = set()
        self.read_only = False
        self.written: list[str] = []

    def write(self, folder: str, files: Files) -> None:
        """Writes files to `gs://bucket/<folder>`; each gets a new generation."""
        with self._one:
            for name, content in files.items():
                self._generation += 1
                self._objects[f"{folder}/{name}".lstrip("/")] = content, self._generation

    def files(self, folder: str) -> Files:
        """The files of `gs://bucket/<folder>`, by name."""
        with self._one:
            return {
                name.removeprefix(f"{folder}/"): content
                for name, (content, _) in self._objects.items()
                if name.startswith(f"{folder}/")
            }

    def remove(self, folder: str, *names: str) -> None:
        """Removes files of `gs://bucket/<folder>`."""
        with self._one:
            for name in names:
                del self._objects[f"{folder}/{name}"]

    def answer(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes = b"") -> Answer:
        """As storage.googleapis.com does."""
        asked = re.fullmatch(r"(/upload)?/storage/v1/b/bucket/o(?:/(.+))?", path)
        if asked is None:
            return 404, b"{}", {}
        with self._one:
            if method == "GET" and asked[2] is None:
                return self._listed(query)
            name = urllib.parse.unquote(asked[2] or query["name"])
            content, generation = self._objects.get(name, (b"", 0))
            if method != "GET" and (self.read_only or name.rpartition("/")[2] in self.refuses):
                return 403, b"{}", {}
            if query.get("ifGenerationMatch", str(generation)) != str(generation):
                return 412, b"{}", {}
            if method != "GET" and (generation or method == "POST"):
                self.written.append(f"{method} {name}")
            if method == "POST":
                self._generation += 1
                content, generation = self._objects[name] = body, self._generation
                return 200, _described(name, content, generation), {}
            if not generation:
                return 404, b"{}", {}
            if method == "DELETE":
                del self._objects[name]
                return 204, b"", {}
            if query.get("ifGenerationNotMatch") == str(generation):
                return 304, b"", {}
            if query["alt"] == "json":
                return 200, _described(name, content, generation), {}
            if name.rpartition("/")[2] in self.broken:
                return 403, b"{}", {}
            return 200, content, {"x-goog-generation": str(generation)}

    def _listed(self, query: dict[str, str]) -> Answer:
        """A page of names; the next one begins with the name that its token is."""
        begin, end = query.get("pageToken") or query.get("startOffset", ""), query.get("endOffset") or "\U0010ffff"
        names = sorted(name for name in self._objects if begin <= name < end)
        said: dict[str, Any] = {"items": [{"name": name} for name in names[:_PAGE]]}
        if names[_PAGE:]:
            said["nextPageToken"] = names[_PAGE]
        return 200, json.dumps(said).encode(), {}


def _described(name: str, content: bytes, generation: int) -> bytes:
    said = {"name": name, "size": str(len(content)), "generation": str(generation), "timeCreated": _TIME}
    return json.dumps(said | {"updated": _TIME}).encode()


_PAGE = 50  # names; the real one's are of 1000
_TIME = "2026-01-01T00:00:00.000Z"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
