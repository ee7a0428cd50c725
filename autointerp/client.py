"""A chat client for any server that speaks OpenAI's protocol: a paid API, vLLM, or llama.cpp on this machine.

It asks at temperature 0 with a fixed seed, several requests at once, and never twice for the same answer. The surprise
is how differently "compatible" servers behave: many refuse a parameter that others need. So what a server's 400 names
is left out from then on (structured output, log-probabilities, seed), and every reply is read as what it is, text from
outside: size, shape and type are checked here. The key comes from the environment and goes into the request's header
only: no file, no log, no error text.
Source: https://platform.openai.com/docs/api-reference/chat; retries (408, 409, 429 with Retry-After, 5xx, dropped
connections) are those of the `openai` package.
"""

import asyncio
import ipaddress
import json
import os
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

from activations.errors import InputError
from autointerp.cache import RequestCache, request_key

KEY_VARIABLE = "OPENAI_API_KEY"
_OPENAI = "https://api.openai.com/v1"
_MAX_REPLY_BYTES = 2_000_000
_MAX_TEXT = 20_000
_GIVE_UP_AFTER = 16  # failed requests in a row, each after its retries
_TOP = 20  # alternatives asked for at each token
# What a 400 may name -> the parameters that are left out (None) or renamed because of it.
_GIVE_UP: dict[str, dict[str, str | None]] = {
    "response_format": {"response_format": None},
    "json_schema": {"response_format": None},
    "logprobs": {"logprobs": None, "top_logprobs": None},
    "max_completion_tokens": {"max_tokens": "max_completion_tokens"},
    "temperature": {"temperature": None},
    "seed": {"seed": None},
}

T = TypeVar("T")
Message = dict[str, str]


class AskError(Exception):
    """One request got no usable answer; the reason is one line without secrets. Others may still succeed."""


class BudgetError(Exception):
    """The next request could spend more tokens than the budget has left, so it was not sent."""


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """One token of a reply and the likeliest tokens in its place, itself included."""

    token: str
    top: tuple[tuple[str, float], ...]
    """(token, log-probability in nats), likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model answered, and what it cost."""

    text: str
    choices: tuple[TokenChoice, ...]
    """Empty when log-probabilities were not asked for, or the server gives none."""
    tokens_in: int
    tokens_out: int
    cached: bool = False
    """True when the answer was stored before: nothing was sent or paid."""


class ChatClient:
    """Asks one model at one server; use it as `async with client:`.

    model: the name that the server gives it. base_url: such as http://127.0.0.1:8000/v1; by default OPENAI_BASE_URL,
    else OpenAI's. concurrency: requests in flight. timeout_s: for one try. max_retries: tries after the first.
    Counts what it spends in `tokens_in` and `tokens_out` (cached answers are free).
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        concurrency: int = 4,
        timeout_s: float = 120.0,
        max_retries: int = 5,
        seed: int = 0,
    ) -> None:
        """Raises InputError when the address is no http(s) URL, or the key that it needs is not in the environment."""
        self.model = model
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI).rstrip("/")
        self.concurrency, self.timeout_s, self.max_retries, self.seed = concurrency, timeout_s, max_retries, seed
        self.tokens_in = self.tokens_out = 0
        self.cache: RequestCache | None = None
        self.reuse_answers = True
        self.budget_tokens: int | None = None
        self._reserved = 0
        self._fatal: InputError | None = None
        self._changes: dict[str, str | None] = {}
        self._asked: set[str] = set()
        self._under_way: dict[str, asyncio.Future[Reply]] = {}
        self._local = _is_loopback(self.base_url)
        _key(self.base_url, self._local)

    async def __aenter__(self) -> "ChatClient":
        # A connection pool belongs to the event loop it was made in, so it is made here and not in __init__.
        http = openai.DefaultAsyncHttpxClient(trust_env=False) if self._local else None
        self._api = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=_key(self.base_url, self._local),
            timeout=self.timeout_s,
            max_retries=self.max_retries,
            http_client=http,
        )
        self._slots = asyncio.Semaphore(self.concurrency)
        self._fatal, self._failed_in_a_row = None, 0
        self._asked, self._under_way = set(), {}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._api.close()

    async def check(self) -> None:
        """Raises InputError unless the server answers, takes the key and has the model (when it lists its models)."""
        try:
            raw = await self._api.with_options(max_retries=1, timeout=10.0).models.with_raw_response.list()
        except openai.APIConnectionError:
            raise InputError(self._no_server()) from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise InputError(self._refused(error)) from None
            return  # some servers have no list: the first request will tell
        names = _model_names(raw.content)
        if names and self.model not in names:
            raise InputError(self._no_model(names))

    async def ask(
        self, messages: list[Message], *, max_tokens: int, schema: dict[str, Any] | None = None, logprobs: bool = False
    ) -> Reply:
        """Ask, or return the stored answer; a request that is under way already is waited for and not sent again.

        schema: the JSON schema the answer should follow, where the server can hold the model to it.
        logprobs: ask for the likeliest tokens at each place, where the server gives them.
        Raises AskError when this request failed for good, BudgetError when it would go over the budget, InputError when
        every other request would fail too (key refused, model unknown, account empty, 16 failures in a row).
        """
        request = self._request(messages, max_tokens, schema, logprobs)
        key = request_key(request)
        if self.cache and (self.reuse_answers or key in self._asked) and (stored := self.cache.get(key)):
            try:
                return _from_json(stored)
            except (KeyError, TypeError, ValueError):
                pass  # written by another version: ask again
        if key not in self._under_way:
            self._under_way[key] = asyncio.ensure_future(self._answer(request, key))
            self._under_way[key].add_done_callback(lambda _: self._under_way.pop(key))
        return await self._under_way[key]

    async def _answer(self, request: dict[str, Any], key: str) -> Reply:
        """Wait for a free place, send, and store the answer."""
        async with self._slots:
            if self._fatal:  # a job has many requests waiting here, and none of them can succeed
                raise self._fatal
            try:
                reply = await self._within_budget(request)
            except AskError as error:
                self._failed_in_a_row += 1
                if self._failed_in_a_row < _GIVE_UP_AFTER:
                    raise
                self._fatal = InputError(self._failing(error))
            except InputError as error:
                self._fatal = error
            if self._fatal:
                raise self._fatal
        self._failed_in_a_row = 0
        if self.cache:
            self.cache.put(key, _to_json(reply))
            self._asked.add(key)
        return reply

    def _request(
        self, messages: list[Message], max_tokens: int, schema: dict[str, Any] | None, logprobs: bool
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": 0.0,
            "seed": self.seed,
            "max_tokens": max_tokens,
        }
        if schema:
            named = {"name": "answer", "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        if logprobs:
            request |= {"logprobs": True, "top_logprobs": _TOP}
        return request

    async def _within_budget(self, request: dict[str, Any]) -> Reply:
        """Send, holding back from the budget what the request may cost at most while it is under way."""
        # A token is rarely under two characters of English; marks and JSON are paid for by the same bound.
        may_cost = sum(len(message["content"]) for message in request["messages"]) // 2 + request["max_tokens"]
        spent = self.tokens_in + self.tokens_out + self._reserved
        if self.budget_tokens is not None and spent + may_cost > self.budget_tokens:
            raise BudgetError(f"{self.tokens_in + self.tokens_out:,} of {self.budget_tokens:,} tokens are spent")
        self._reserved += may_cost
        try:
            reply = await self._send(request)
        finally:
            self._reserved -= may_cost
        if not reply.tokens_in + reply.tokens_out:  # a server that keeps no count must not have an endless budget
            reply = replace(reply, tokens_in=may_cost)
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        return reply

    async def _send(self, request: dict[str, Any]) -> Reply:
        while True:
            changes = dict(self._changes)
            sent = _changed(request, changes)
            try:
                raw = await self._api.chat.completions.with_raw_response.create(**sent)
            except openai.APITimeoutError:
                raise AskError(f"no answer within {self.timeout_s:.0f} s") from None
            except openai.APIConnectionError:
                raise AskError(f"the connection to {self.base_url} failed") from None
            except openai.APIStatusError as error:
                if error.status_code in (400, 422) and self._learns_from(error, sent):
                    continue
                raise self._status_error(error) from None
            return _parse(raw.content, raw.headers.get("content-type", ""))

    def _learns_from(self, error: openai.APIStatusError, sent: dict[str, Any]) -> bool:
        """True when the server named a parameter that it could do without, and that it was sent."""
        for word, changes in _GIVE_UP.items():
            if word in str(error.message) and any(name in sent for name in changes):
                self._changes |= changes
                return True
        return False

    def _status_error(self, error: openai.APIStatusError) -> Exception:
        if error.status_code in (401, 403):
            return InputError(self._refused(error))
        if error.status_code == 404:
            return InputError(self._no_model([]))
        if error.code == "insufficient_quota":
            return InputError(f"The account at {self.base_url} has no quota left: add to it, then start again.")
        return AskError(f"the server answered {error.status_code}: {_one_line(str(error.message))}")

    def _failing(self, error: AskError) -> str:
        return (
            f"The server at {self.base_url} failed {self._failed_in_a_row} requests in a row (last: {error}): "
            "look at the server, then start again; what was answered is kept."
        )

    def _no_server(self) -> str:
        return (
            f"No server answers at {self.base_url}: expected one that speaks OpenAI's protocol. "
            "Start it (`llama-server`, `vllm serve`), correct --base-url, or use --local."
        )

    def _no_model(self, names: list[str]) -> str:
        has = f": it has {', '.join(_one_line(name) for name in names[:8])}" if names else ""
        return f"The server at {self.base_url} has no model {self.model!r}{has}. Name one of its models with --llm."

    def _refused(self, error: openai.APIStatusError) -> str:
        return (
            f"The server at {self.base_url} refused the request ({error.status_code}): "
            f"check the key in the environment variable {KEY_VARIABLE}."
        )


async def settle(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all of it and return the results; the first error is raised only when nothing is under way any more.

    What is under way has been paid for: it is to be answered and stored, also when a budget or a fault ends the job.
    """
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


def _is_loopback(base_url: str) -> bool:
    """True for an address of this machine. Raises InputError unless it is an http(s) URL without a password in it."""
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname or url.username or url.password:
        raise InputError(
            "The server's address is no usable URL: expected something like http://127.0.0.1:8000/v1, "
            f"with the key in {KEY_VARIABLE} and not in the address."
        )
    try:
        return ipaddress.ip_address(url.hostname).is_loopback
    except ValueError:
        return url.hostname == "localhost"


def _key(base_url: str, local: bool) -> str:
    if key := os.environ.get(KEY_VARIABLE, "").strip():
        return key
    if local:
        return "none"
    raise InputError(
        f"No API key: {base_url} needs one in the environment variable {KEY_VARIABLE} "
        "(any value if the server asks for none). Without a key use --local or a server on this machine."
    )


def _changed(request: dict[str, Any], changes: dict[str, str | None]) -> dict[str, Any]:
    """`request` with the parameters in `changes` renamed, or left out where the new name is None."""
    renamed = {changes.get(name, name): value for name, value in request.items()}
    return {name: value for name, value in renamed.items() if name is not None}


def _model_names(body: bytes) -> list[str]:
    try:
        return [row["id"] for row in json.loads(body)["data"] if isinstance(row["id"], str)]
    except (ValueError, TypeError, KeyError):
        return []


def _parse(body: bytes, content_type: str) -> Reply:
    """Read a chat completion. Raises AskError for whatever is none: an HTML page, cut JSON, megabytes, no text."""
    if len(body) > _MAX_REPLY_BYTES:
        raise AskError(f"the reply has {len(body):,} bytes, more than {_MAX_REPLY_BYTES:,}")
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        usage = reply.get("usage") or {}
        tokens = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        places = (choice.get("logprobs") or {}).get("content") or []
        choices = tuple(TokenChoice(token=place["token"], top=_top(place)) for place in places[:64])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise AskError(f"the reply is no chat completion ({_one_line(content_type) or 'no content type'})") from None
    if not isinstance(text, str):
        raise AskError("the reply holds no text")
    return Reply(text=text[:_MAX_TEXT], choices=choices, tokens_in=tokens[0], tokens_out=tokens[1])


def _top(place: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    return tuple((str(each["token"]), float(each["logprob"])) for each in place["top_logprobs"][:_TOP])


def _to_json(reply: Reply) -> dict[str, Any]:
    return {name: value for name, value in asdict(reply).items() if name != "cached"}


def _from_json(stored: dict[str, Any]) -> Reply:
    choices = tuple(TokenChoice(token=c["token"], top=tuple((t, p) for t, p in c["top"])) for c in stored["choices"])
    tokens = stored["tokens_in"], stored["tokens_out"]
    return Reply(text=stored["text"], choices=choices, tokens_in=tokens[0], tokens_out=tokens[1], cached=True)


def _one_line(text: str) -> str:
    """At most 200 characters of a foreign message on one line, with the key struck out should it be quoted."""
    if key := os.environ.get(KEY_VARIABLE, "").strip():
        text = text.replace(key, "***")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
