"""Edits as JSON: a list of small descriptions that name dictionaries by address and vectors by file.

    [{"op": "add", "dictionary": "runs/demo", "feature": 12, "sign": 1, "unit": "max", "coefficient": 4.0},
     {"op": "add", "file": "happy.safetensors", "unit": "norm", "coefficient": 0.5},
     {"op": "clamp", "dictionary": "runs/demo", "feature": 7, "value": 0.0}]

Paths are relative to the folder of the JSON file, so that a run can be moved with the edits that lie in it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from activations.errors import InputError
from activations.files import read_json, write_json
from sae import load_sae
from sae.base import SAE
from steering.edit import Add, Clamp, Edit, ProjectOut
from steering.vector import SteeringVector, Unit

_LATENT = {"dictionary": str, "feature": int}
_TURNED = {**_LATENT, "sign": int}
# What each operation's description holds, in either of its forms.
_FORMS: dict[str, list[dict[str, type]]] = {
    "add": [{**source, "unit": str, "coefficient": float} for source in (_TURNED, {"file": str})],
    "project_out": [{**source, "unit": str, "share": float} for source in (_TURNED, {"file": str})],
    "clamp": [{**_LATENT, "value": float}],
}
_PATHS = {"dictionary", "file"}


def save_edits(path: str | Path, edits: Sequence[Edit]) -> None:
    """Write the descriptions of `edits`.

    Raises InputError for one that rests on something unsaved; then nothing is written.
    """
    path = Path(path)
    described = [edit.to_json() for edit in edits]
    for one in described:
        for key in _PATHS & one.keys():
            one[key] = os.path.relpath(one[key], path.parent)
    write_json(path, described)


def load_edits(path: str | Path, load: Callable[[str], SAE] = load_sae) -> list[Edit]:
    """Read a file of edits: JSON as `save_edits` writes it, or a vector's .safetensors, which becomes one Add.

    load: makes a dictionary from its address; the caller may keep what it has loaded.
    Raises InputError for a file that is missing or damaged, or an edit that cannot be made.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return [Add(SteeringVector.load(path))]
    described = read_json(path)
    if not isinstance(described, list) or not described:
        raise InputError(f"{path} holds no list of edits: expected a JSON list as `save_edits` writes it.")
    return [edit_from_json(one, load, path.parent) for one in described]


def edit_from_json(described: Any, load: Callable[[str], SAE] = load_sae, folder: Path = Path()) -> Edit:
    """The edit that one description means, its paths relative to `folder`.

    Raises InputError naming what is wrong with it.
    """
    about = _checked(described)
    for key in _PATHS & about.keys():
        about[key] = os.path.normpath(folder / about[key])
    if about["op"] == "clamp":
        return Clamp(load(about["dictionary"]), about["feature"], float(about["value"]))
    vector = _vector(about, load)
    if about["op"] == "project_out":
        return ProjectOut(vector, float(about["share"]))
    return Add(replace(vector, coefficient=float(about["coefficient"])))


def _vector(about: dict[str, Any], load: Callable[[str], SAE]) -> SteeringVector:
    if (unit := about["unit"]) not in get_args(Unit):
        raise InputError(f"The unit {unit!r} is unknown: expected one of {', '.join(get_args(Unit))}.")
    if "dictionary" in about:
        return SteeringVector.from_latent(load(about["dictionary"]), about["feature"], sign=about["sign"], unit=unit)
    vector = SteeringVector.load(about["file"])
    if vector.unit != unit:
        raise InputError(f"{about['file']} is in units of {vector.unit!r}, the edit in {unit!r}: write the edit again.")
    return vector


def _checked(described: Any) -> dict[str, Any]:
    """A copy of `described` if it is one of the known forms, with values of the right types."""
    if not isinstance(described, dict) or described.get("op") not in _FORMS:
        raise InputError(f"An edit is {described!r}: expected an object whose op is one of {', '.join(_FORMS)}.")
    rest = {key: value for key, value in described.items() if key != "op"}
    forms = _FORMS[described["op"]]
    if not any(form.keys() == rest.keys() and all(_is(rest[key], form[key]) for key in form) for form in forms):
        choices = " or ".join(", ".join(f"{key} ({kind.__name__})" for key, kind in form.items()) for form in forms)
        raise InputError(f"The edit {described!r} is malformed: expected op and {choices}.")
    return dict(described)


def _is(value: object, kind: type) -> bool:
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
