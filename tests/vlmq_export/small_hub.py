"""A hub of one machine: what huggingface_hub asks for an upload, over HTTP on the loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_small"


@dataclass
class SmallHub:
    """What was uploaded, and what was asked."""

    address: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)  # name → whether it is private
    files: dict[str, bytes] = field(default_factory=dict)  # path in the repository → content
    objects: dict[str, bytes] = field(default_factory=dict)  # SHA-256 → content, as LFS has them
    asked: list[str] = field(default_factory=list)
    refuses_commits: bool = False


def _whoami(hub: SmallHub, _body: bytes) -> dict:
    return {"type": "user", "name": "me", "orgs": []}


def _create(hub: SmallHub, body: bytes) -> dict:
    told = json.loads(body)
    owner = told.get("organization") or "me"
    name = f"{owner}/{told['name']}"
    hub.repositories.setdefault(name, told.get("visibility") == "private")
    return {"url": f"{hub.address}/{name}"}


def _preupload(hub: SmallHub, body: bytes) -> dict:
    """Files of the two formats are large, all others are small."""
    large = (".safetensors", ".gguf", ".data", ".png")
    files = [
        {
            "path": f["path"],
            "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
            "shouldIgnore": False,
        }
        for f in json.loads(body)["files"]
    ]
    return {"files": files}


def _batch(hub: SmallHub, body: bytes) -> dict:
    objects = [
        {**o, "actions": {"upload": {"href": f"{hub.address}/objects/{o['oid']}"}}}
        for o in json.loads(body)["objects"]
    ]
    return {"transfer": "basic", "objects": objects}


def _commit(hub: SmallHub, body: bytes) -> dict:
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            hub.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            hub.files[value["path"]] = hub.objects[value["oid"]]
    (name,) = hub.repositories
    return {"commitUrl": f"{hub.address}/{name}/commit/1", "commitOid": "1" * 40}


def _validate(hub: SmallHub, body: bytes) -> dict:
    """The front matter of a card: YAML with the keys that the hub wants of a quantized model."""
    front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
    lacking = {"base_model", "pipeline_tag", "library_name"} - set(front)
    return {"errors": [{"message": f"no {key}"} for key in lacking], "warnings": []}


ANSWERS = {
    "validate-yaml": _validate,
    "whoami-v2": _whoami,
    "repos/create": _create,
    "preupload/main": _preupload,
    "objects/batch": _batch,
    "commit/main": _commit,
}


def _handler(hub: SmallHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self, status: int, value: dict) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _answer(self) -> None:
            path = self.path.split("?")[0].rstrip("/")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {path}")
            if self.command == "PUT":
                oid = path.rpartition("/")[2]
                assert hashlib.sha256(body).hexdigest() == oid
                hub.objects[oid] = body
                self._reply(200, {})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._reply(401, {"error": "Invalid credentials"})
            elif hub.refuses_commits and path.endswith("commit/main"):
                self._reply(403, {"error": "this token may not write"})
            else:
                make = next((f for end, f in ANSWERS.items() if path.endswith(end)), None)
                self._reply(200, make(hub, body)) if make else self._reply(404, {"error": path})

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *args: object) -> None:
            """Nothing on stderr."""

    return Handler


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    """The hub, for as long as it is needed."""
    hub = SmallHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
