"""A file of the user's under one of our names is found out and named in one line."""

from pathlib import Path

import pytest

from app.names import OURS, ShadowedName, check_names


def test_our_own_packages_pass():
    check_names()


def test_every_package_of_ours_is_checked():
    home = Path(__file__).parents[2]
    packages = {p.parent.name for p in home.glob("*/py.typed")}
    assert packages == set(OURS)


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_shadowing_file_is_named_with_what_was_expected(tmp_path: Path, monkeypatch, as_folder: bool):
    shadow = tmp_path / "zeta" / "__init__.py" if as_folder else tmp_path / "zeta.py"
    shadow.parent.mkdir(exist_ok=True)
    shadow.write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ShadowedName) as error:
        check_names(["zeta"], home=tmp_path / "ours")
    assert (
        str(error.value) == f"`zeta` is {shadow}, expected {tmp_path / 'ours' / 'zeta'}; rename it or start elsewhere."
    )
