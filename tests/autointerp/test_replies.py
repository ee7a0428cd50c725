import math

import pytest

from autointerp.client import Reply, TokenChoice
from autointerp.explainers.llm import ParseError, parse_explanation
from autointerp.prompt import load_prompt
from autointerp.scorers.detection import parse_answers


@pytest.mark.parametrize(
    ("reply", "phrase"),
    [
        ('{"explanation": "names of rivers"}', "names of rivers"),
        ('Sure! Here it is:\n```json\n{"explanation": "names of rivers"}\n```\nHope it helps.', "names of rivers"),
        ('{"thoughts": {"a": 1}} {"explanation": "names of rivers."}', "names of rivers"),
        ('{"explanation": "names\nof\trivers"}', "names of rivers"),
        ('{"explanation": "the word \\"<<river>>\\""}', 'the word "river'),
        ('{"explanation": "<b>bold</b> & tags"}', "<b>bold</b> & tags"),
        ("names of rivers", "names of rivers"),
        ("Explanation: names of rivers.", "names of rivers"),
        ('{broken {"explanation": "die Flüsse"}', "die Flüsse"),
        ('{"explanation": "a\\u0000b\\u001b[31mc"}', "a b [31mc"),
    ],
)
def test_a_phrase_is_found_wherever_it_stands(reply, phrase):
    assert parse_explanation(reply) == phrase


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n ",
        "{}",
        "[]",
        "null",
        '{"explanation": ""}',
        '{"explanation": "..."}',
        '{"explanation": null}',
        '{"explanation": ["a"]}',
        '{"explanation": 3}',
        '{"explanation": "cut off in the',
        '{"label": "rivers"}',
        "<!DOCTYPE html><html><body>Bad gateway</body></html>",
        "I'm sorry, but I cannot help with that.",
        "I think these are rivers",
        "Sure, here you go",
        "First line\nsecond line",
        "word " * 100,
        '{"explanation": "' + "x" * 500 + '"}',
        '{"explanation": "the fire of the fire of the fire of the fire"}',
        "{" * 5000,
        '{"a":' * 3000,
    ],
)
def test_what_holds_no_phrase_is_a_failure_and_no_explanation(reply):
    with pytest.raises(ParseError):
        parse_explanation(reply)


def test_a_reply_that_repeats_the_prompts_own_example_is_a_failure():
    shown = load_prompt("explain").parts[4]
    assert shown[0] == "assistant"
    with pytest.raises(ParseError, match="example"):
        parse_explanation(shown[1])


def reply(text: str, *places: tuple[str, dict[str, float]]) -> Reply:
    choices = tuple(TokenChoice(token=token, top=tuple(top.items())) for token, top in places)
    return Reply(text=text, choices=choices, tokens_in=1, tokens_out=1)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("yes", [1.0]),
        (" No.", [0.0]),
        ("**Yes**", [1.0]),
        ('{"1": "yes", "2": "no"}', [1.0, 0.0]),
        ("1. yes\n2. no\n3. YES", [1.0, 0.0, 1.0]),
        ('["no","no"]', [0.0, 0.0]),
        ("Answer: yes", [1.0]),
    ],
)
def test_answers_are_read_in_order(text, answers):
    assert parse_answers(reply(text), len(answers)) == answers


@pytest.mark.parametrize(
    ("text", "n"), [("", 1), ("maybe", 1), ("yes no", 1), ("yes", 2), ("nothing", 1), ("yesterday", 1), ("1 0", 2)]
)
def test_another_number_of_answers_is_none(text, n):
    assert parse_answers(reply(text), n) is None


def test_log_probabilities_give_the_share_of_yes_over_all_its_spellings():
    top = {" Yes": math.log(0.3), "yes": math.log(0.1), "No": math.log(0.4), "I": math.log(0.2)}
    assert parse_answers(reply("No", ("No", top)), 1) == [pytest.approx(0.5)]


def test_the_answer_is_weighed_also_where_the_model_says_something_else():
    top = {"The": math.log(0.5), "Yes": math.log(0.3), "No": math.log(0.1)}
    assert parse_answers(reply("The", ("The", top)), 1) == [pytest.approx(0.75)]


def test_log_probabilities_of_other_words_are_no_answer():
    assert parse_answers(reply("The", ("The", {"The": -0.1, "A": -2.0})), 1) is None
    assert parse_answers(reply("yes", ("yes", {})), 1) == [1.0]


def test_in_a_batch_each_answer_has_its_own_place():
    yes, no = {"yes": math.log(0.9), "no": math.log(0.1)}, {"yes": math.log(0.2), "no": math.log(0.8)}
    graded = parse_answers(reply("1 yes 2 no", ("1", {"1": 0.0}), (" yes", yes), (" 2", {"2": 0.0}), (" no", no)), 2)
    assert graded == [pytest.approx(0.9), pytest.approx(0.2)]


def test_text_in_a_prompt_is_filled_in_once_and_braces_in_it_stay():
    messages = load_prompt("detect").messages(explanation="{windows}", windows="a {explanation} b")
    assert messages[-1]["content"] == "Pattern: {windows}\n\na {explanation} b"
