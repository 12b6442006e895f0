"""A server on this machine that answers like the Hugging Face hub, for the real client.

It speaks the paths that `huggingface_hub` asks for when it reads models:

    GET  /api/models/OWNER/NAME[/revision/REVISION]   the commit and the files
    GET  /api/models/OWNER/NAME/tree/REVISION         the files, as `snapshot_download` wants them
    HEAD, GET /OWNER/NAME/resolve/REVISION/FILE       a redirect: to a path of this host for a small
                                                      file, to another host for a file of Git LFS
    GET  /api/resolve-cache/..., /cdn/HASH            the bytes, also in ranges

The other host is the same server under another name, so a test can see what the client sends there.
The server counts the requests. It can break a connection, refuse a request, and damage bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import small

from gptjax.data.tokens import tokenizer as tokenizer_lib

GPT1 = "openai-community/openai-gpt"
TOKEN = "hf_of_a_member"
STRANGER = "hf_of_a_stranger"
_LARGE = (".safetensors", ".bin", ".h5")


def save_gpt1(folder: pathlib.Path, seed: int = 0, **sizes: int) -> pathlib.Path:
    """Writes what the hub has of GPT-1, with random weights and the vocabulary of a few words.

    transformers writes the weights. The other files of the folder must never be asked for.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = small.small_tokenizer()
    torch.manual_seed(seed)
    sizes = {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3} | sizes
    config = transformers.OpenAIGPTConfig(
        vocab_size=len(tokenizer) - len(tokenizer_lib.SPECIALS), initializer_range=0.3, **sizes
    )
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(folder)
    pair = tokenizer_lib.pair_texts(tokenizer)
    assert pair is not None
    for name, text in zip(("vocab.json", "merges.txt"), pair, strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("pytorch_model.bin", "tf_model.h5", "modeling.py", "README.md"):
        (folder / name).write_bytes(b"never read")
    return folder


def git_hash(data: bytes) -> str:
    """The hash that Git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclasses.dataclass
class Request:
    """A request that the server has received, and the number of bytes of the answer."""

    method: str
    path: str
    headers: Mapping[str, str]
    sent: int = 0


@dataclasses.dataclass
class Fault:
    """What goes wrong with the requests of a path."""

    pattern: str
    """A regular expression that the path must contain."""
    times: int
    """The number of requests that it still applies to."""
    method: str = "GET"
    status: int = 0
    """The status of a refusal. 0 means that the request is answered."""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Headers of a refusal."""
    cut: int | None = None
    """The connection ends after this number of bytes of the body."""
    stall: bool = False
    """The connection does not end after `cut` bytes, but nothing more is sent."""
    shorter: int = 0
    """The file lacks this number of bytes, and the headers say so too."""
    damage: bool = False
    """One bit of the body is wrong."""


@dataclasses.dataclass
class Repository:
    """A model: its commits, and the names of some of them."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False


class Hub:
    """The server. `with Hub() as hub:` starts it and ends it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.endpoint = f"http://localhost:{self.port}"
        self.cdn = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(
        self, name: str, files: Mapping[str, bytes] | pathlib.Path, revision: str = "main"
    ) -> str:
        """Makes a commit with these files, or the files of a folder; returns the commit."""
        if isinstance(files, pathlib.Path):
            files = {path.name: path.read_bytes() for path in sorted(files.iterdir())}
        text = json.dumps({name: git_hash(data) for name, data in files.items()}, sort_keys=True)
        commit = hashlib.sha1(text.encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository())
        repository.commits[commit] = dict(files)
        repository.revisions[revision] = commit
        return commit

    def fault(self, pattern: str, times: int = 1, **changes: Any) -> None:
        """Lets something go wrong, see `Fault`."""
        self.faults.append(Fault(pattern, times, **changes))

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Returns what goes wrong with a request."""
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def bodies(self) -> list[str]:
        """The names of the files whose bytes were asked for, sorted."""
        names = {
            hashlib.sha256(data).hexdigest(): name
            for repository in self.repositories.values()
            for files in repository.commits.values()
            for name, data in files.items()
        }
        asked = (
            request.path.partition("?")[0].rpartition("/")[2]
            for request in self.requests
            if request.method == "GET" and re.match("/cdn/|/api/resolve-cache/", request.path)
        )
        return sorted(names.get(each, each) for each in asked)

    def environment(self, home: pathlib.Path, **changes: str) -> dict[str, str]:
        """Environment variables for a process that uses this hub and a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1", **changes,
        }  # fmt: skip


def use(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, home: pathlib.Path, token: str = "", offline=False
) -> None:
    """Lets the client in this process use a hub. It has read the environment long ago."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()
    values = {
        "ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": offline, "HF_HOME": str(home),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True, "AGENT_HARNESSES_PATH": str(home / "harnesses.json"),
        # A part of a file is written in pieces of this size.
        "DOWNLOAD_CHUNK_SIZE": 1000,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("NO_PROXY", "*")


class _Refused(Exception):
    """An answer that is an error, with the headers of the real hub."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        super().__init__(message)
        texts = {"X-Error-Code": code, "X-Error-Message": message}
        self.status = status
        self.headers = {name: text for name, text in texts.items() if text} | headers


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Prints nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    request_seen: Request | None = None

    def do_GET(self) -> None:
        if self.path == "/api/agent-harnesses":  # the client wants to know what started it
            self._send(404, {}, b"")
            return
        request = Request(self.command, self.path, dict(self.headers.items()))
        self.request_seen = request
        self.hub.requests.append(request)
        fault = self.hub.take_fault(self.command, self.path)
        with contextlib.suppress(ConnectionError):
            try:
                if fault and fault.status:
                    raise _Refused(fault.status, **dict(fault.headers))
                self._answer(fault)
            except _Refused as error:
                self._send(error.status, error.headers, b'{"error": "refused"}')

    def _answer(self, fault: Fault | None) -> None:
        path = urllib.parse.urlsplit(self.path).path
        if found := re.fullmatch(r"/cdn/(\w{64})", path):
            self._send_file(self._blob(found[1]), {"ETag": f'"{found[1]}"'}, fault)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            commit, files = self._files(found[1], found[2] or "main")
            siblings = [self._sibling(name, data) for name, data in files.items()]
            self._send_json({"id": found[1], "sha": commit, "siblings": siblings})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            _, files = self._files(found[1], found[2])
            self._send_json([self._entry(name, data) for name, data in files.items()])
        elif found := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/(\w+)/(.+)", path):
            data = self._file(*found.groups())[1]
            self._send_file(data, {"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": found[2]}, fault)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._redirect(*found.groups())
        else:
            raise _Refused(404, message="Not found")

    def _redirect(self, name: str, revision: str, file: str) -> None:
        """Answers like `resolve`: with the commit, the hash and the size, and another address."""
        self._require_access(name)
        commit, data = self._file(name, revision, file)
        large = file.endswith(_LARGE)
        digest = hashlib.sha256(data).hexdigest()
        there = f"{self.hub.cdn}/cdn/{digest}?signature=secret"
        here = f"/api/resolve-cache/models/{name}/{commit}/{file}"
        headers = {
            "X-Repo-Commit": commit, "Location": there if large else here,
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{digest if large else git_hash(data)}"',
        }  # fmt: skip
        self._send(302 if large else 307, headers, b"")

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _require_access(self, name: str) -> None:
        if self.hub.repositories[name].gated and self._token != TOKEN:
            raise _Refused(403 if self._token else 401, "GatedRepo", "Access is restricted")

    def _repository(self, name: str) -> Repository:
        if self._token not in ("", TOKEN, STRANGER):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token != TOKEN):
            # The hub does not tell a stranger whether a private repository exists.
            if not self._token:
                raise _Refused(401, message="Invalid username or password.")
            raise _Refused(404, "RepoNotFound", "Repository not found")
        return found

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository, revision = self._repository(name), urllib.parse.unquote(revision)
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def _file(self, name: str, revision: str, file: str) -> tuple[str, bytes]:
        commit, files = self._files(name, revision)
        if file not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        return commit, files[file]

    def _blob(self, digest: str) -> bytes:
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                for data in files.values():
                    if hashlib.sha256(data).hexdigest() == digest:
                        return data
        raise _Refused(404)

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        found = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
        return found | ({"lfs": lfs} if name.endswith(_LARGE) else {})

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        found = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
        return found | ({"lfs": lfs} if name.endswith(_LARGE) else {})

    def _send_json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send_file(self, data: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        """Sends a file, or the range of it that the request asks for."""
        fault = fault or Fault("", 0)
        data = data[: len(data) - fault.shorter]
        status, start = 200, 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(found[1])
            if start >= len(data):
                raise _Refused(416, **{"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = bytearray(data[start:])
        if fault.damage:
            body[len(body) // 2] ^= 1
        self._send(status, headers, bytes(body), fault.cut)
        if fault.stall:
            self.hub.ended.wait()

    def _send(
        self, status: int, headers: Mapping[str, str], body: bytes, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            body = body[:cut]
            self.wfile.write(body)
            if self.request_seen:
                self.request_seen.sent = len(body)
        self.close_connection = self.close_connection or cut is not None
