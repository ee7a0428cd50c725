"""What is told of a training: log, progress.json, bar, trackers; and what a full disk or a wrong folder says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sae.monitor
from activations.errors import InputError
from activations.run import Run
from sae import checkpoint
from sae.settings import Training
from sae.train import begun_with, train
from tests.tiny import HOOK, planted_rows, planted_run

KEYS = ["step", "tokens", "loss", "fvu", "auxk", "l0", "grad_norm", "n_dead", "lr"]


@pytest.fixture
def run(tmp_path) -> Run:
    return planted_run(tmp_path / "run", planted_rows(4000, 16, 20, 3, signed=False)[0])


def settings(**changes) -> Training:
    plain = {"architecture": "topk", "hook": HOOK, "sizes": {"d_sae": 64, "k": 3}, "n_tokens": 12_800, "batch": 64}
    return Training(**{**plain, **changes})


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def break_off(run: Run, wanted: Training, at: int, **options) -> Path:
    """Train up to the checkpoint at step `at`, log another 20 steps, and die."""
    save = checkpoint.save

    def save_and_die(folder, tensors, place, *rest):
        if place.step > at:
            raise KeyboardInterrupt
        save(folder, tensors, place, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(run, wanted, name="a", checkpoint_seconds=0.0, **options)
    return run.dictionary("a")


def test_the_log_has_the_figures_of_every_twentieth_step(run):
    lines = log_of(train(run, settings()))
    assert [list(line) for line in lines] == [KEYS] * 10
    assert [line["tokens"] for line in lines] == [1280 * i for i in range(1, 11)]


def test_progress_is_beside_the_log_while_it_trains_and_gone_at_the_end(run, monkeypatch):
    monkeypatch.setattr(sae.monitor, "PROGRESS_SECONDS", 0.0)
    folder = break_off(run, settings(), 60)
    told = json.loads((folder / "progress.json").read_text())
    assert (told["tokens"], told["n_tokens"]) == (80 * 64, 12_800)
    assert told["seconds_left"] == pytest.approx((12_800 - 80 * 64) / told["tokens_per_second"], abs=0.1)
    assert told["updated"] >= told["started"]
    train(run, settings(), name="a")
    assert not (folder / "progress.json").exists()


def test_a_line_that_was_cut_in_half_is_written_anew(run):
    folder = break_off(run, settings(), 60)
    text = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(text[:-30])
    whole = train(run, settings(), name="whole")
    assert (train(run, settings(), name="a") / "train.jsonl").read_bytes() == (whole / "train.jsonl").read_bytes()


def test_without_a_terminal_nothing_is_printed(run, capfd):
    train(run, settings())
    assert capfd.readouterr() == ("", "")


# Trackers


def test_tensorboard_draws_the_log_once_over_a_resume(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = break_off(run, settings(), 60, track=["tensorboard"])
    train(run, settings(), name="a", track=["tensorboard"])
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in KEYS[2:]:
        drawn = [(event.step, event.value) for event in events.Scalars(name)]
        assert drawn == [(line["tokens"], pytest.approx(line[name])) for line in log_of(folder)], name


def test_wandb_offline_holds_the_whole_curve_after_a_resume(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for call in (
        "break_off(run, settings(), 60, track=['wandb'])",
        "train(run, settings(), name='a', track=['wandb'])",
    ):
        code = f"import sys; from tests.sae.test_monitor import *; run = Run.open(sys.argv[1]); {call}"
        # a process each: its service forgets a run that was finished in the same process
        done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    folder = run.dictionary("a")
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert _wandb_history(next(offline.glob("*.wandb"))) == [(line["step"], line["fvu"]) for line in log_of(folder)]


def _wandb_history(path: Path) -> list[tuple[int, float]]:
    """(step, FVU) of each line in a .wandb file: 7 bytes, then blocks of 32 KiB of records as in LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(whole)
            whole = b""
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found.append((record.history.step.num, items["fvu"]))
    return found


def test_a_tracker_without_key_package_or_name_is_refused_in_one_line(run, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(InputError, match="no key: set WANDB_API_KEY, or WANDB_MODE=offline"):
        train(run, settings(), name="a", track=["wandb"])
    with pytest.raises(InputError, match="'banana' is unknown: expected one of tensorboard, wandb"):
        train(run, settings(), name="b", track=["banana"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"not installed: pip install 'sae-workbench\[tracking\]'"):
        train(run, settings(), name="c", track=["tensorboard"])


# Checkpoints and disks


def test_a_checkpoint_says_settings_and_versions(run):
    folder = break_off(run, settings(seed=7), 60)
    said = json.loads((checkpoint.path_of(folder, 60) / "state.json").read_text())
    assert (said["step"], said["seed"], said["sizes"]) == (60, 7, {"d_sae": 64, "k": 3})
    assert {"python", "torch", "sae-workbench"} <= set(said["versions"])


def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_goes_on(run):
    whole = train(run, settings(), name="whole")
    folder = break_off(run, settings(), 60)
    bad = checkpoint.path_of(folder, 60)
    (file,) = bad.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="step-000000060 is damaged .*: delete it, and training goes on from the one"):
        train(run, settings(), name="a")
    shutil.rmtree(bad)
    assert checkpoint.steps_of(folder) == [40]
    made = train(run, settings(), name="a")
    for name in ("sae_weights.safetensors", "train.jsonl"):
        assert (made / name).read_bytes() == (whole / name).read_bytes()


def test_a_checkpoint_without_its_state_is_named(run):
    folder = break_off(run, settings(), 60)
    (checkpoint.path_of(folder, 60) / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"step-000000060.state\.json is damaged"):
        train(run, settings(), name="a")


def test_a_checkpoint_of_other_sizes_is_refused(run):
    folder = break_off(run, settings(), 60)
    other = train(run, settings(sizes={"d_sae": 32, "k": 3}), name="b", checkpoint_seconds=0.0)
    shutil.copytree(checkpoint.path_of(other, 200), checkpoint.path_of(folder, 80))
    with pytest.raises(InputError, match="is of another training: .*Delete it, or train under another --name"):
        train(run, settings(), name="a")


def test_what_a_dictionary_was_begun_with_reads_back(run):
    wanted = settings(roles=(), warmup=0.3, matmul="float32")
    assert begun_with(train(run, wanted, name="a")) == wanted
    assert begun_with(run.dictionary("none")) is None
    (run.dictionary("a") / "train.json").write_text('{"architecture": "topk"}')
    with pytest.raises(InputError, match=r"train\.json is damaged or of another version"):
        begun_with(run.dictionary("a"))


def test_a_file_in_the_place_of_the_folder_is_one_line(run):
    run.dictionary("a").parent.mkdir()
    run.dictionary("a").write_text("")
    with pytest.raises(InputError, match="cannot be written .*: give the rights, or choose another folder") as error:
        train(run, settings(), name="a")
    assert "\n" not in str(error.value)


@pytest.fixture
def small_disk(run):
    """The run's dictionaries on a file system of 1 MiB."""
    place = run.path / "dictionaries"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_what_was_saved_goes_on(run, small_disk, tmp_path):
    whole = train(planted_run(tmp_path / "b", planted_rows(4000, 16, 20, 3, signed=False)[0]), settings(), name="a")
    folder = break_off(run, settings(), 60)
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * shutil.disk_usage(small_disk).free)
    with pytest.raises(InputError, match="The disk is full at .*: free some space and run the same command") as error:
        train(run, settings(), name="a", checkpoint_seconds=0.0)
    assert "\n" not in str(error.value)
    assert checkpoint.steps_of(folder)[-1] >= 60
    filler.unlink()
    made = train(run, settings(), name="a", checkpoint_seconds=0.0)
    for name in ("sae_weights.safetensors", "train.jsonl"):
        assert (made / name).read_bytes() == (whole / name).read_bytes()


def test_a_disk_that_may_only_be_read_is_one_line(run, small_disk):
    break_off(run, settings(), 60)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\)"):
        train(run, settings(), name="a")
