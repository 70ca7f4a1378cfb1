"""A server on the loopback with OpenAI's completions endpoint, generating with the tiny model, and its bad days."""

import json
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rpsa.generation import Sampling
from rpsa.generation.transformers import TransformersGenerator

MODEL = "tiny"
STANDARD = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
EXTENSIONS = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "skip_special_tokens": False}


class CompletionsServer:
    """`fault(prompt ids, attempt)` names what goes wrong with a request (see `_Handler`), or None.

    `speaks`: "ids" takes token ids and returns them as vLLM does, "ids in" only takes them, "text" knows
    OpenAI's own fields alone. A context manager; `port` 0 finds a free one.
    """

    def __init__(self, model, tokenizer, speaks="ids", fault=lambda prompt, attempt: None, key=None, port=0):
        self.generator = TransformersGenerator(model, tokenizer)
        self.tokenizer = tokenizer
        self.speaks, self.fault, self.key = speaks, fault, key
        self.prompt_tokens, self.probe_fault, self.retry_after = len, lambda attempt: None, "1"
        self.attempts, self.requests, self.answers = Counter(), [], {}
        self.under_way = self.most_under_way = 0
        self.lock, self.model_lock = threading.Lock(), threading.Lock()
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = _Http(("127.0.0.1", port), handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def complete(self, prompt, body):
        """Like a real engine: a function of the prompt and the request's own seed."""
        sampling = Sampling(body["temperature"], body["top_p"], body["max_tokens"], body["seed"])
        key = (*prompt, sampling)
        with self.model_lock:
            if key not in self.answers:
                self.answers[key] = next(self.generator.generate([prompt], sampling, ["of the server"]))[1]
            return self.answers[key]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Broken connections are the point here: no traceback for them."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: CompletionsServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.requests.append((self.path, body, dict(self.headers)))
            owner.under_way += 1
            owner.most_under_way = max(owner.most_under_way, owner.under_way)
        try:
            self.answer(owner, body)
        finally:
            with owner.lock:
                owner.under_way -= 1

    def answer(self, owner, body):
        if owner.key and self.headers.get("Authorization") != f"Bearer {owner.key}":
            return self.error(401, "wrong key")
        if self.path != "/v1/completions" or body["model"] != MODEL:
            return self.error(404, f"The model `{body['model']}` does not exist.")
        prompt = body["prompt"]
        if owner.speaks == "text":
            if body.keys() - STANDARD or not isinstance(prompt, str):
                return self.error(400, "Unrecognized request arguments")
            prompt = owner.tokenizer(prompt)["input_ids"]
        else:
            assert {name: body[name] for name in EXTENSIONS} == EXTENSIONS
        is_probe = body["max_tokens"] == 1
        with owner.lock:
            attempt = owner.attempts[(*prompt, is_probe)]
            owner.attempts[(*prompt, is_probe)] += 1
        fault = owner.probe_fault(attempt) if is_probe else owner.fault(prompt, attempt)
        if fault in (400, 401):
            return self.error(fault, "no\nway")
        if fault == "quota":
            return self.error(429, "you have used it up", code="insufficient_quota")
        if fault in (429, 500, 502, 503):
            headers = {"Retry-After": owner.retry_after} if fault == 429 else {}
            return self.error(fault, "busy", headers)
        if fault == "slow":
            owner.released.wait(600.0)
        if fault in ("drop", "reset"):
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close() if fault == "reset" else None
        return self.send(self.choices(owner, prompt, body, fault), fault)

    def choices(self, owner, prompt, body, fault):
        completion = owner.complete(prompt, body)
        choice = {"index": 0, "text": completion.text, "finish_reason": completion.finish_reason}
        if owner.speaks == "ids":
            choice |= {"token_ids": completion.token_ids, "prompt_token_ids": prompt}
        if fault == "other prompt":
            choice["prompt_token_ids"] = prompt[:-1]
        if fault == "unfinished":
            choice |= {"finish_reason": None, "text": choice["text"][:5]}
        choices = {"no choices": [], "two choices": [choice, choice]}.get(fault, [choice])
        return {"choices": choices, "usage": {"prompt_tokens": owner.prompt_tokens(prompt)}}

    def send(self, answer, fault):
        content = json.dumps(answer).encode()
        content = {
            "garbage": b"<html>502 Bad Gateway\xff</html>",
            "empty": b"",
            "error object": b'{"error": {"message": "engine died"}}',
            "list": b"[1]",
        }.get(fault, content)
        self.send_response(200)
        if fault == "cut json":  # no length: the client cannot see that something is missing
            self.send_header("Connection", "close")
            self.close_connection = True
            content = content[: len(content) // 2]
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "half body":
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def error(self, status, message, headers=(), code=None):
        content = json.dumps({"error": {"message": message, "code": code}}).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


PASSING_FAULTS = [
    "drop",
    "reset",
    "half body",
    "cut json",
    "garbage",
    "empty",
    "error object",
    "list",
    "no choices",
    "two choices",
    "unfinished",
    "other prompt",
    "slow",
    429,
    500,
    502,
    503,
]
