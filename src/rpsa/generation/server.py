"""Server backend: generation by OpenAI's completions endpoint (vLLM, SGLang, and others).

Prompts are rendered here and sent as token ids, where the server takes them, so that no other chat template and
no second BOS come between. A sample's seed is a hash of the base seed and its id, so that a request that is
repeated draws the same sample; how reproducible that is across batches is the server's affair.

What makes a response exact are extensions that vLLM and SGLang share: token ids as the prompt, `return_token_ids`,
`skip_special_tokens`, and values for the sampling settings that these servers else take from the model's
`generation_config.json`. Servers without them get text and OpenAI's own fields.
"""

import asyncio
import json
import logging
import queue
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rpsa.errors import RPSAError
from rpsa.generation import Completion, ResponseDecoder, Sampling, check_lengths, sample_seed
from rpsa.http import Client, Connection, GaveUp, Refused, Retry, TryAgain, checked_url, short
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptForm = Literal["token_ids", "text"]

_EXTENSIONS = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
}


@dataclass(frozen=True)
class CompletionsAPI:
    """Builds requests and reads answers; `url` is the base that ends in /v1."""

    url: str
    model: str
    decoder: ResponseDecoder

    def request(
        self, form: PromptForm, prompt: list[int], sampling: Sampling, sample_id: str
    ) -> dict[str, Any]:
        """The JSON body. Raises RPSAError if the prompt has to be text and would be read as other tokens."""
        fields = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sample_seed(sampling.seed, sample_id),
        }
        if form == "text":
            return {"prompt": self._prompt_text(prompt, sample_id), **fields}
        return {"prompt": prompt, **fields, **_EXTENSIONS}

    def completion(self, answer: Any, prompt: list[int]) -> Completion:
        """Check an answer and turn it into a `Completion`.

        Raises:
            TryAgain: it is incomplete, or belongs to another prompt.
            RPSAError: the server reads the prompt as more or fewer tokens, or hides the end of the thought,
                without which no answer can be scored.
        """
        choice = _only_choice(answer)
        self._check_prompt_length(answer, prompt)
        text, reason, token_ids = choice.get("text"), choice.get("finish_reason"), choice.get("token_ids")
        if reason not in ("stop", "length") or not isinstance(text, str):
            raise TryAgain(f"an answer without text or with finish_reason {reason!r}")
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise TryAgain("an answer to another prompt")
        if token_ids is not None:
            if not isinstance(token_ids, list) or not all(type(i) is int and i >= 0 for i in token_ids):
                raise TryAgain("an answer whose token_ids are not a list of numbers")
            return Completion(token_ids, self.decoder.text(token_ids), reason)
        if self.decoder.thought_is_special:
            raise RPSAError(
                f"{self.url} returns text without token ids, from which {self.decoder.thought.close.strip()}, special "
                "to this model's tokenizer, may be missing: use a server that knows return_token_ids (vLLM, SGLang)"
            )
        return self._from_text(text, reason)

    def _check_prompt_length(self, answer: dict[str, Any], prompt: list[int]) -> None:
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(counted, int) and counted != len(prompt):
            raise RPSAError(
                f"{self.url}, model {self.model!r} read a prompt of {len(prompt)} tokens as {counted}: serve the "
                "model that this tokenizer belongs to"
            )

    def _from_text(self, text: str, reason: Literal["stop", "length"]) -> Completion:
        token_ids = self.decoder.token_ids(text)
        eos = self.decoder.tokenizer.eos_token_id
        if reason == "stop" and token_ids[-1:] != [eos]:
            token_ids.append(eos)
        return Completion(token_ids, self.decoder.without_hidden(text), reason, exact=False)

    def _prompt_text(self, prompt: list[int], sample_id: str) -> str:
        """Text that the tokenizer reads as `prompt`: with its BOS spelled out, or left to the tokenizer."""
        for ids in (prompt, prompt[1:]):
            text = self.decoder.verbatim(ids)
            if self.decoder.tokenizer(text, verbose=False)["input_ids"] == prompt:
                return text
        raise RPSAError(
            f"sample {sample_id!r}: its prompt as text would be read as other tokens, and {self.url} takes text "
            "only: use a server that takes token ids (vLLM, SGLang)"
        )


def _only_choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise TryAgain(f"an answer without exactly one choice: {short(json.dumps(answer))}")
    return choices[0]


logger = logging.getLogger(__name__)

KEY_VARIABLES = ("RPSA_API_KEY", "OPENAI_API_KEY")

_NOT_UNDERSTOOD = (400, 415, 422)

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
        checked_url("server url", self.url, KEY_VARIABLES[0])
        for name, least in (("max_in_flight", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise RPSAError(f"server {name} is {getattr(self, name)}: give at least {least}")

    @property
    def retry(self) -> Retry:
        """A server that never was there is an address mistyped: that is said at once."""
        return Retry(self.retries + 1, self.backoff, timeout=self.timeout, tries_unreached=1)


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
        self.failure: Exception | None = None
        self.failed = asyncio.Event()

    async def do(self, samples: list[tuple[list[int], str]]) -> None:
        called = f"{self.api.url}, model {self.api.model!r}"
        client = Client(f"{self.api.url}/completions", KEY_VARIABLES, self.config.retry, called)
        async with client.connect(self.config.max_in_flight) as connection:
            self.form = await self._choose_form(connection, *samples[0])
            waiting = enumerate(samples)
            number = min(self.config.max_in_flight, len(samples))
            await asyncio.gather(*(self._worker(connection, waiting) for _ in range(number)))
        if self.failure is not None:
            raise self.failure

    async def _worker(self, connection: Connection, waiting: "enumerate[tuple[list[int], str]]") -> None:
        for index, (prompt, sample_id) in waiting:
            try:
                self.results.put((index, await self._respond(connection, prompt, sample_id)))
            except Exception as error:
                self._fail(error)
            if self.failed.is_set():
                return

    def _fail(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error
            self.failed.set()
            logger.warning("no more requests start, those under way are waited for: %s", error)

    async def _choose_form(self, connection: Connection, prompt: list[int], sample_id: str) -> PromptForm:
        """Ask for a single token in the better form; a server that does not understand it gets text."""
        if self.config.prompts_as != "auto":
            return self.config.prompts_as
        one_token = replace(self.sampling, max_new_tokens=1)
        try:
            response = await self._respond(connection, prompt, sample_id, one_token)
        except Refused as refusal:
            if refusal.status not in _NOT_UNDERSTOOD:
                raise
            self.form = "text"
            try:
                response = await self._respond(connection, prompt, sample_id, one_token)
            except Refused:
                raise refusal from None
        if not response.exact:
            logger.warning("%s gives no token ids: responses are tokenised again here", self.api.url)
        return self.form

    async def _respond(
        self,
        connection: Connection,
        prompt: list[int],
        sample_id: str,
        sampling: Sampling | None = None,
    ) -> Completion:
        """One sample, with as many attempts as it takes."""
        body = self.api.request(self.form, prompt, sampling or self.sampling, sample_id)

        def read(answer: Any) -> Completion:
            return self.api.completion(answer, prompt)

        try:
            return await connection.post(body, read, self._stopped_within)
        except GaveUp as error:
            raise RPSAError(
                f"{error} (sample {sample_id!r}); see to the server and start again: what has been yielded stands"
            ) from None

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
