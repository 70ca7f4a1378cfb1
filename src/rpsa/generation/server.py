"""Generation by a server with OpenAI's completions endpoint (vLLM, SGLang, and others).

Prompts are rendered here and sent as token ids, where the server takes them, so that no other chat template and
no second BOS come between. A sample's seed is a hash of the base seed and its id, so that a request that is
repeated draws the same sample; how reproducible that is across batches is the server's affair.
"""

import asyncio
import logging
import os
import queue
import random
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import httpx2

from rpsa.errors import RPSAError
from rpsa.generation import Completion, Sampling, check_lengths
from rpsa.generation.completions_api import CompletionsAPI, PromptForm, Refused, TryAgain
from rpsa.generation.decoding import ResponseDecoder
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT = 10.0
_LONGEST_BACKOFF = 60.0
_NOT_UNDERSTOOD = (400, 415, 422)
_NOT_REACHED = (httpx2.ConnectError, httpx2.ConnectTimeout)

Results = queue.SimpleQueue[tuple[int, Completion] | None]


@dataclass(frozen=True)
class ServerConfig:
    """A server and how to treat it.

    `url` is the base that ends in /v1, `model` the name that the server gives the model. `prompts_as` "auto"
    asks for one token to see whether the server takes token ids and the extensions that go with them; if not,
    it gets text and OpenAI's own fields, and its defaults apply to the rest (top_k, for instance). `timeout`:
    seconds until a response begins, its generation and the server's queue included. An attempt that fails for a passing
    reason is repeated up to `retries` times after about `backoff`, 2 `backoff`, 4 `backoff`, ... seconds (at
    most a minute), or later if the server says so. The API key is RPSA_API_KEY, or else OPENAI_API_KEY, from
    the environment.
    """

    url: str
    model: str
    prompts_as: Literal["auto", "token_ids", "text"] = "auto"
    max_in_flight: int = 64
    timeout: float = 3600.0
    retries: int = 8
    backoff: float = 0.5

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            url = httpx2.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise RPSAError(f"server url {self.url!r}: give one like http://127.0.0.1:8000/v1")
        if url.userinfo:
            raise RPSAError(f"server url at {url.host}: put the key into RPSA_API_KEY, not into the url")
        for name, least in (("max_in_flight", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise RPSAError(f"server {name} is {getattr(self, name)}: give at least {least}")


class ServerGenerator:
    """A `Generator` that keeps up to `max_in_flight` requests under way.

    `tokenizer` and `thought` are the served model's (see `ResponseDecoder`). Responses without token ids are
    tokenised again (`Completion.exact`).
    """

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: "PreTrainedTokenizerBase",
        thought: ThoughtFormat | None = None,
    ) -> None:
        self.config = config
        decoder = ResponseDecoder(tokenizer, thought)
        self._api = CompletionsAPI(config.url.rstrip("/"), config.model, decoder)

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as they finish; see `rpsa.generation.Generator`.

        The first request that fails for good ends the run: no more requests start, what is under way is
        yielded, then the error is raised. Leaving the iterator drops what is under way.

        Raises RPSAError if no server answers, if it refuses a request, or if the retries are spent.
        """
        check_lengths(prompts, sample_ids)
        if not prompts:
            return
        results: Results = queue.SimpleQueue()
        work = _Work(self.config, self._api, sampling, results)
        with _background(work.do(list(zip(prompts, sample_ids, strict=True))), results) as task:
            while (result := results.get()) is not None:
                yield result
            task.result()


class _Work:
    """The requests of one call of `generate`."""

    def __init__(
        self, config: ServerConfig, api: CompletionsAPI, sampling: Sampling, results: Results
    ) -> None:
        self.config = config
        self.api = api
        self.sampling = sampling
        self.results = results
        self.form: PromptForm = "token_ids"
        self.is_reached = False
        self.failure: Exception | None = None
        self.failed = asyncio.Event()

    async def do(self, samples: list[tuple[list[int], str]]) -> None:
        limits = httpx2.Limits(max_connections=self.config.max_in_flight)
        timeout = httpx2.Timeout(self.config.timeout, connect=min(_CONNECT_TIMEOUT, self.config.timeout))
        is_here = httpx2.URL(self.config.url).host in ("127.0.0.1", "::1", "localhost")
        async with httpx2.AsyncClient(
            headers=_authorization(), limits=limits, timeout=timeout, trust_env=not is_here
        ) as client:
            self.form = await self._choose_form(client, *samples[0])
            waiting = enumerate(samples)
            number = min(self.config.max_in_flight, len(samples))
            await asyncio.gather(*(self._worker(client, waiting) for _ in range(number)))
        if self.failure is not None:
            raise self.failure

    async def _worker(self, client: httpx2.AsyncClient, waiting: "enumerate[tuple[list[int], str]]") -> None:
        for index, (prompt, sample_id) in waiting:
            try:
                self.results.put((index, await self._respond(client, prompt, sample_id)))
            except Exception as error:
                self._fail(error)
            if self.failed.is_set():
                return

    def _fail(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error
            self.failed.set()
            logger.warning("no more requests start, those under way are waited for: %s", error)

    async def _choose_form(self, client: httpx2.AsyncClient, prompt: list[int], sample_id: str) -> PromptForm:
        """Ask for a single token in the better form; a server that does not understand it gets text."""
        if self.config.prompts_as != "auto":
            return self.config.prompts_as
        one_token = replace(self.sampling, max_new_tokens=1)
        try:
            response = await self._respond(client, prompt, sample_id, one_token)
        except Refused as refusal:
            if refusal.status not in _NOT_UNDERSTOOD:
                raise
            self.form = "text"
            try:
                response = await self._respond(client, prompt, sample_id, one_token)
            except Refused:
                raise refusal from None
        if not response.exact:
            logger.warning("%s gives no token ids: responses are tokenised again here", self.api.url)
        return self.form

    async def _respond(
        self,
        client: httpx2.AsyncClient,
        prompt: list[int],
        sample_id: str,
        sampling: Sampling | None = None,
    ) -> Completion:
        """One sample, with as many attempts as it takes."""
        body = self.api.request(self.form, prompt, sampling or self.sampling, sample_id)
        for attempt in range(self.config.retries + 1):
            try:
                answer = await self.api.post(client, body)
                self.is_reached = True
                return self.api.completion(answer, prompt)
            except TryAgain as failure:
                reason = failure
            self.is_reached |= not isinstance(reason.__cause__, _NOT_REACHED)
            if not self.is_reached:
                raise RPSAError(
                    f"no server answers at {self.api.url} ({reason}): start it or correct the url"
                )
            if attempt == self.config.retries or await self._stopped_within(self._wait(attempt, reason)):
                break
            logger.info("sample %s: %s; trying again", sample_id, reason)
        raise RPSAError(
            f"{self.api.url}, model {self.api.model!r}: sample {sample_id!r} failed {attempt + 1} times, last "
            f"with {reason}; see to the server and start again: what has been yielded stands"
        )

    def _wait(self, attempt: int, reason: TryAgain) -> float:
        backoff = min(self.config.backoff * 2.0**attempt, _LONGEST_BACKOFF)
        return max(reason.wait, backoff * random.uniform(0.5, 1.5))

    async def _stopped_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.failed.wait(), seconds)
        return self.failed.is_set()


@contextmanager
def _background(work: Coroutine[Any, Any, None], results: Results) -> Iterator["asyncio.Task[None]"]:
    """Do `work` on an event loop in a thread; `results` gets None when it is over.

    Leaving the block cancels what is still under way and waits until it is gone. A loop of its own, so that
    this also runs where there is one already, in a notebook.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def run() -> None:
        try:
            with suppress(BaseException):  # it stays in the task
                loop.run_until_complete(task)
        finally:
            results.put(None)

    thread = threading.Thread(target=run, name="rpsa-generation", daemon=True)
    thread.start()
    try:
        yield task
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def _authorization() -> dict[str, str]:
    key = (os.environ.get("RPSA_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RPSAError(
            "the API key in RPSA_API_KEY or OPENAI_API_KEY is no plain line of text: set it again"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}
