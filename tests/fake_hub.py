"""
Hubs on this machine, as huggingface_hub's client speaks to them: one that serves folders, and one that is written to.
"""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """Serves the folder `root`/OWNER/MODEL as a model; `gated/...` exists, but not for everybody."""

    root: Path
    asked: list[str]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        self.asked.append(f"{self.command} {self.path}")
        if parts[:2] == ["api", "models"]:
            return self._answer_model(parts[2:])
        if "resolve" in parts:
            return self._answer_file(parts)
        return self._send(404)

    def _answer_model(self, parts: list[str]) -> None:
        folder, revision = self.root / "/".join(parts[:2]), parts[3] if parts[2:3] == ["revision"] else "main"
        if self._refused(folder, parts[0], revision):
            return None
        files = [{"rfilename": path.relative_to(folder).as_posix()} for path in folder.rglob("*") if path.is_file()]
        about = {"id": "/".join(parts[:2]), "sha": COMMIT, "private": False, "siblings": files}
        return self._send(200, json.dumps(about).encode())

    def _answer_file(self, parts: list[str]) -> None:
        at = parts.index("resolve")
        folder, path = self.root / "/".join(parts[:at]), self.root / "/".join(parts[:at] + parts[at + 2 :])
        if self._refused(folder, parts[0], parts[at + 1]):
            return None
        if not path.is_file():
            return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._send(200, content, headers)

    def _refused(self, folder: Path, owner: str, revision: str) -> bool:
        if owner == "gated":
            self._send(403, headers={"X-Error-Code": "GatedRepo"})
        elif not folder.is_dir():
            self._send(401, headers={"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def sailvit(home: Path, *arguments: object, endpoint: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command, with caches of its own; without an endpoint, offline."""
    environment = {
        **os.environ,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    environment |= {"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "sailvit_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the address, and the requests as they come in."""
    handler = type("Hub", (_Hub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()


TOKEN = "hf_" + "loopbackTOKEN" * 2
OWNER = "somebody"


@dataclass
class Fault:
    """
    Something that goes wrong.

    Attributes:
        request: Which requests it befalls: a pattern for "METHOD /path".
        how: A status; "cut" breaks the connection after `at` bytes of the body, "lose" before the answer but after the
            deed, "flip" changes a byte of the body, "hang" holds the request until the Hub is closed.
        times: How many requests.
        at: A byte of the body.
        message: What the Hub says of a status.
        code: Its X-Error-Code.
    """

    request: str
    how: int | str
    times: int = 1
    at: int = 0
    message: str = "no"
    code: str = ""


@dataclass
class Commit:
    """A commit: name -> content; of large files, the sha256 that the commit named -> what had arrived."""

    files: dict[str, bytes]
    title: str = "initial commit"
    body: str = ""
    large: dict[str, str] = field(default_factory=dict)

    def tree(self) -> list[dict[str, object]]:
        entries = []
        for path, content in self.files.items():
            blob, entry = git_name(content), {"type": "file", "path": path, "size": len(content)}
            if path in self.large:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append({**entry, "oid": blob})
        return entries


@dataclass
class Repository:
    """A model, its references to commits, and the commits in the order in which they were made."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, commit: Commit) -> str:
        content = json.dumps([*map(git_name, commit.files.values()), *commit.files, len(self.commits)])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid], self.refs[ref] = commit, oid
        return oid

    def find(self, revision: str) -> str | None:
        found = self.refs.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)


class WritableHub:
    """
    A Hub that takes what huggingface_hub's client sends it, keeps it in memory, and fails where it is told to.

    Attributes:
        repositories: By their names.
        objects: Large files that have arrived, by the sha256 that was claimed.
        faults: What will go wrong; one that has happened is taken off.
        asked: The requests, as they came in.
        served: The bytes of files that were sent, by name.
        role: Of the token: "write" or "read".
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.served: Counter[str] = Counter()
        self.role = "write"
        self.address = ""
        self.reached = threading.Event()  # a request that hangs
        self.closed = threading.Event()
        self.lock = threading.Lock()

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.request, request):
                    fault.times -= 1
                    return fault
        return None

    def asked_for(self, pattern: str) -> int:
        """How many requests were like that."""
        return sum(bool(re.search(pattern, request)) for request in self.asked)


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Cut(Exception):  # noqa: N818
    """The connection is broken."""


class _Answer(Exception):  # noqa: N818
    """A status that is answered instead."""

    def __init__(self, status: int, message: str, code: str = "", url: str = ""):
        self.status, self.message, self.code, self.url = status, message, code, url


class _WritableHub(BaseHTTPRequestHandler):
    """One function for each thing that is asked; ROUTES says which."""

    hub: WritableHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *arguments: object) -> None:
        pass

    def _handle(self) -> None:
        address = urlsplit(self.path)
        self.asked, self.query = unquote(address.path), parse_qs(address.query)
        request = f"{self.command} {self.asked}"
        self.hub.asked.append(request)
        fault = self.hub.take_fault(request)
        try:
            self._body = self._read_body(fault)
            self._fail(fault)
            content, headers = self._find_route()
        except _Cut:
            return self._break()
        except _Answer as answer:
            error = json.dumps({"error": answer.message, "url": answer.url}).encode()
            headers = {"X-Error-Message": answer.message, **({"X-Error-Code": answer.code} if answer.code else {})}
            return self._send(answer.status, error, headers)
        if fault and fault.how == "lose":
            return self._break()
        return self._send(206 if "Content-Range" in headers else 200, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _read_body(self, fault: Fault | None) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.how == "cut":
            self.rfile.read(min(fault.at, length))
            raise _Cut
        body = self.rfile.read(length) if length else self._read_chunks()
        if fault and fault.how == "flip":
            at = fault.at % len(body)
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        return body

    def _read_chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, fault: Fault | None) -> None:
        if fault and isinstance(fault.how, int):
            raise _Answer(fault.how, fault.message, fault.code)
        if fault and fault.how == "hang":
            self.hub.reached.set()
            self.hub.closed.wait(60)
            raise _Cut

    def _break(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _find_route(self) -> tuple[bytes, dict[str, str]]:
        for pattern, name in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {self.asked}"):
                found = getattr(self, name)(**match.groupdict())
                return found if isinstance(found, tuple) else (json.dumps(found).encode(), {})
        raise _Answer(404, f"{self.command} {self.asked}: nothing is here")

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except OSError:  # whoever asked is gone
            self.close_connection = True

    def _json(self) -> dict:
        return json.loads(self._body)

    def _check_token(self, role: str = "read") -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Answer(401, "Invalid credentials in Authorization header")
        if role == "write" and self.hub.role == "read":
            raise _Answer(403, "the token is for reading")

    def _repository(self, repo: str) -> Repository:
        if repo not in self.hub.repositories:
            raise _Answer(404, "Repository not found", "RepoNotFound")
        if self.hub.repositories[repo].private:
            self._check_token()
        return self.hub.repositories[repo]

    def _commit(self, repo: str, revision: str | None) -> tuple[str, Commit]:
        repository = self._repository(repo)
        oid = repository.find(revision or "main")
        if oid is None:
            raise _Answer(404, "Invalid rev id", "RevisionNotFound")
        return oid, repository.commits[oid]

    def whoami(self) -> dict:
        self._check_token()
        return {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": self.hub.role}}}

    def create(self) -> dict:
        self._check_token("write")
        asked = self._json()
        repo = f"{asked['organization'] or OWNER}/{asked['name']}"
        if repo in self.hub.repositories:
            raise _Answer(409, "You already created this model repo", url=f"{self.hub.address}/{repo}")
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[repo] = Repository(private)
        self.hub.repositories[repo].add("main", Commit({".gitattributes": b"*.safetensors filter=lfs\n"}))
        return {"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo}

    def about(self, repo: str, revision: str | None = None) -> dict:
        oid, commit = self._commit(repo, revision)
        files = [{"rfilename": path} for path in commit.files]
        return {"id": repo, "sha": oid, "private": self.hub.repositories[repo].private, "siblings": files}

    def tree(self, repo: str, revision: str, path: str | None = None) -> list:
        if path:
            raise _Answer(404, "no such folder", "EntryNotFound")
        return self._commit(repo, revision)[1].tree()

    def paths_info(self, repo: str, revision: str) -> list:
        asked = parse_qs(self._body.decode())["paths"]
        return [entry for entry in self._commit(repo, revision)[1].tree() if entry["path"] in asked]

    def list_refs(self, repo: str) -> dict:
        repository = self._repository(repo)

        def told(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        branches = {name: oid for name, oid in repository.refs.items() if not name.startswith("refs/pr/")}
        return {"branches": told(branches, "heads"), "tags": told(repository.tags, "tags"), "converts": []}

    def list_discussions(self, repo: str) -> dict:
        pulls = [ref.split("/")[-1] for ref in self._repository(repo).refs if ref.startswith("refs/pr/")]
        common = {"status": "open", "isPullRequest": True, "author": {"name": OWNER}}
        common |= {"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": repo, "type": "model"}}
        found = [{"num": int(number), "title": "a pull request", **common} for number in pulls]
        return {"discussions": found, "count": len(found), "start": 0}

    def preupload(self, repo: str, revision: str) -> dict:
        self._check_token("read" if "create_pr" in self.query else "write")
        self._commit(repo, revision)
        modes = {file["path"]: "lfs" if is_large(file["path"]) else "regular" for file in self._json()["files"]}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def batch(self, repo: str) -> dict:
        self._check_token()
        answers = []
        for asked in self._json()["objects"]:
            answer, oid = {"oid": asked["oid"], "size": asked["size"]}, asked["oid"]
            if hashlib.sha256(self.hub.objects.get(oid, b"")).hexdigest() != oid:
                verify = {"href": f"{self.hub.address}/lfs/verify"}
                answer["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{oid}"}, "verify": verify}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def upload(self, oid: str) -> dict:
        self.hub.objects[oid] = self._body
        return {}

    def verify(self) -> dict:
        asked = self._json()
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise _Answer(404, "the object is not there, or not whole")
        return {}

    def commit(self, repo: str, revision: str) -> dict:
        is_pull_request = "create_pr" in self.query
        self._check_token("read" if is_pull_request else "write")
        oid, before = self._commit(repo, revision)
        lines = [json.loads(line) for line in self._body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", oid) != oid:
            raise _Answer(412, "A commit has happened since. Please refresh and try again.")
        after = Commit({**before.files}, header["summary"], header["description"], {**before.large})
        for line in lines[1:]:
            self._change(after, line["key"], line["value"])
        repository = self.hub.repositories[repo]
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        made = repository.add(f"refs/pr/{number}" if is_pull_request else revision, after)
        address = f"{self.hub.address}/{repo}"
        answer = {"commitOid": made, "commitUrl": f"{address}/commit/{made}"}
        return answer | ({"pullRequestUrl": f"{address}/discussions/{number}"} if is_pull_request else {})

    def _change(self, commit: Commit, key: str, value: dict) -> None:
        if key == "file":
            commit.files[value["path"]] = base64.b64decode(value["content"])
            commit.large.pop(value["path"], None)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise _Answer(400, "the large file was not uploaded")
            commit.files[value["path"]] = self.hub.objects[value["oid"]]
            commit.large[value["path"]] = value["oid"]
        elif key == "deletedFile":
            del commit.files[value["path"]]

    def tag(self, repo: str, revision: str) -> dict:
        self._check_token("write")
        tags, name = self._repository(repo).tags, self._json()["tag"]
        if name in tags:
            raise _Answer(409, "Tag reference exists already")
        tags[name] = self._commit(repo, revision)[0]
        return {}

    def branch(self, repo: str, revision: str) -> dict:
        self._check_token("write")
        refs = self._repository(repo).refs
        if revision in refs:
            raise _Answer(409, "Branch reference exists already")
        refs[revision] = refs["main"]
        return {}

    def validate(self) -> dict:
        return {"errors": [], "warnings": []}

    def resolve(self, repo: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        oid, commit = self._commit(repo, revision)
        if path not in commit.files:
            raise _Answer(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        name = commit.large.get(path) or git_name(content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{name}"'}
        if path in commit.large:
            headers |= {"X-Linked-ETag": f'"{name}"', "X-Linked-Size": str(len(content))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content = content[first : last + 1]
        self.hub.served[path] += len(content) if self.command == "GET" else 0
        return content, headers


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = {
    "GET /api/whoami-v2": "whoami",
    "POST /api/repos/create": "create",
    "POST /api/validate-yaml": "validate",
    rf"GET /api/(models|datasets)/{_REPO}": "about",
    rf"GET /api/(models|datasets)/{_REPO}/revision/{_REVISION}": "about",
    rf"GET /api/(models|datasets)/{_REPO}/tree/{_REVISION}(/(?P<path>.+))?": "tree",
    rf"POST /api/(models|datasets)/{_REPO}/paths-info/{_REVISION}": "paths_info",
    rf"GET /api/models/{_REPO}/refs": "list_refs",
    rf"GET /api/models/{_REPO}/discussions": "list_discussions",
    rf"POST /api/models/{_REPO}/preupload/{_REVISION}": "preupload",
    rf"POST /api/models/{_REPO}/commit/{_REVISION}": "commit",
    rf"POST /api/models/{_REPO}/tag/{_REVISION}": "tag",
    rf"POST /api/models/{_REPO}/branch/{_REVISION}": "branch",
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": "batch",
    "PUT /lfs/(?P<oid>[0-9a-f]{64})": "upload",
    "POST /lfs/verify": "verify",
    rf"(GET|HEAD) /(datasets/)?{_REPO}/resolve/{_REVISION}/(?P<path>.+)": "resolve",
}


def put(hub: WritableHub, name: str, folder: Path) -> str:
    """Puts a folder there as a model; returns its commit."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    large = {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if is_large(name)}
    hub.repositories[name] = Repository()
    return hub.repositories[name].add("main", Commit(files, large=large))


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


@contextmanager
def serve_writable() -> Iterator[WritableHub]:
    """A Hub to which TOKEN, of OWNER, may write."""
    hub = WritableHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_WritableHub,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.closed.set()
        server.shutdown()
        server.server_close()
