"""A Hub on this machine: what huggingface_hub's client asks of it to list and download a model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


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
