from pathlib import Path

import numpy as np
import pytest

from autointerp.explainers.lexical import NOTHING_SEEN, WindowSample, explain
from autointerp.label import label
from autointerp.rules import Rule, Vocabulary, as_array
from autointerp.windows import ActiveWindow
from data.store import open_store
from tests.planted import WORDS, planted_store

WORDS_HERE = " the cat sat on a mat, undo untie unpack river London 7 42 ( x y z und \n".split(" ")
TEXTS = [f" {word}" for word in WORDS_HERE if word] + ["\n", "ing", " walking", " talking", " sing"]
VOCABULARY = Vocabulary([text.encode() for text in TEXTS])


def ids(*texts: str) -> list[int]:
    return [TEXTS.index(text) for text in texts]


def window(texts: list[str], firing: set[int], doc: int = 0) -> ActiveWindow:
    strengths = [1.0 if i in firing else 0.0 for i in range(len(texts))]
    return ActiveWindow(doc=doc, kind="top", token_ids=ids(*texts), strengths=strengths)


def found(windows: list[ActiveWindow], silent: list[list[str]]) -> tuple[str, Rule]:
    sample = WindowSample(VOCABULARY, dict(enumerate(ids(*texts) for texts in silent)))
    explanation = explain(windows, sample, sample.off([]))
    return explanation.text, explanation.rule


QUIET = [[" the", " cat", " sat", " on"], [" a", " mat,", " x", " the"], [" y", " z", " cat", " a"]]


def test_a_token_that_says_it_all_is_named():
    text, rule = found([window([" the", " river"], {1}), window([" river", " sat"], {0})], QUIET)
    assert text == "token “ river” (100% of firings)"
    assert rule == Rule(place="at", kind="tokens", tokens=tuple(ids(" river")))


def test_a_token_that_all_windows_hold_is_not_taken_for_an_explanation():
    # It fires on " the", but only after "(": every silent window holds " the" as well.
    active = [window([" x", " (", " the"], {2}), window([" (", " the", " y"], {1})]
    text, _ = found(active, [[" the", " cat"], [" sat", " the"], [" the", " on"]])
    assert text.startswith("what follows “ (”")


def test_a_shared_beginning_is_found_and_holds_for_words_not_seen():
    active = [window([" undo", " x"], {0}), window([" untie", " y"], {0}), window([" unpack", " z"], {0})]
    text, rule = found([*active, *active], QUIET)
    assert text == "words that begin with “un” (100% of firings)"
    assert rule.hits(VOCABULARY, as_array([ids(" the", " und")])).tolist() == [[False, True]]


def test_classes_are_named():
    text, _ = found([window([" 7", " x"], {0}), window([" y", " 42"], {1})], QUIET)
    assert text.startswith("digits")


def test_where_no_rule_holds_the_text_says_so():
    rows = [[" the", " cat"], [" a", " on"], [" sat", " the"], [" on", " cat"], [" a", " sat"]]
    text, rule = found([window(texts, {i % 2}) for i, texts in enumerate(rows)], rows)
    assert text.startswith("no simple rule; token")
    assert rule.kind == "tokens"


def test_a_feature_without_text_outside_the_score_split_says_so_and_its_rule_is_never_true():
    text, rule = found([], QUIET)
    assert text == NOTHING_SEEN
    assert rule.empty
    assert not rule.hits(VOCABULARY, as_array([ids(" the", " cat")])).any()


def test_line_breaks_are_visible_in_a_phrase():
    assert Rule(place="at", kind="tokens", tokens=tuple(ids("\n"))).phrase(VOCABULARY) == "token “⏎”"


@pytest.mark.parametrize(
    "rule",
    [
        Rule(place="at", kind="tokens", tokens=(3, 5)),
        Rule(place="after", kind="class", text="digits"),
        Rule(place="at", kind="suffix", text="ing"),
    ],
)
def test_a_rule_survives_json(rule):
    assert Rule.from_json(rule.to_json()) == rule


@pytest.mark.parametrize("text", ["", "{}", "[]", "1", '{"place": "at", "kind": "class", "tokens": [], "text": "x"}'])
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(ValueError, match=r"rule|Expecting"):
        Rule.from_json(text)


def test_after_rules_know_nothing_of_what_stands_before_a_window():
    after = Rule(place="after", kind="tokens", tokens=tuple(ids(" (")))
    windows = as_array([ids(" (", " x", " y"), ids(" x", " (")])
    assert after.hits(VOCABULARY, windows).tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize("signed", [False, True])
def test_planted_features_are_explained_scored_near_1_and_their_controls_near_chance(tmp_path, signed):
    folder = planted_store(tmp_path / "d", signed=signed)
    report = label(folder, explainer="lexical")
    with open_store(folder) as store:
        explanations = {(e.feature, e.pole): e for e in store.explanations()}
        scores = store.scores()
        alive = store.features()
    poles = "+-" if signed else "+"
    assert set(explanations) == {(feature, pole) for feature in alive for pole in poles}
    assert report.n_explained == report.n_scored == len(scores) == len(explanations)
    assert f"“ {WORDS[0]}”" in explanations[0, "+"].text
    if signed:
        assert f"“ {WORDS[1]}”" in explanations[0, "-"].text
        assert WORDS[0] not in explanations[0, "-"].text
    assert np.mean([score.value for score in scores]) > 0.98
    assert 0.4 < np.mean([score.control for score in scores]) < 0.6
    assert all(score.lo < score.value <= score.hi and score.chance == 0.5 for score in scores)


def test_an_unbroken_second_run_does_nothing(tmp_path):
    folder = planted_store(tmp_path / "d", n_features=12)
    first = label(folder, explainer="lexical")
    parts = sorted(Path(folder).rglob("*.parquet"))
    again = label(folder, explainer="lexical")
    assert (again.n_explained, again.n_scored, again.n_skipped) == (0, 0, first.n_explained)
    assert sorted(Path(folder).rglob("*.parquet")) == parts


def test_one_feature_alone_still_has_a_control_once_others_are_explained(tmp_path):
    folder = planted_store(tmp_path / "d", n_features=12)
    label(folder, explainer="lexical")
    label(folder, features=[3], explainer="lexical", redo=True)
    with open_store(folder) as store:
        (score,) = store.scores([3])
    assert score.control is not None
    assert score.control < score.value


def test_features_that_never_fire_get_no_explanation(tmp_path):
    folder = planted_store(tmp_path / "d", n_features=20)
    report = label(folder, features=[19, 0], explainer="lexical")
    assert report.n_explained == 1


def test_what_cannot_be_printed_is_made_visible():
    entries = Vocabulary([b"\xe2\x80", b"\n      ", b"\x1b[31m", b" a"])
    assert [entries.quote(id) for id in range(5)] == ["bytes e2 80", "“⏎␣6”", "“\\x1b[31m”", "“ a”", "“<4>”"]
