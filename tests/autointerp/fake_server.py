"""A real HTTP server on loopback that speaks OpenAI's protocol, answers by rules and fails on request.

It stands in for a language model that does exactly what the prompts ask: its explanation is the list of marked words,
and a pattern occurs where one of those words does. Faults are played in the order in which they are queued, one a
request.
"""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[BaseHTTPRequestHandler], None]
MODEL = "oracle"


class FakeServer:
    """What was asked, what is to fail, and how to answer."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.faults: list[Fault] = []
        self.answer: Callable[[str, dict[str, Any]], str] = oracle
        self.logprobs = True
        self.models: list[str] = [MODEL]
        self.refuses: set[str] = set()
        self.usage = True
        self.delay_s = 0.0
        self.base_url = ""
        self.lock = threading.Lock()

    @property
    def explained(self) -> list[dict[str, Any]]:
        """The requests for explanations."""
        return [request for request in self.requests if "You name" in request["messages"][0]["content"]]

    @property
    def judged(self) -> list[dict[str, Any]]:
        """The requests for judgements."""
        return [request for request in self.requests if "You name" not in request["messages"][0]["content"]]


def oracle(prompt: str, request: dict[str, Any]) -> str:
    """The marked words as an explanation; yes where one of the pattern's words occurs."""
    if "You name" in request["messages"][0]["content"]:
        words = sorted({word for run in re.findall(r"<<(.*?)>>", prompt) for word in re.findall(r"\w+", run)})
        return json.dumps({"explanation": " or ".join(words)})
    pattern, *excerpts = re.findall(r"^(?:Pattern|Excerpt ?\d*): (.*)$", prompt, flags=re.MULTILINE) or ["", ""]
    words = set(pattern.split(" or "))
    found = [not pattern or words & set(re.findall(r"\w+", excerpt)) for excerpt in excerpts]
    return " ".join("yes" if each else "no" for each in found)


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """Serve for the block on a free port of this machine."""
    state = FakeServer()
    httpd = _Server(("127.0.0.1", 0), _handler(state))
    state.base_url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def status(code: int, headers: dict[str, str] | None = None, message: str = "planned", code_name: str = "") -> Fault:
    """Answer with an error in OpenAI's form."""
    body = json.dumps({"error": {"message": message, "code": code_name}})
    return lambda handler: _send(handler, code, body, headers=headers)


def body(text: str, content_type: str = "application/json") -> Fault:
    """Answer 200 with this text instead of a completion."""
    return lambda handler: _send(handler, 200, text, content_type)


def drop(handler: BaseHTTPRequestHandler) -> None:
    """Cut the connection without an answer."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def hang(seconds: float) -> Fault:
    """Answer nothing for a while, then cut."""

    def fault(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        drop(handler)

    return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no news here."""


def _handler(state: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            _send(self, 200, json.dumps({"object": "list", "data": [{"id": name} for name in state.models]}))

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(request)
                state.keys.append(self.headers.get("Authorization", ""))
                fault = state.faults.pop(0) if state.faults else None
            time.sleep(state.delay_s)
            if fault:
                fault(self)
            elif refused := state.refuses & request.keys():
                status(400, message=f"Unsupported parameter: {min(refused)}")(self)
            else:
                _send(self, 200, _completion(state, request))

    return Handler


def _completion(state: FakeServer, request: dict[str, Any]) -> str:
    text = state.answer(request["messages"][-1]["content"], request)
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if request.get("logprobs") and state.logprobs:
        choice["logprobs"] = {"content": [_place(word) for word in text.split()]}
    reply: dict[str, Any] = {"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice]}
    if state.usage:
        n = sum(len(message["content"].split()) for message in request["messages"])
        reply["usage"] = {"prompt_tokens": n, "completion_tokens": len(text.split()), "total_tokens": n}
    return json.dumps(reply)


def _place(word: str) -> dict[str, Any]:
    other = {"yes": " No", "no": " Yes"}.get(word, "?")
    top = [{"token": word, "logprob": -0.105}, {"token": other, "logprob": -2.303}]
    return {"token": word, "logprob": -0.105, "top_logprobs": top}


def _send(
    handler: BaseHTTPRequestHandler,
    code: int,
    text: str,
    content_type: str = "application/json",
    headers: dict[str, str] | None = None,
) -> None:
    content = text.encode()
    handler.send_response(code)
    for name, value in {"Content-Type": content_type, "Content-Length": str(len(content)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
