"""A Hub on this machine: just as much of its protocol as uploading and downloading small model repositories takes."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

FILES = "/{repo_id}/resolve/{revision}/{filename}"


@dataclass
class FakeHub:
    """Repositories by name: the files of each commit, and the commit of each branch."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    private: dict[str, object] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    url: str = ""

    def create(self, name, private=None):
        if name not in self.commits:
            self.private[name] = private
            self.commits[name] = {}
            self.branches[name] = {}
            self.commit(name, "main", {})

    def commit(self, name, branch, files):
        number = hashlib.sha1(f"{name}{len(self.commits[name])}".encode()).hexdigest()
        self.commits[name][number] = files
        self.branches[name][branch] = number
        return number

    def files(self, name, revision="main"):
        """The files of a branch or commit, and the commit; None if there is none."""
        number = self.branches.get(name, {}).get(revision, revision)
        found = self.commits.get(name, {}).get(number)
        return None if found is None else (found, number)

    def downloads(self):
        return [path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def answer(self, method):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.hub.requests.append((method, path))
        self.hub.tokens.add(self.headers.get("authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, reply in REPLIES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return reply(self, body, *match.groups())
        return self.reply(404, {"error": path}, {"X-Error-Code": "RepoNotFound"})

    def reply(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def create(self, body):
    asked = json.loads(body)
    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
    self.hub.create(name, asked.get("private", asked.get("visibility")))
    self.reply(200, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})


def branch(self, body, name, branch):
    self.hub.branches[name].setdefault(branch, self.hub.branches[name]["main"])
    self.reply(200, {})


def preupload(self, body, name, revision):
    if self.hub.files(name, revision) is None:
        return self.reply(404, {}, {"X-Error-Code": "RevisionNotFound"})
    files = [
        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
    ]
    return self.reply(200, {"files": files})


def tree(self, body, name, revision):
    found = self.hub.files(name, revision)
    if found is None:
        return self.reply(404, {}, {"X-Error-Code": "RevisionNotFound"})
    rows = [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in found[0].items()]
    return self.reply(200, rows)


def commit(self, body, name, revision):
    files = dict(self.hub.files(name, revision)[0])
    for line in body.splitlines():
        entry = json.loads(line)
        if entry["key"] == "header":
            self.hub.messages.append(entry["value"]["summary"])
        elif entry["key"] == "file":
            files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        elif entry["key"] == "deletedFile":
            files.pop(entry["value"]["path"])
    number = self.hub.commit(name, revision, files)
    self.reply(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{number}", "commitOid": number})


def info(self, body, name, revision="main"):
    found = self.hub.files(name, revision)
    if found is None:
        return self.reply(404, {}, {"X-Error-Code": "RepoNotFound"})
    return self.reply(200, {"id": name, "sha": found[1], "siblings": [{"rfilename": path} for path in found[0]]})


def resolve(self, body, name, revision, path):
    if name not in self.hub.commits:
        return self.reply(404, {}, {"X-Error-Code": "RepoNotFound"})
    found = self.hub.files(name, revision)
    if found is None:
        return self.reply(404, {}, {"X-Error-Code": "RevisionNotFound"})
    files, number = found
    if path not in files:
        return self.reply(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": number})
    etag = hashlib.sha256(files[path]).hexdigest()
    return self.reply(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": number})


REPOSITORY = r"([^/]+/[^/]+)"
REPLIES = [
    (r"POST api/repos/create", create),
    (r"POST api/validate-yaml", lambda self, body: self.reply(200, {"errors": [], "warnings": []})),
    (rf"POST api/models/{REPOSITORY}/branch/(.+)", branch),
    (rf"POST api/models/{REPOSITORY}/preupload/(.+)", preupload),
    (rf"POST api/models/{REPOSITORY}/commit/(.+)", commit),
    (rf"GET api/models/{REPOSITORY}/tree/(.+)", tree),
    (rf"GET api/models/{REPOSITORY}/revision/(.+)", info),
    (rf"GET api/models/{REPOSITORY}", info),
    (rf"(?:GET|HEAD) {REPOSITORY}/resolve/([^/]+)/(.+)", resolve),
]


@contextmanager
def connected(monkeypatch):
    """Let huggingface_hub talk to a Hub of one's own."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
