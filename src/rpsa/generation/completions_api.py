"""One request to `/v1/completions` and what may come back: an answer, a reason to try again, or an error.

What makes a response exact are extensions that vLLM and SGLang share: token ids as the prompt, `return_token_ids`,
`skip_special_tokens`, and values for the sampling settings that these servers else take from the model's
`generation_config.json`. Servers without them get text and OpenAI's own fields.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import httpx2

from rpsa.errors import RPSAError
from rpsa.generation import Completion, Sampling, sample_seed
from rpsa.generation.decoding import ResponseDecoder
from rpsa.http import Refusal, read_refusal, short

PromptForm = Literal["token_ids", "text"]

_EXTENSIONS = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
}


class TryAgain(Exception):
    """This attempt failed, another may not. `wait`: seconds that the server asks for (Retry-After)."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Refused(RPSAError):
    """The server understood and declined: another attempt would end alike. `status`: the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


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

    async def post(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> Any:
        """The answer, parsed.

        Raises:
            TryAgain: the connection failed or timed out, the server is overloaded, or its answer is no JSON.
            Refused: any other status than success.
        """
        try:
            response = await client.post(f"{self.url}/completions", json=body)
        except httpx2.RequestError as error:
            raise TryAgain(f"{type(error).__name__} {error}".strip()) from error
        if response.status_code != 200:
            refusal = _refusal(client, response)
            if refusal.may_pass:
                raise TryAgain(f"status {refusal.status} {refusal.said}".strip(), refusal.wait or 0.0)
            raise Refused(self._declined(refusal), refusal.status)
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise TryAgain(f"an answer that is no JSON: {short(response.text) or 'empty'}") from error

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

    def _declined(self, refusal: Refusal) -> str:
        advice = {
            401: "set RPSA_API_KEY or OPENAI_API_KEY",
            403: "check the API key's rights",
            404: "check the URL (it ends in /v1) and the model's name (see GET /v1/models)",
            429: "see to the account",
        }.get(refusal.status, "correct the request")
        said = f"status {refusal.status} {refusal.said}".strip()
        return f"{self.url}, model {self.model!r}: {said}; {advice}"


def _only_choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise TryAgain(f"an answer without exactly one choice: {short(json.dumps(answer))}")
    return choices[0]


def _refusal(client: httpx2.AsyncClient, response: httpx2.Response) -> Refusal:
    key = client.headers.get("Authorization", "").removeprefix("Bearer ")
    return read_refusal(response.status_code, response.content, response.headers.get("Retry-After"), key)
