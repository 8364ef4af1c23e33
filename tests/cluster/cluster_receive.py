"""Puts what is sent to it, as one tar, into a directory of the pod it runs in, and ends. Arguments: port, directory."""

import io
import sys
import tarfile
from http.server import BaseHTTPRequestHandler, HTTPServer


class Receiver(HTTPServer):
    def __init__(self, port: int, directory: str) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.directory = directory
        self.done = False


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_GET(self) -> None:
        self._say(200)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(self.server.directory)
        self._say(204)
        self.server.done = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _say(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


if __name__ == "__main__":
    with Receiver(int(sys.argv[1]), sys.argv[2]) as server:
        while not server.done:
            server.handle_request()
