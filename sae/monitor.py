"""What a running training tells: a progress bar, a line in train.jsonl now and then."""

import json
from pathlib import Path

from tqdm import tqdm

from activations.files import write_aside

LOG = "train.jsonl"


class Monitor:
    """The log of one dictionary. begin: the step that training starts from; later lines are cut off."""

    def __init__(self, folder: Path, begin: int) -> None:
        path = folder / LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        with write_aside(path) as aside:
            aside.write_text(
                "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= begin), encoding="utf-8"
            )
        self._file = path.open("a", encoding="utf-8")

    def line(self, step: int, tokens: int, figures: dict[str, float]) -> None:
        rounded = {key: float(f"{value:.6g}") for key, value in figures.items()}
        self._file.write(json.dumps({"step": step, "tokens": tokens, **rounded}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def progress(total: int, initial: int, *, shown: bool = True) -> "tqdm[None]":
    """A bar over tokens; silent where the output is no terminal."""
    hidden = None if shown else True
    return tqdm(total=total, initial=initial, unit="token", unit_scale=True, desc="train", disable=hidden)
