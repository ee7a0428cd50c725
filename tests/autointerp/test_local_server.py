import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from activations.errors import InputError
from autointerp.client import ChatClient
from autointerp.explainers import llm
from autointerp.label import label
from autointerp.local_server import default_model, local_server, model_alias
from data.store import DETECTION, open_store
from tests.planted import planted_store

installed = importlib.util.find_spec("xllamacpp") is not None
needs_server = pytest.mark.skipif(not installed, reason="the extra local-llm is not installed")


def answers(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(base_url + "/models", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"sae-workbench\[local-llm\]"), local_server():
        pass


@needs_server
def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="is no file: expected a language model"), local_server(tmp_path / "no.gguf"):
        pass


@needs_server
def test_a_file_that_is_no_model_is_one_line_with_the_servers_own_words(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"this is no model")
    with pytest.raises(InputError, match=r"did not start \(.+\)") as caught, local_server(tmp_path / "bad.gguf"):
        pass
    assert "\n" not in str(caught.value)


@needs_server
def test_it_answers_with_probabilities_keeps_to_a_schema_and_is_gone_afterwards():
    with local_server() as base_url:
        assert base_url.startswith("http://127.0.0.1:")
        client = ChatClient(model_alias(default_model()), base_url)

        async def talk() -> None:
            async with client:
                await client.check()
                asked = [{"role": "user", "content": "Is the sea wet? Answer yes or no."}]
                reply = await client.ask(asked, max_tokens=2, logprobs=True)
                assert reply.tokens_in > 5
                assert len(reply.choices[0].top) == 20
                assert all(p <= 0 for _, p in reply.choices[0].top)
                asked = [{"role": "user", "content": "What do apples and pears have in common?"}]
                reply = await client.ask(asked, max_tokens=60, schema=llm.SCHEMA)
                assert llm.parse_explanation(reply.text)

        asyncio.run(talk())
        assert client.tokens_in > 0
    assert not answers(base_url)


@needs_server
def test_it_stops_when_the_block_fails():
    seen = []

    def fail() -> None:
        with local_server() as base_url:
            seen.append((base_url, answers(base_url)))
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fail()
    ((base_url, answered),) = seen
    assert answered
    assert not answers(base_url)


@needs_server
@pytest.mark.slow
def test_it_ends_when_its_parent_is_killed():
    code = "from autointerp.local_server import *\nwith local_server() as u: print(u, flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes)
    base_url = parent.stdout.readline().strip()
    assert answers(base_url)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    deadline = time.monotonic() + 20
    while answers(base_url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(base_url)


@needs_server
@pytest.mark.slow
def test_real_features_are_labelled_by_a_real_model(tmp_path):
    folder = planted_store(tmp_path / "d", n_features=12)
    with local_server() as base_url:
        client = ChatClient(model_alias(default_model()), base_url)
        report = label(folder, features=[0, 1, 2], client=client)
    assert report.n_explained + report.n_failed >= 3
    with open_store(folder) as store:
        scores = [s for s in store.scores() if s.scorer == DETECTION]
    assert len(scores) == report.n_scored
    assert all(0 <= s.lo <= s.value <= s.hi <= 1 for s in scores)
