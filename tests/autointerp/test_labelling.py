import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.errors import InputError
from activations.files import lock
from autointerp.client import ChatClient
from autointerp.explainers.llm import choose
from autointerp.label import label, pick_features
from autointerp.llm_job import draw_held_out
from autointerp.scorers.detection import DetectionOptions
from autointerp.windows import active_windows
from data.store import DETECTION, Explanation, Score, open_store
from tests.autointerp.fake_server import MODEL, body, fake_server, oracle, status
from tests.planted import planted_store

FEATURES = list(range(6))


@pytest.fixture
def server():
    with fake_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def folder(tmp_path):
    return planted_store(tmp_path / "d", n_features=12)


def stored(folder: Path) -> tuple[list[Explanation], list[Score]]:
    with open_store(folder) as store:
        explanations = [e for e in store.explanations() if e.source == "llm"]
        ids = {e.id for e in explanations}
        return explanations, [s for s in store.scores() if s.explanation_id in ids]


def without_dates(rows: list[Any]) -> list[tuple[Any, ...]]:
    return sorted(tuple(value for name, value in vars(row).items() if name != "created") for row in rows)


def test_an_oracle_scores_high_on_true_explanations_and_chance_on_others(server, folder):
    report = label(folder, features=range(10), client=ChatClient(MODEL, server.base_url))
    explanations, scores = stored(folder)
    accuracy = [s for s in scores if s.scorer == DETECTION]
    ranking = [s for s in scores if s.scorer == "detection-auroc"]
    assert report.n_explained == report.n_scored == len(accuracy) == len(ranking) == 10
    assert explanations[0].text == "mountain or river"
    assert min(s.value for s in accuracy) >= 0.9
    assert 0.35 < np.mean([s.control for s in accuracy]) < 0.65
    assert all(s.control < s.lo for s in accuracy if s.value == 1.0 and s.control < 0.6)
    assert all((s.chance, s.failures, s.n, s.model) == (0.5, 0, 20, MODEL) for s in accuracy)
    assert min(s.cost_tokens for s in accuracy) > 1000


def test_both_poles_of_a_signed_latent_are_explained_apart(server, tmp_path):
    folder = planted_store(tmp_path / "d", n_features=12, signed=True)
    label(folder, features=[0, 1, 2], client=ChatClient(MODEL, server.base_url))
    explanations, scores = stored(folder)
    texts = {(e.feature, e.pole): e.text for e in explanations}
    assert texts[0, "+"] == "river"
    assert texts[0, "-"] == "mountain"
    assert min(s.value for s in scores if s.scorer == DETECTION) == 1.0


def test_no_text_is_both_shown_to_the_explainer_and_scored(folder):
    with open_store(folder) as store:
        for feature in store.features():
            examples = store.examples(feature)
            shown = {w.doc for w in choose(active_windows(examples, "+", "explain"))}
            held_out = draw_held_out(store, (feature, "+"), examples, DetectionOptions(n_active=50, n_off=50))
            assert held_out is not None
            assert shown
            assert not shown & set(held_out.docs)


def test_windows_called_off_are_off_and_those_called_active_are_not(folder):
    from tests.planted import word_id

    with open_store(folder) as store:
        for feature in store.features():
            held_out = draw_held_out(store, (feature, "+"), store.examples(feature), DetectionOptions())
            words = {word_id(feature), word_id(feature + 1)}
            assert [bool(words & set(ids)) for ids in held_out.token_ids] == held_out.active.tolist()


def test_marks_are_shown_to_the_explainer_and_not_to_the_judge(server, folder):
    label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    assert all("<<" in request["messages"][-1]["content"] for request in server.explained)
    assert not any("<<" in message["content"] for request in server.judged for message in request["messages"])


def test_a_second_run_asks_nothing(server, folder):
    label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    n = len(server.requests)
    report = label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    assert len(server.requests) == n
    assert (report.n_explained, report.n_skipped, report.tokens_in) == (0, len(FEATURES), 0)


def test_redo_asks_again(server, folder):
    label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    n = len(server.requests)
    report = label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url), redo=True)
    assert len(server.requests) == 2 * n
    assert report.n_explained == report.n_scored == len(FEATURES)


def test_replies_without_a_phrase_are_counted_and_never_stored(server, folder):
    def answer(prompt: str, request: dict[str, Any]) -> str:
        text = oracle(prompt, request)
        return "I cannot say." if "river" in text else text

    server.answer = answer
    report = label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    explanations, _ = stored(folder)
    assert report.n_failed == 1
    assert report.reasons == (("the reply holds no explanation", 1),)
    assert {e.feature for e in explanations} == set(FEATURES) - {0}


def test_a_judge_that_mostly_babbles_gives_no_score(server, folder):
    def answer(prompt: str, request: dict[str, Any]) -> str:
        return oracle(prompt, request) if "You name" in request["messages"][0]["content"] else "hard to say"

    server.answer, server.logprobs = answer, False
    report = label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    explanations, scores = stored(folder)
    assert len(explanations) == report.n_failed == len(FEATURES)
    assert scores == []


def test_single_unread_answers_are_failures_of_the_score(server, folder):
    label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url), scorer=False)
    server.faults = [body("?")]
    label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    _, scores = stored(folder)
    assert sorted(s.failures for s in scores if s.scorer == DETECTION) == [0, 0, 0, 0, 0, 1]
    assert min(s.n for s in scores) == 19


def test_without_log_probabilities_there_is_accuracy_and_no_auroc(server, folder):
    server.logprobs = False
    label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    _, scores = stored(folder)
    assert {s.scorer for s in scores} == {DETECTION}


def test_batches_ask_fewer_times_for_the_same_scores(server, folder):
    options = DetectionOptions(batch=4)
    label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url), options=options)
    _, scores = stored(folder)
    assert len(server.judged) == len(FEATURES) * 2 * 20 / 4
    assert min(s.value for s in scores) >= 0.9


def test_the_budget_stops_the_job_and_a_larger_one_goes_on(server, folder):
    report = label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url), budget_tokens=5_000)
    assert "budget" in report.stopped
    assert 0 < report.tokens_in + report.tokens_out <= 5_000
    n = len(server.requests)
    label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    once = len({str(request) for request in server.requests})
    assert once == len(server.requests) > n
    assert len([s for s in stored(folder)[1] if s.scorer == DETECTION]) == len(FEATURES)


def test_a_server_that_dies_ends_the_job_with_what_it_has(server, folder):
    label(folder, features=FEATURES[:2], client=ChatClient(MODEL, server.base_url))
    server.faults = [status(401)] * 100
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    server.faults = []
    report = label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    assert (report.n_explained, report.n_skipped) == (4, 2)


def test_explanations_are_stored_as_they_are_and_never_run(server, folder):
    hostile = '<img src=x onerror=alert(1)> & "quotes"; DROP TABLE features'
    server.answer = lambda *_: hostile if False else '{"explanation": "' + hostile.replace('"', '\\"') + '"}'
    label(folder, features=[0], client=ChatClient(MODEL, server.base_url), scorer=False)
    assert [e.text for e in stored(folder)[0]] == [hostile]


def test_the_key_is_in_no_file(server, folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-in-no-file")
    label(folder, features=FEATURES, client=ChatClient(MODEL, server.base_url))
    assert server.keys[0] == "Bearer sk-in-no-file"
    assert not [path for path in folder.rglob("*") if path.is_file() and b"sk-in-no-file" in path.read_bytes()]


def test_two_jobs_do_not_label_one_dictionary_at_once(server, folder):
    with lock(folder / ".label.lock"), pytest.raises(InputError, match="in use by process"):
        label(folder, client=ChatClient(MODEL, server.base_url))


def test_wrong_input_is_one_line(server, folder):
    with pytest.raises(InputError, match="no feature 99: expected 0 to 11"):
        label(folder, features=[1, 99], client=ChatClient(MODEL, server.base_url))
    with pytest.raises(InputError, match="needs one"):
        label(folder, features=[1])


def test_it_works_where_an_event_loop_runs_already(server, folder):
    async def notebook() -> int:
        return label(folder, features=[0, 1], client=ChatClient(MODEL, server.base_url)).n_explained

    assert asyncio.run(notebook()) == 2


def test_features_are_picked_in_an_order_that_grows(tmp_path):
    with open_store(planted_store(tmp_path / "d", n_features=36)) as store:
        ten, twenty = pick_features(store, 10), pick_features(store, 20)
        assert ten == twenty[:10]
        assert ten != sorted(ten)
        assert set(pick_features(store, 1000)) <= set(store.features())


_JOB = """
import sys
from autointerp.client import ChatClient
from autointerp.label import label
label(sys.argv[1], features=range(10), client=ChatClient("oracle", sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_job_ends_as_an_unbroken_one_and_pays_nothing_twice(server, tmp_path):
    whole = planted_store(tmp_path / "whole", n_features=12)
    label(whole, features=range(10), client=ChatClient(MODEL, server.base_url))
    unbroken = len(server.requests)
    server.requests.clear()

    server.delay_s = 0.05
    broken = planted_store(tmp_path / "broken", n_features=12)
    job = [sys.executable, "-c", _JOB, str(broken), server.base_url]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    kills = 0
    for wait in (10, 60, 25, 90, 45):  # requests to see before the kill
        seen = len(server.requests)
        child = subprocess.Popen(job, env=environment)
        while child.poll() is None and len(server.requests) < seen + wait:
            time.sleep(0.01)
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert kills >= 4
    subprocess.run(job, env=environment, check=True)

    for one, other in zip(stored(whole), stored(broken), strict=True):
        assert without_dates(one) == without_dates(other)
    assert unbroken <= len(server.requests) <= unbroken + 4 * kills
