"""Fields of a config are what its dataclass says, for whoever makes one from text, TOML or a notebook."""

import dataclasses
from collections.abc import Sequence

import pytest

from activations.errors import InputError
from sae.architectures.matryoshka import MatryoshkaConfig
from sae.base import Config, ConfigError
from sae.fields import checked
from sae.registry import REGISTRY
from sae.settings import Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryKind(Config):
    whole: int = 1
    number: float = 0.5
    switch: bool = False
    word: str = "a"
    maybe: float | None = None
    pair: tuple[float, ...] = ()
    several: Sequence[int] = ()


@pytest.mark.parametrize(
    "given",
    [
        {"whole": -3},
        {"number": 2},
        {"number": 10**300},
        {"switch": True},
        {"word": "b"},
        {"maybe": 1},
        {"maybe": None},
        {"pair": [1, 0.5]},
        {"several": []},
        {"several": (1, 2)},
    ],
)
def test_a_value_of_the_type_is_taken_and_a_list_becomes_a_tuple(given):
    (value,) = given.values()
    assert list(checked(EveryKind, given).values()) == [tuple(value) if isinstance(value, list) else value]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"whole": 1.0}, "whole=1.0: expected a whole number."),
        ({"whole": True}, "whole=true: expected a whole number."),
        ({"number": True}, "number=true: expected a number."),
        ({"number": float("nan")}, "number=NaN: expected a number."),
        ({"number": 10**400}, f"number={10**400}: expected a number."),
        ({"switch": 1}, "switch=1: expected true or false."),
        ({"word": 1}, "word=1: expected a text."),
        ({"maybe": "x"}, 'maybe="x": expected a number or null.'),
        ({"whole": None}, "whole=null: expected a whole number."),
        ({"pair": [1, "x"]}, 'pair=[1, "x"]: expected a list of numbers.'),
        ({"several": [1.5]}, "several=[1.5]: expected a list of whole numbers."),
        ({"several": [[1]]}, "several=[[1]]: expected a list of whole numbers."),
        ({"several": "12"}, 'several="12": expected a list of whole numbers.'),
        ({"several": {1}}, 'several="{1}": expected a list of whole numbers.'),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_it_is_and_what_is_expected(given, says):
    with pytest.raises(ConfigError) as error:
        checked(EveryKind, given)
    assert str(error.value) == says


def test_an_unknown_field_is_answered_with_those_that_have_defaults():
    with pytest.raises(ConfigError) as error:
        checked(EveryKind, {"banana": 1})
    assert str(error.value) == (
        "there is no field 'banana': expected whole=1, number=0.5, switch=false, "
        'word="a", maybe=null, pair=[], several=[].'
    )


@pytest.mark.parametrize("name", list(REGISTRY))
def test_the_types_of_every_architecture_are_known_and_its_defaults_are_of_them(name):
    fields = dataclasses.fields(REGISTRY[name].config)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    assert checked(REGISTRY[name].config, defaults) == defaults
    for field in fields:
        with pytest.raises(ConfigError, match=f"^{field.name}=.*: expected "):
            checked(REGISTRY[name].config, {field.name: {}})


def test_settings_from_anywhere_are_held_to_them():
    sizes = {"d_sae": 64, "k": 3, "prefixes": [8, 16]}
    settings = Training(architecture="matryoshka", hook="x", sizes=sizes, n_tokens=6400)
    config = settings.config(16)
    assert isinstance(config, MatryoshkaConfig)
    assert config.prefixes == (8, 16)
    for wrong, says in (({"k": "3"}, 'k="3": expected a number'), ({"tau": 1}, "there is no field 'tau': expected")):
        with pytest.raises(InputError, match=f"^matryoshka: {says}"):
            dataclasses.replace(settings, sizes=sizes | wrong).config(16)
