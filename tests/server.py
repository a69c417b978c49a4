"""A web server on the loopback that can misbehave, for tests of downloads."""

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
    `server.quirks` may hold "no etag", "no range", "no size"; `server.asked` notes the headers of
    all requests.
    """

    def do_GET(self):
        server = self.server
        server.asked.append(dict(self.headers))
        content = server.files.get(self.path.partition("?")[0])
        if not isinstance(content, bytes):
            return self.send_error(content or 404)
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        begin = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        if self.headers.get("If-Range", etag) != etag or "no range" in server.quirks:
            begin = 0
        if begin and begin >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if "no etag" not in server.quirks:
            self.send_header("ETag", etag)
        if "no size" not in server.quirks:
            self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        n_sent = server.drops.pop(0) if server.drops else len(content)
        self.wfile.write(content[begin:][:n_sent])

    def log_message(self, *_):
        pass


def serving_files(files, drops=(), quirks=()):
    """Serves files from memory, {path: bytes or number of an error}; see `FileHandler`."""
    return serving(FileHandler, files=files, drops=list(drops), quirks=quirks, asked=[])
