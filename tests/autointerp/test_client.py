import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from activations.errors import InputError
from autointerp.cache import RequestCache, request_key
from autointerp.client import AskError, BudgetError, ChatClient, Reply
from tests.autointerp.fake_server import MODEL, FakeServer, body, drop, fake_server, hang, status

SECRET = "sk-very-secret-0123456789"
QUESTION = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Pattern: a\n\nExcerpt: a b"}]


@pytest.fixture
def server():
    with fake_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def run(client: ChatClient, work: Callable[[ChatClient], Any]) -> Any:
    async def inside() -> Any:
        async with client:
            return await work(client)

    return asyncio.run(inside())


def ask(server: FakeServer, **settings: Any) -> Reply:
    return run(ChatClient(MODEL, server.base_url, **settings), lambda c: c.ask(QUESTION, max_tokens=3, logprobs=True))


def test_an_answer_comes_with_its_token_counts_and_probabilities(server):
    client = ChatClient(MODEL, server.base_url, seed=7)
    reply = run(client, lambda c: c.ask(QUESTION, max_tokens=3, logprobs=True))
    assert reply.text == "yes"
    assert reply.choices[0].top[0] == ("yes", -0.105)
    assert (client.tokens_in, client.tokens_out) == (reply.tokens_in, reply.tokens_out) == (6, 1)
    sent = server.requests[0]
    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.0, 7, 3)


@pytest.mark.parametrize("fault", [status(500), status(503), drop, status(429, {"Retry-After": "1"})])
def test_passing_faults_are_retried(server, fault):
    server.faults = [fault]
    assert ask(server).text == "yes"
    assert len(server.requests) == 2


def test_retry_after_is_waited_for(server):
    server.faults = [status(429, {"Retry-After": "2"})]
    start = time.monotonic()
    ask(server)
    assert time.monotonic() - start >= 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (body("not json"), "no chat completion"),
        (body('{"choices": [{"message": {"content": "y'), "no chat completion"),
        (body('{"choices": []}'), "no chat completion"),
        (body("[1, 2]"), "no chat completion"),
        (body("null"), "no chat completion"),
        (body('{"choices": [{"message": {"content": null}}]}'), "holds no text"),
        (body('{"choices": [{"message": {"content": "y"}, "logprobs": {"content": [1]}}]}'), "no chat completion"),
        (body("<html>Bad gateway</html>", "text/html"), "text/html"),
        (body(""), "no chat completion"),
        (body("x" * 3_000_000), "3,000,000 bytes"),
        (status(400, message="context length exceeded"), "context length exceeded"),
    ],
)
def test_what_is_no_answer_is_one_line_and_is_not_asked_again(server, fault, reason):
    server.faults = [fault]
    with pytest.raises(AskError, match=reason) as caught:
        ask(server)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_server_that_hangs_is_given_up(server):
    server.faults = [hang(5.0), hang(5.0)]
    with pytest.raises(AskError, match="no answer within 0"):
        ask(server, timeout_s=0.3, max_retries=1)


def test_a_server_that_fails_all_the_time_ends_the_job(server):
    server.faults = [body("?")] * 100
    client = ChatClient(MODEL, server.base_url)

    async def many(c: ChatClient) -> list[Any]:
        questions = [[{"role": "user", "content": str(i)}] for i in range(60)]
        return await asyncio.gather(*(c.ask(q, max_tokens=3) for q in questions), return_exceptions=True)

    outcomes = run(client, many)
    assert any(isinstance(outcome, InputError) and "16 requests in a row" in str(outcome) for outcome in outcomes)
    assert len(server.requests) < 25


@pytest.mark.parametrize("name", ["logprobs", "response_format", "temperature", "seed"])
def test_a_parameter_that_the_server_refuses_is_left_out_from_then_on(server, name):
    server.refuses = {name}
    client = ChatClient(MODEL, server.base_url)

    async def twice(c: ChatClient) -> list[str]:
        schema = {"type": "object"}
        return [(await c.ask(m, max_tokens=3, schema=schema, logprobs=True)).text for m in (QUESTION, QUESTION[1:])]

    assert run(client, twice) == ["yes", "yes"]
    assert [name in request for request in server.requests] == [True, False, False]


def test_newer_servers_get_their_name_for_the_length_of_an_answer(server):
    server.faults = [status(400, message="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")]
    assert ask(server).text == "yes"
    assert server.requests[1]["max_completion_tokens"] == 3
    assert "max_tokens" not in server.requests[1]


def test_no_more_requests_than_asked_for_are_under_way(server):
    server.delay_s = 0.05
    under_way, most = 0, 0

    def answer(_: str, __: dict[str, Any]) -> str:
        nonlocal under_way, most
        with server.lock:
            under_way, most = under_way + 1, max(most, under_way + 1)
        time.sleep(0.05)
        with server.lock:
            under_way -= 1
        return "yes"

    server.answer = answer

    async def many(c: ChatClient) -> None:
        await asyncio.gather(*(c.ask([{"role": "user", "content": str(i)}], max_tokens=3) for i in range(12)))

    run(ChatClient(MODEL, server.base_url, concurrency=3), many)
    assert most == 3


def test_a_stored_answer_is_not_paid_twice(server, tmp_path):
    for attempt in range(2):
        client = ChatClient(MODEL, server.base_url)
        client.cache = RequestCache(tmp_path)
        reply = run(client, lambda c: c.ask(QUESTION, max_tokens=3, logprobs=True))
        client.cache.close()
        assert (reply.text, reply.choices[0].token, reply.cached) == ("yes", "yes", attempt == 1)
        assert client.tokens_in == (0 if attempt else 6)
    assert len(server.requests) == 1


def test_the_cache_survives_a_line_that_was_cut_short(tmp_path):
    cache = RequestCache(tmp_path)
    cache.put("a", {"text": "ü\n"})
    cache.put("b", {"text": "2"})
    cache.close()
    file = tmp_path / "requests.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    again = RequestCache(tmp_path)
    assert again.get("a") == {"text": "ü\n"}
    assert again.get("b") is None
    again.put("c", {"text": "3"})
    again.close()
    third = RequestCache(tmp_path)
    assert third.get("c") == {"text": "3"}
    assert third.get("a") == {"text": "ü\n"}
    third.close()


def test_a_request_is_known_by_all_that_was_asked():
    request = {"model": "m", "temperature": 0.0, "messages": QUESTION}
    assert request_key(request) == request_key(dict(reversed(request.items())))
    assert request_key(request) != request_key({**request, "model": "n"})
    assert request_key(request) != request_key({**request, "messages": QUESTION[1:]})


@pytest.mark.parametrize("usage", [True, False])
def test_the_budget_is_never_exceeded(server, usage):
    server.usage = usage
    client = ChatClient(MODEL, server.base_url)
    client.budget_tokens = 200

    async def many(c: ChatClient) -> list[Any]:
        questions = [[{"role": "user", "content": f"word {i} and some more"}] for i in range(80)]
        return await asyncio.gather(*(c.ask(q, max_tokens=3) for q in questions), return_exceptions=True)

    outcomes = run(client, many)
    assert any(isinstance(outcome, BudgetError) for outcome in outcomes)
    assert 0 < client.tokens_in + client.tokens_out <= 200


def test_a_paid_server_without_a_key_says_which_variable():
    with pytest.raises(InputError, match=r"OPENAI_API_KEY.*--local"):
        ChatClient("gpt-5-mini")


def test_no_key_is_needed_on_this_machine(server):
    assert ask(server).text == "yes"


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x/v1", "http://", "http://user:pass@127.0.0.1/v1", "nonsense"])
def test_an_address_that_is_none_is_refused_and_no_password_is_repeated(url):
    with pytest.raises(InputError, match="no usable URL") as caught:
        ChatClient(MODEL, url)
    assert "pass@" not in str(caught.value)


def test_nobody_there_is_one_line_that_says_what_to_start():
    with pytest.raises(InputError, match=r"No server answers at http://127.0.0.1:9/v1.*llama-server"):
        run(ChatClient(MODEL, "http://127.0.0.1:9/v1"), lambda c: c.check())


def test_an_unknown_model_is_one_line_with_those_there_are(server):
    with pytest.raises(InputError, match=r"has no model 'gpt-9': it has oracle\. .*--llm"):
        run(ChatClient("gpt-9", server.base_url), lambda c: c.check())
    server.models = []
    server.faults = [status(404, message="The model does not exist")]
    client = ChatClient("gpt-9", server.base_url)
    with pytest.raises(InputError, match="has no model 'gpt-9'"):
        run(client, lambda c: c.ask(QUESTION, max_tokens=3))


def test_an_empty_account_ends_the_job(server):
    server.faults = [status(429, {"Retry-After": "0"}, "You exceeded your quota", "insufficient_quota")] * 2
    with pytest.raises(InputError, match="no quota left"):
        ask(server, max_retries=1)


def test_the_key_is_sent_and_shows_nowhere(server, monkeypatch, tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    client = ChatClient(MODEL, server.base_url)
    client.cache = RequestCache(tmp_path)
    told = []
    for fault in [None, status(401, message=f"bad key {SECRET}"), status(400, message=f"what is {SECRET}?")]:
        server.faults = [fault] if fault else []
        try:
            run(client, lambda c: c.ask(QUESTION if fault is None else QUESTION[1:], max_tokens=3))  # noqa: B023
        except (AskError, InputError) as error:
            told.append(f"{error!r} {error.__cause__!r}")
    client.cache.close()
    assert server.keys == [f"Bearer {SECRET}"] * 3
    assert len(told) == 2
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    heard = "".join([*told, written, caplog.text, *capfd.readouterr()])
    assert SECRET not in heard
    assert "OPENAI_API_KEY" in told[0]
