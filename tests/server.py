"""Web servers on the loopback that can misbehave: of files, and of the Hugging Face hub."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DATE = "Sun, 29 Nov 2026 12:00:00 GMT"


@contextlib.contextmanager
def serving(handler, **attributes):
    """Serves in a thread; gives the server, with `address` and the attributes given."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.address = f"http://127.0.0.1:{server.server_port}"
    vars(server).update(attributes)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class FileHandler(BaseHTTPRequestHandler):
    """Serves `server.files` with ETags and ranges.

    `server.drops` is a list of how many bytes the next answers send before the connection drops;
    `server.quirks` may hold "no etag", "weak etag", "one etag" (whatever the content), "date",
    "no range", "wrong range", "no size", "token" (nothing without one in the query);
    `server.asked` notes the headers of all requests.
    """

    def do_GET(self):
        server = self.server
        server.asked.append(dict(self.headers))
        path, _, query = self.path.partition("?")
        content = server.files.get(path)
        if "token" in server.quirks and "token=" not in query:
            content = 403
        if not isinstance(content, bytes):
            return self.send_error(content or 404)
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        if "one etag" in server.quirks:
            etag = '"same"'
        validators = (etag, DATE) if "weak etag" in server.quirks else (etag,)
        begin = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        if self.headers.get("If-Range", etag) not in validators or "no range" in server.quirks:
            begin = 0
        end = len(content)
        if begin and "wrong range" in server.quirks:  # of the size asked for
            begin, end = begin - 1, end - 1
        if begin and begin >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        if "weak etag" in server.quirks:
            self.send_header("ETag", f"W/{etag}")
        elif "no etag" not in server.quirks:
            self.send_header("ETag", etag)
        if {"weak etag", "date"} & set(server.quirks):
            self.send_header("Last-Modified", DATE)
        if "no size" not in server.quirks:
            self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        n_sent = server.drops.pop(0) if server.drops else len(content)
        self.wfile.write(content[begin:end][:n_sent])

    def log_message(self, *_):
        pass


def serving_files(files, drops=(), quirks=()):
    """Serves files from memory, {path: bytes or number of an error}; see `FileHandler`."""
    return serving(FileHandler, files=files, drops=list(drops), quirks=quirks, asked=[])


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub's API that creating, uploading and downloading a model needs.

    `server.commits` is {repository: [{path: content}] or GATED}, the last one being "main", and a
    revision is the number of a commit, as the hub's hexadecimal names; `server.token` may write;
    `server.drop` is a word: a request whose path has it gets no answer; `server.asked` notes
    method and path of all requests.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.note()
        found = re.match(r"/api/models/([\w.-]+/[\w.-]+)/tree/main\?", self.path)
        if found and found[1] in self.server.commits:
            files = self.server.commits[found[1]][-1].items()
            tree = [{"type": "file", "path": p, "size": len(c), "oid": ""} for p, c in files]
            return self.answer_json(200, tree)
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", self.path)
        if not found:
            return self.answer(404, {})
        repo, revision, path = found.groups()
        commits = self.server.commits.get(repo)
        if commits is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if commits == GATED:
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        names = {commit_name(i): i for i in range(len(commits))} | {"main": len(commits) - 1}
        if revision not in names:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit = {"X-Repo-Commit": commit_name(names[revision])}
        content = commits[names[revision]].get(path)
        if content is None:
            return self.answer(404, {**commit, "X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest()
        self.answer(200, {**commit, "ETag": f'"{etag}"'}, content)

    def do_POST(self):
        self.note()
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.server.drop and self.server.drop in self.path:
            return self.hang_up()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(
                401, {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            taken = repo in self.server.commits
            self.server.commits.setdefault(repo, [{}])
            return self.answer_json(409 if taken else 200, {"url": f"{self.server.address}/{repo}"})
        if "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer_json(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer_json(200, {"transfer": "basic", "objects": objects})
        if self.path == "/api/validate-yaml":
            return self.answer_json(200, {"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.path)
        if found:
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        self.answer(404, {})

    def do_PUT(self):
        self.note()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.drop and self.server.drop in self.path:
            return self.hang_up()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})

    def commit(self, repo, lines):
        files = dict(self.server.commits[repo][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.commits[repo].append(files)
        oid = commit_name(len(self.server.commits[repo]) - 1)
        url = f"{self.server.address}/{repo}/commit/{oid}"
        self.answer_json(200, {"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def note(self):
        self.server.asked.append(f"{self.command} {self.path}")

    def answer_json(self, status, content):
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer(self, status, headers, content=b""):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


GATED = "gated"
LARGE = (".safetensors", ".bin", ".pth")


def commit_name(number):
    return f"{number:040x}"


def serving_hub():
    """Serves an empty hub; see `HubHandler`."""
    attributes = dict(commits={}, large={}, token="hf_good", drop=None, asked=[])
    return serving(HubHandler, **attributes)
