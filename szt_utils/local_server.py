"""An HTTP server for one page that only this computer's user can open.

The page's address holds a secret token, without which every request is refused. A request that another site
has made the browser send is refused, too: by its Host, its Origin and what the browser says of its source.
Sizes, times and connections are limited; every refusal is a sentence in JSON.
"""

import base64
import contextlib
import functools
import hashlib
import hmac
import json
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .errors import InputError, first_line, printable
from .files import parse_json

__all__ = ["Conflict", "serve_locally"]

LARGEST_BODY = 1 << 20  # bytes of a POST
SECONDS = 10  # to send a request, and to take the answer
MOST_CONNECTIONS = 32
_HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin"}
_POLICY = ("default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; "
           "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Conflict(InputError):
    """A request that comes too late: what it changes is not what its sender has seen."""


class _Refused(Exception):
    """A request that is answered with an HTTP status and a sentence."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "szt", ""
    timeout = SECONDS  # of a single read or write

    def __init__(self, token: str, get: Callable[[str], tuple[str, bytes]],
                 post: Callable[[str, Any], dict[str, Any]], *args: Any):
        self.token, self.get, self.post = token, get, post
        super().__init__(*args)  # which handles the request

    def setup(self) -> None:
        super().setup()
        # However slowly a request drips in, reading it ends.
        self.alarm = threading.Timer(SECONDS, self._end, [socket.SHUT_RD])
        self.alarm.daemon = True
        self.alarm.start()

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # the browser is gone
            super().finish()
            # Read what is left of a refused request: otherwise the system would drop the answer.
            self._end(socket.SHUT_WR)
            for _ in range(64 * LARGEST_BODY >> 16):
                if not self.connection.recv(1 << 16):
                    break
        self.alarm.cancel()

    def _end(self, direction: int) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(direction)

    def do_GET(self) -> None:
        self.reply(lambda path: self.get(path))

    def do_POST(self) -> None:
        self.reply(lambda path: ("application/json", json.dumps(self.post(path, self.read_body())).encode()))

    def reply(self, answer: Callable[[str], tuple[str, bytes]]) -> None:
        """Answer the request with a content type and content, or refuse it."""
        try:
            self.send(200, *answer(self.check()))
        except _Refused as error:
            self.refuse(error.status, str(error))
        except KeyError:
            self.refuse(404, "there is no such page")
        except Conflict as error:
            self.refuse(409, str(error))
        except (ValueError, OverflowError) as error:  # an InputError, or numbers beyond floats
            self.refuse(400, first_line(error))
        except (ConnectionError, TimeoutError):
            raise  # nobody is left to be answered
        except OSError as error:  # a full disk
            self.refuse(500, f"{error.strerror}: {error.filename}")
        except Exception as error:
            self.refuse(500, f"unexpected {type(error).__name__}: {first_line(error)}")

    def check(self) -> str:
        """The path below the token; refuses what does not come from the page itself."""
        host, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        # The name alone does not do: a foreign site can point its own to 127.0.0.1.
        names = [name.rsplit(":", 1)[0] for name in host]
        token, _, path = self.path.removeprefix("/").partition("?")[0].partition("/")
        source = self.headers.get("Sec-Fetch-Site", "same-origin")
        is_local = names in (["127.0.0.1"], ["localhost"]) and origin in (None, f"http://{host[0]}")
        # The page itself may be opened from anywhere that knows its address.
        is_own = source in ("same-origin", "none") or (path == "" and self.command == "GET")
        has_token = hmac.compare_digest(token.encode("latin-1", "replace"), self.token.encode())
        if not (is_local and is_own and has_token):
            raise _Refused(403, "open the page by the address that the script has printed")
        return path

    def read_body(self) -> Any:
        """The JSON of a POST."""
        length = self.headers.get("Content-Length", "")
        # Browsers let any site send a form here, but JSON only the page itself.
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            raise _Refused(403, "the content must be application/json")
        if "Transfer-Encoding" in self.headers or not length:
            raise _Refused(411, "the request must say its Content-Length")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise _Refused(400, "the Content-Length is not a number")
        if int(length) > LARGEST_BODY:
            raise _Refused(413, f"the request is larger than {LARGEST_BODY >> 20} MB")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise _Refused(408, "the request has not come whole")
        return parse_json(content)

    def send(self, status: int, content_type: str, content: bytes) -> None:
        script = re.search(rb"<script>(.*?)</script>", content, re.S) if "html" in content_type else None
        policy = _POLICY
        if script:  # this one and no other
            policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script[1]).digest()).decode()}'"
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(content)), **_HEADERS,
                            "Content-Security-Policy": policy}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str) -> None:
        self.send(status, "application/json", json.dumps({"error": message}).encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: other methods, requests that are not HTTP."""
        self.refuse(code, message or "the request is not valid")

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 2 * MOST_CONNECTIONS  # those that come at once wait here

    def __init__(self, *args: Any):
        self.free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):  # a browser may leave at any time
            print(f"warning: a request failed ({type(error).__name__}: {printable(first_line(error))}).",
                  file=sys.stderr)


def serve_locally(get: Callable[[str], tuple[str, bytes]], post: Callable[[str, Any], dict[str, Any]],
                  port: int = 0, ready: Callable[[str], None] = print) -> None:
    """Serve on 127.0.0.1 until Ctrl-C, and call `ready` with the page's address; port 0 is any free one.

    `get(path)` gives a content type and content, `post(path, content)` takes and gives JSON; paths begin
    below the token, "" is the page. Both raise KeyError for an unknown path, InputError for a bad request and
    Conflict for one that comes too late.
    """
    token = secrets.token_urlsafe(24)
    try:
        server = _Server(("127.0.0.1", port), functools.partial(_Handler, token, get, post))
    except OSError as error:
        raise InputError(f"Port {port} cannot be used ({error.strerror}); give another --port.") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        ready(f"http://127.0.0.1:{server.server_port}/{token}/")
        server.serve_forever()
