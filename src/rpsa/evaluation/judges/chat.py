"""Judging by a chat model behind an OpenAI-compatible endpoint."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from rpsa.errors import RPSAError
from rpsa.evaluation.judges.http import EndpointError, Retry, Stopped, post
from rpsa.evaluation.judges.judgement import Judgement, unparseable
from rpsa.evaluation.judges.rubrics import Rubric
from rpsa.text import hide_credentials

KEY_VARIABLES = ("RPSA_JUDGE_API_KEY", "OPENAI_API_KEY")

# How servers say that it is about this one text: it is counted, and the rest goes on. The last is vLLM's, in words.
_ABOUT_THE_TEXT = {"content_filter", "content_policy_violation", "context_length_exceeded"}
_TOO_LONG = "maximum context length"


class ChatJudge:
    """A `Judge` that asks a chat model by a rubric, `concurrency` calls at a time.

    The key is read from `RPSA_JUDGE_API_KEY`, else `OPENAI_API_KEY`, when judging begins, and is never stored.
    `request` adds to what the rubric sends (`None` takes a field out, for models that refuse it).
    """

    def __init__(
        self,
        rubric: Rubric,
        *,
        base_url: str,
        model: str,
        concurrency: int = 8,
        request: Mapping[str, Any] | None = None,
        retry: Retry | None = None,
    ) -> None:
        if concurrency < 1:
            raise RPSAError(f"judge: concurrency is {concurrency}: give at least 1")
        self.rubric = rubric
        self.url = _checked(base_url) + "/chat/completions"
        self.model = model
        self.concurrency = concurrency
        fields = {**rubric.request, **(request or {})}
        self.request = {name: value for name, value in fields.items() if value is not None}
        self.retry = retry or Retry()
        self.identity: Mapping[str, Any] = {
            "id": rubric.id,
            "revision": model,
            "prompt_sha256": rubric.sha256,
            "backend": self.url,
            "request": self.request,
        }

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Judgement]]:
        """Yield (index, judgement) as answers come.

        At most `concurrency` calls are under way or answered and not yet taken: the next one starts when the
        caller asks for more. An error stops new calls; answers that were under way are yielded before it is raised.
        """
        key = _key()
        stop = Event()
        todo = iter(enumerate(pairs))
        running: dict[Future[Judgement], int] = {}
        failure: RPSAError | None = None
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            while True:
                while failure is None and len(running) < self.concurrency and (item := next(todo, None)):
                    running[pool.submit(self._ask, *item[1], key, stop)] = item[0]
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    index = running.pop(future)
                    try:
                        judgement = future.result()
                    except RPSAError as error:
                        failure = failure or error
                        stop.set()
                    except Stopped:
                        pass
                    else:
                        yield index, judgement
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def _ask(self, prompt: str, text: str, key: str | None, stop: Event) -> Judgement:
        body = {"model": self.model, "messages": self.rubric.messages(prompt, text), **self.request}
        try:
            output = post(self.url, body, key, _content, self.retry, stop)
        except EndpointError as error:
            if error.code in _ABOUT_THE_TEXT or _TOO_LONG in str(error):
                return unparseable(str(error))
            if error.status in (401, 403):
                raise RPSAError(f"{error}: set {' or '.join(KEY_VARIABLES)} to a valid key") from None
            raise
        return self.rubric.read(output)


def _content(answer: Any) -> str:
    """The text of a chat completion; empty where the model refused to say anything."""
    content = answer["choices"][0]["message"].get("content")
    if content is not None and not isinstance(content, str):
        raise TypeError("content is not text")
    return content or ""


def _checked(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RPSAError(f"judge: base_url is {hide_credentials(base_url)!r}: give one like https://host/v1")
    if parts.username or parts.password or parts.query:
        raise RPSAError(f"judge: base_url holds more than an address: put the key into {KEY_VARIABLES[0]}")
    return base_url.rstrip("/")


def _key() -> str | None:
    for name in KEY_VARIABLES:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise RPSAError(f"{name} holds characters that no key has: set it again")
            return key
    return None
