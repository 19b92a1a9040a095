"""A server on this machine that publishes files as badly as servers do."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FORM = """<html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="/file" method="get"><input type="hidden" name="id" value="x">
<input type="hidden" name="confirm" value="t"></form>"""
QUOTA = """<html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>"""
LOGIN = "<!DOCTYPE html><html><head><title>Sign in - Google Accounts</title></head></html>"


class PublishedServer:
    """Serves `content` at `/file`; other paths are faults.

    Attributes:
      content: the bytes of the file.
      cut_after: bytes after which the connection is closed, once for each entry.
      validator: its ETag; "" sends none and continues nothing.
      asked: the path and the Range of every request.
    """

    def __init__(self, content: bytes):
        self.content, self.validator = content, '"one"'
        self.cut_after: list[int] = []
        self.asked: list[tuple[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.asked.append((self.path, self.headers.get("Range", "")))
                with contextlib.suppress(OSError):  # who asked has had enough
                    server.answer(self, self.path.partition("?")[0])

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # who asked has gone
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, path: str) -> None:
        pages = {"/form": FORM, "/quota": QUOTA, "/login": LOGIN, "/refused": QUOTA}
        moved = {"/moved": "/file", "/plain": "http://example.invalid/file", "/round": "/round"}
        if path == "/file":
            return self._send_file(request)
        if path == "/endless":
            return self._send_endless(request)
        if path in moved:
            request.send_response(302)
            request.send_header("Location", moved[path])
            body = b""
        elif path in pages:
            request.send_response(403 if path == "/refused" else 200)
            request.send_header("Content-Type", "text/html; charset=utf-8")
            body = pages[path].encode()
        else:
            request.send_response(int(path.strip("/")))
            body = b"no"
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _send_file(self, request: BaseHTTPRequestHandler) -> None:
        start, asked = 0, request.headers.get("Range", "")
        if asked and request.headers.get("If-Range") == self.validator:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        size = len(self.content)
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if self.validator:
            request.send_header("ETag", self.validator)
        request.send_header("Content-Length", str(size - start))
        request.end_headers()
        end = self.cut_after.pop(0) if self.cut_after else size
        request.wfile.write(self.content[start:end])
        if end < size:
            request.close_connection = True

    def _send_endless(self, request: BaseHTTPRequestHandler) -> None:
        """A file that does not say how long it is and does not end."""
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        while True:
            request.wfile.write(bytes(2**16))
