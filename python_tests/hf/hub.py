"""A hub on this machine: the few endpoints that an upload calls, and what has arrived."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub(ThreadingHTTPServer):
    """Keeps the files of each repository; refuses each path that holds `refused`, with 403, or without an answer."""

    daemon_threads = True

    def __init__(self, refused="", answers=True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refused, self.answers = refused, answers
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created, self.files, self.objects = [], {}, {}

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


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_GET

    def log_message(self, *_):
        pass

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, content = 200, {}
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

    def _content(self, body):
        server, path = self.server, self.path.partition("?")[0]
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if path == "/api/whoami-v2":
            return {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            server.created.append(json.loads(body))
            owner = server.created[-1].get("organization") or "me"
            return {"url": f"{server.address}/{owner}/{server.created[-1]['name']}"}
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
