"""Files are whole or absent; one process at a time holds a lock; names stay inside the folder."""

import pytest

from activations.errors import InputError
from activations.files import lock, read_json, safe_name, write_aside, write_json


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ZeroDivisionError), write_aside(path) as aside:
        aside.write_text(f"half{1 / 0}")
    assert read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")


def test_a_second_holder_is_refused_by_name_and_the_lock_is_free_afterwards(tmp_path):
    with lock(tmp_path / "x.lock"):
        with pytest.raises(InputError, match=r"in use by process \d+ on"), lock(tmp_path / "x.lock"):
            pass
    with lock(tmp_path / "x.lock"):
        pass


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "x" * 300, "a\0b"])
def test_names_stay_inside(name):
    with pytest.raises(InputError, match="cannot be a name"):
        safe_name(name)
