"""A hub on this machine: the few endpoints that an upload and a download call, and what has arrived and gone."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub


class Hub(ThreadingHTTPServer):
    """Keeps the files of each repository, "owner/name" or "owner/name@revision", and gives them.

    Each path that holds `refused` is refused, with 403, or without an answer.
    """

    daemon_threads = True

    def __init__(self, refused="", answers=True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refused, self.answers = refused, answers
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created, self.files, self.objects, self.given = [], {}, {}, []

    def handle_error(self, request, client_address):
        """Says nothing of connections that a client has closed."""


@contextmanager
def hub(**options):
    with Hub(**options) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _commit(repository, revision):
    is_commit = re.fullmatch("[0-9a-f]{40}", revision)
    return revision if is_commit else hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


def connect(monkeypatch, server):
    """Lets this process take a server for the hub, as HF_ENDPOINT does before the import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def log_message(self, *_):
        pass

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, content = 200, {}
        if (found := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)) and not self.server.refused:
            self._give(*found.groups())
            return
        if self.server.refused and self.server.refused in self.path:
            if not self.server.answers:
                return  # without a response, as from a server that is down
            status, content = 403, {"error": "You have no right to do this."}
        else:
            content = self._content(body)
            status = 404 if "error" in content else 200
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _give(self, repository, revision, file):
        files = self._files(repository, revision)
        content = (files or {}).get(file)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if files else "RepoNotFound")
            content = b""
        elif self.command == "GET":
            self.server.given.append(file)
        self.send_header("X-Repo-Commit", _commit(repository, revision))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _files(self, repository, revision):
        kept = {key: files for key, files in self.server.files.items() if key.partition("@")[0] == repository}
        named = {_commit(repository, key.partition("@")[2] or "main"): files for key, files in kept.items()}
        return named.get(_commit(repository, revision))

    def _content(self, body):
        server, path = self.server, self.path.partition("?")[0]
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if path == "/api/whoami-v2":
            return {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            server.created.append(json.loads(body))
            owner = server.created[-1].get("organization") or "me"
            return {"url": f"{server.address}/{owner}/{server.created[-1]['name']}"}
        if found := re.fullmatch("/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, what, revision = found[1], found[2], found[3] or "main"
            if (files := self._files(name, revision)) and what == "tree":
                return [{"type": "file", "path": f, "size": len(x), "oid": "0"} for f, x in files.items()]
            if files:
                return {"id": name, "sha": _commit(name, revision), "siblings": [{"rfilename": f} for f in files]}
        if path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            named = [file["path"] for file in json.loads(body)["files"]]
            kinds = [{"path": name, "uploadMode": modes[name.endswith(".safetensors")]} for name in named]
            return {"files": [kind | {"shouldIgnore": False} for kind in kinds]}
        if path.endswith("/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = {"upload": {"href": f"{server.address}/object"}}
            return {"transfer": "basic", "objects": [entry | {"actions": upload} for entry in wanted]}
        if path == "/object":
            server.objects[hashlib.sha256(body).hexdigest()] = body
        if path.endswith("/commit/main"):
            arrived = server.files.setdefault(repository, {})
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    arrived[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    arrived[value["path"]] = server.objects[value["oid"]]
            return {"commitUrl": f"{server.address}/{repository}/commit/1", "commitOid": "1", "pullRequestUrl": None}
        return {} if path in ("/object", "/api/validate-yaml") else {"error": "There is no such repository."}
