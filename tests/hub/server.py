# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
A stand-in for the Hugging Face Hub on loopback. It keeps model repositories in memory, and speaks what
`huggingface_hub` needs to create one, commit to a branch (plain files, and large ones by LFS), and read files back.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_a_token_that_nobody_may_see"
ARGUMENT = "hf_given_as_an_argument"


class HubServer(ThreadingHTTPServer):
    """`fails` is asked for each request, (method, path) → status and message, or `None` to serve it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, bytes]] = {}  # id → path → content
        self.branches: dict[str, dict[str, str]] = {}  # repository → branch → commit
        self.large: dict[str, bytes] = {}  # sha256 → content
        self.fails: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
        self.requests: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """A revision's files: path → content."""
        return self.commits[self.branches[repo].get(revision, revision)]

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        with self.lock:
            number = hashlib.sha1(f"{len(self.commits)}{repo}".encode()).hexdigest()
            self.commits[number] = files
            self.branches.setdefault(repo, {})[branch] = number
        return number


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    do_GET = do_POST = do_PUT = do_HEAD

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        path = unquote(urlparse(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        failure = self.server.fails(self.command, path)
        if failure is not None:
            return self._json({"error": failure[1]}, failure[0])
        writes = self.command in ("POST", "PUT") and not path.startswith("/lfs/")
        if writes and self.headers.get("Authorization") not in (f"Bearer {TOKEN}", f"Bearer {ARGUMENT}"):
            return self._json({"error": "Invalid username or password."}, 401)
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, body, **match.groupdict())
        self._json({"error": f"no such endpoint: {path}"}, 404)

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if status >= 400:
            headers = {"X-Error-Message": value["error"]} | (headers or {})
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ------------------------------------------------------------------ what it can be asked
    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = "/".join(filter(None, (asked.get("organization") or "somebody", asked["name"])))
        if repo in self.server.branches:
            return self._json({"error": "exists", "url": f"{self.server.url}/{repo}"}, 409)
        self.server.commit(repo, "main", {".gitattributes": b""})
        self._json({"url": f"{self.server.url}/{repo}"})

    def _branch(self, body: bytes, repo: str, revision: str) -> None:
        branches = self.server.branches[repo]
        if revision in branches:
            return self._json({"error": "exists"}, 409)
        self.server.commit(repo, revision, self.server.files(repo))
        self._json({})

    def _validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        if "model-index" in text and "metrics" not in text:
            return self._json({"error": "bad", "errors": [{"message": "model-index without metrics"}]}, 400)
        self._json({"warnings": [], "errors": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "other content than announced"}, 400)
        self.server.large[oid] = body
        self._json({})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        files = dict(self.server.files(repo, revision))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] != "header":
                return self._json({"error": f"unknown operation {entry['key']}"}, 400)
        number = self.server.commit(repo, revision, files)
        self._json({"commitUrl": f"{self.server.url}/{repo}/commit/{number}", "commitOid": number})

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if (number := self._find(repo, revision)) is None:
            return
        files = [{"rfilename": path} for path in self.server.commits[number]]
        self._json({"id": repo, "modelId": repo, "sha": number, "private": False, "tags": [], "siblings": files})

    def _tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        if (number := self._find(repo, revision)) is None:
            return
        files = {path: content for path, content in self.server.commits[number].items() if not folder}
        self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
        )

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if (number := self._find(repo, revision)) is None:
            return
        content = self.server.commits[number].get(path)
        if content is None:
            return self._json(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": number}
            )
        digest = (hashlib.sha256 if _is_large(path) else hashlib.sha1)(content).hexdigest()
        self._send(content, headers={"ETag": f'"{digest}"', "X-Repo-Commit": number})

    def _find(self, repo: str, revision: str) -> str | None:
        branches = self.server.branches.get(repo)
        if branches is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        number = branches.get(revision, revision)
        if number not in self.server.commits:
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return number


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[\w.-]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), "/api/repos/create", _Handler._create),
    (("POST",), "/api/validate-yaml", _Handler._validate),
    (("POST",), rf"/api/models/{REPO}/branch/{REVISION}", _Handler._branch),
    (("POST",), rf"/api/models/{REPO}/preupload/{REVISION}", _Handler._preupload),
    (("POST",), rf"/api/models/{REPO}/commit/{REVISION}", _Handler._commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>\w+)", _Handler._lfs_upload),
    (("GET",), rf"/api/models/{REPO}", _Handler._info),
    (("GET",), rf"/api/models/{REPO}/revision/{REVISION}", _Handler._info),
    (("GET",), rf"/api/models/{REPO}/tree/{REVISION}(/(?P<folder>.+))?", _Handler._tree),
    (("GET", "HEAD"), rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", _Handler._resolve),
]
