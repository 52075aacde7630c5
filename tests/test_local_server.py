"""The local server: who may ask, what is limited, and that every refusal is an answer."""

import http.client
import json
import re
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from szt_utils import local_server
from szt_utils.errors import InputError
from szt_utils.local_server import Conflict, serve_locally

PAGE = b"<html><script>\nrun()\n</script></html>"


def get(path: str) -> tuple[str, bytes]:
    if path == "broken":
        raise RuntimeError("first\nsecond")
    return "text/html; charset=utf-8" if path == "" else "application/json", {"": PAGE, "state": b"{}"}[path]


def post(path: str, content) -> dict:
    if content == "late":
        raise Conflict("too late")
    if content == "bad":
        raise InputError("no such thing")
    return {"path": path, "content": content}


@pytest.fixture(scope="module")
def server():
    """The server's port and token."""
    servers, address = [], []

    class Stoppable(local_server._Server):
        def __init__(self, *args):
            super().__init__(*args)
            servers.append(self)

    ready, patch = threading.Event(), pytest.MonkeyPatch()
    patch.setattr(local_server, "_Server", Stoppable)
    thread = threading.Thread(target=serve_locally, args=(get, post), kwargs={
        "ready": lambda url: (address.append(urlsplit(url)), ready.set())})
    thread.start()
    ready.wait(10)
    yield address[0].port, address[0].path.strip("/")
    servers[0].shutdown()
    thread.join(10)
    patch.undo()


def ask(server, path="", body=None, token=None, method=None, **headers) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server[0], timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        headers = {"Content-Type": "application/json"} | headers
    connection.request(method or ("GET" if body is None else "POST"),
                       f"/{server[1] if token is None else token}/{path}", body, headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def raw(server, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server[0]), timeout=20) as connection:
        connection.sendall(content)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    return received


def test_the_page_comes_with_headers_that_close_it_to_others(server):
    status, headers, content = ask(server)
    assert status == 200 and content == PAGE
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert re.search("script-src 'sha256-[^']+'", policy) and "unsafe-eval" not in policy
    assert headers["X-Frame-Options"] == "DENY" and headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert len(server[1]) >= 22 and "Python" not in headers["Server"]
    assert raw(server, f"GET /{server[1]} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()).endswith(PAGE)
    status, headers, content = ask(server, "save", b'{"a": [1.5]}')
    assert (status, json.loads(content)) == (200, {"path": "save", "content": {"a": [1.5]}})
    assert "script-src" not in headers["Content-Security-Policy"]


@pytest.mark.parametrize("given", [
    {"token": ""}, {"token": "x"}, {"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example"}, {"Host": ""},
    {"Origin": "http://evil.example"}, {"Origin": "null"},
    {"Origin": "http://localhost:1", "Host": "localhost:2"},
    {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}])
def test_whoever_is_not_the_page_is_refused(server, given):
    for path, body in (("state", None), ("save", b"{}")):
        status, _, content = ask(server, path, body, **given)
        assert (status, list(json.loads(content))) == (403, ["error"])


def test_the_pages_own_requests_are_answered(server):
    origin = f"http://127.0.0.1:{server[0]}"
    assert ask(server, "save", b"{}", Origin=origin, Sec_Fetch_Site="same-origin")[0] == 200
    # Through a tunnel, the port is another one; a link may lead to the page.
    assert ask(server, "save", b"{}", Origin="http://localhost:9", Host="localhost:9")[0] == 200
    assert ask(server, Sec_Fetch_Site="cross-site")[0] == 200
    assert ask(server, "", b"{}", Sec_Fetch_Site="cross-site")[0] == 403
    largest = b"[]".ljust(local_server.LARGEST_BODY)
    assert json.loads(ask(server, "save", largest)[2]) == {"path": "save", "content": []}


@pytest.mark.parametrize("body, status", [
    (b"", 400), (b"{", 400), (b"\xff\xfe\xfd", 400), (b'{"a": NaN}', 400), (b'{"a": 1e999}', 400),
    (b'{"a": 1, "a": 2}', 400), (b"[" * 100_000, 400), (b"9" * 5000, 400), (b'"bad"', 400), (b'"late"', 409),
    (b" " * (local_server.LARGEST_BODY + 1), 413), (b" " * (20 << 20), 413)])
def test_a_bad_post_is_answered_with_a_sentence(server, body, status, capfd):
    answered, _, content = ask(server, "save", body)
    assert answered == status and json.loads(content)["error"]
    assert ask(server, "state")[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("headers, status", [
    ("Content-Length: -1", 400), ("Content-Length: 1_0", 400), ("Content-Length: x", 400),
    ("Content-Length: 99999999999999999999", 400), ("Content-Length: 999999999999", 413), ("A: b", 411),
    ("Transfer-Encoding: chunked", 411), ("Transfer-Encoding: chunked\r\nContent-Length: 2", 411)])
def test_a_body_without_a_proper_length_is_answered(server, headers, status, capfd):
    head = f"POST /{server[1]}/save HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = raw(server, f"{head}{headers}\r\n\r\n{{}}".encode())
    assert answer.startswith(f"HTTP/1.0 {status} ".encode()) and b'{"error": "' in answer
    assert capfd.readouterr().err == ""


def test_other_methods_paths_and_errors_are_answered_without_a_traceback(server, capfd):
    for method in ("PUT", "OPTIONS", "TRACE", "HEAD"):
        assert ask(server, method=method)[0] == 501
    assert b" 403 " in raw(server, b"GET /\xe9/ HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert b" 403 " in raw(server, f"GET /{server[1]}/ HTTP/1.0\r\n\r\n".encode())  # no Host
    assert ask(server, "nothing")[0] == 404
    assert ask(server, "save", b"{}", Content_Type="text/plain")[0] == 403
    status, _, content = ask(server, "broken")
    assert (status, json.loads(content)["error"]) == (500, "unexpected RuntimeError: first")
    assert b"error" in raw(server, b"nonsense\r\n\r\n") and b"414" in raw(server, b"a" * 70_000 + b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server[0])) as connection:  # gone before the answer
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(f"GET /{server[1]}/ HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    assert ask(server)[0] == 200
    assert capfd.readouterr().err == ""


def test_slow_and_many_connections_end(server, monkeypatch, capfd):
    monkeypatch.setattr(local_server, "SECONDS", 1)
    monkeypatch.setattr(local_server._Handler, "timeout", 0.8)
    start, many = time.monotonic(), local_server.MOST_CONNECTIONS + 5
    connections = [socket.create_connection(("127.0.0.1", server[0]), timeout=20) for _ in range(many)]
    with pytest.raises(OSError):
        while time.monotonic() < start + 10:  # each byte comes before the timeout of one read
            connections[0].sendall(b"G")
            time.sleep(0.2)
    assert time.monotonic() < start + 5
    for connection in connections:
        connection.close()
    head = f"POST /{server[1]}/save HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server[0]), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        connection.shutdown(socket.SHUT_WR)  # a body that ends early
        assert b" 408 " in connection.recv(1000)
    assert ask(server)[0] == 200 and capfd.readouterr().err == ""


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot be used .* give another --port"):
            serve_locally(get, post, taken.getsockname()[1])
