"""The Hugging Face Hub's HTTP protocol on the loopback interface, as far as downloads and pushes go, and its faults."""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Fault:
    """What goes wrong with one request: another status, other headers, a cut or a wait; the path says with which."""

    path: str  # a part of it
    method: str = "GET"
    status: int = 0  # 0: as it would be
    headers: dict[str, str] = field(default_factory=dict)  # added, or replaced
    cut_after: int = -1  # bytes of the body; -1: none
    wait: float = 0.0  # seconds, before the answer
    hang: float = 0.0  # seconds, with the connection open, before the cut
    times: int = 1  # how many requests


@dataclass
class Hub:
    """A running server: repositories with their commits, requests it had, and faults to come."""

    endpoint: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # repo -> commit -> file -> content
    branches: dict[str, dict[str, str]] = field(default_factory=dict)  # repo -> branch -> commit
    large: dict[str, bytes] = field(default_factory=dict)  # uploaded, by sha256
    plain: dict[str, bytes] = field(default_factory=dict)  # path -> content, outside any repository
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, Message]] = field(default_factory=list)  # method, path, headers
    over: threading.Event = field(default_factory=threading.Event)  # the test is
    redirects: bool = False  # large files from another address, as the Hub does
    ranges: bool = True  # whether a download can be continued

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files to a branch of a repository, on top of what it has; returns the commit."""
        branches, commits = self.branches.setdefault(repo, {}), self.commits.setdefault(repo, {})
        content = {**commits.get(branches.get(branch, ""), {}), **files}
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = content
        branches[branch] = commit
        return commit

    def fail(self, path: str, **fault: Any) -> None:
        """Add a :class:`Fault`."""
        self.faults.append(Fault(path, **fault))

    def downloads(self) -> list[str]:
        """The paths of all GET requests for files."""
        return [path for method, path, _ in self.requests if method == "GET" and "/api/" not in path]


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.hub, unquote(urlparse(self.path).path)
        if path != "/api/agent-harnesses":  # which the client asks for once, for itself
            hub.requests.append((self.command, path, self.headers))
        fault = next((f for f in hub.faults if f.path in path and f.method == self.command and f.times > 0), None)
        if fault is not None:
            fault.times -= 1
            time.sleep(fault.wait)
            if fault.status:
                self.send(fault.status, b"", fault.headers)
                return
        status, content, headers = self.route(path, body)
        if fault is not None:
            headers |= fault.headers
        self.send(status, content, headers, -1 if fault is None else fault.cut_after, fault.hang if fault else 0.0)

    def send(
        self, status: int, content: bytes, headers: dict[str, str], cut_after: int = -1, hang: float = 0.0
    ) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.hub.ranges else None
        if status == 200 and start and self.command == "GET":
            first, size = int(start[1]), len(content)
            status, content = (206, content[first:]) if first < size else (416, b"")
            headers = {**headers, "Content-Range": f"bytes {first}-{size - 1}/{size}" if content else f"bytes */{size}"}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content if cut_after < 0 else content[:cut_after])
        if cut_after >= 0:
            self.wfile.flush()
            self.hub.over.wait(hang)
            self.close_connection = True

    def route(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        hub = self.hub
        if path in hub.plain:
            return 200, hub.plain[path], {}
        if path.startswith("/cdn/"):
            return 200, hub.large[path.removeprefix("/cdn/")], {}
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        if path == "/api/repos/create":
            values = json.loads(body)
            repo = f"{values.get('organization') or 'someone'}/{values['name']}"
            if repo in hub.branches:
                return 409, b"{}", {}
            hub.add(repo, {".gitattributes": b""})
            return 200, json.dumps({"url": f"{hub.endpoint}/{repo}"}).encode(), {}
        if path == "/api/validate-yaml":
            return 200, b'{"errors": [], "warnings": []}', {}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return 200, json.dumps({"files": files}).encode(), {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, json.dumps({"transfer": "basic", "objects": objects}).encode(), {}
        if path.startswith("/lfs/") and self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            hub.large[path.removeprefix("/lfs/")] = body
            return 200, b"", {}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self.commit(match[1], match[2], body)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/(.+))?", path):
            if match[1] not in hub.branches:
                return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
            return 200, json.dumps({"id": match[1], "sha": hub.branches[match[1]][match[3] or "main"]}).encode(), {}
        return 404, b"{}", {}

    def resolve(self, repo: str, revision: str, file: str) -> tuple[int, bytes, dict[str, str]]:
        hub = self.hub
        if repo not in hub.commits:
            return 401, b"", {"X-Error-Code": "RepoNotFound"}
        commit = hub.branches[repo].get(revision, revision)
        if commit not in hub.commits[repo]:
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if file not in hub.commits[repo][commit]:
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        content = hub.commits[repo][commit][file]
        sha256 = hashlib.sha256(content).hexdigest()
        if not file.endswith((".safetensors", ".pth")):  # a small file, which git keeps itself
            oid = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
            return 200, content, {"ETag": f'"{oid}"', "X-Repo-Commit": commit}
        if not hub.redirects:
            return 200, content, {"ETag": f'"{sha256}"', "X-Repo-Commit": commit}
        hub.large[sha256] = content
        linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit}
        # By another name of this machine: another host, as the Hub's storage is.
        return 302, b"", {**linked, "Location": f"{hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{sha256}"}

    def commit(self, repo: str, branch: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.large[entry["value"]["oid"]]
        commit = self.hub.add(repo, files, branch)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        return 200, json.dumps({"commitUrl": url, "commitOid": commit}).encode(), {}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub, until the test ends."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


class Client:
    """Runs Python that sees the Hub, in fresh processes: huggingface_hub reads its settings once, at import.

    ``setup`` is run first; a :class:`zoo.WeightsError` is printed as ``refused: ...``.
    """

    setup = "import time; pauses = []; time.sleep = pauses.append\n"  # the waits are noted, not made
    log = ""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub = hub
        self.home = home

    def start(self, code: str, **environment: str) -> "subprocess.Popen[str]":
        body = "".join(f"    {line}\n" for line in code.strip().splitlines())
        program = (
            f"{self.setup}import zoo, logging\nlogging.basicConfig(format='log: %(message)s')\ntry:\n{body}"
            "except zoo.WeightsError as error:\n    print('refused:', error)\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "HF_HOME": str(self.home),
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": self.hub.endpoint,
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, which this server does not speak
                "no_proxy": "127.0.0.1,localhost",
                **environment,
            },
        )

    def run(self, code: str, **environment: str) -> str:
        """What the program prints."""
        process = self.start(code, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        self.log = err
        return out.strip()


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    """A client of this Hub with an empty cache."""
    return Client(hub, tmp_path / "home")
