"""Other programs that draw a training's curves: TensorBoard and Weights & Biases, an extra each.

A tracker is given all lines of the log, those before a resume too: so it draws one curve without double points, and one
that is added later has it all.
"""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from activations.errors import InputError
from activations.files import read_json, write_json
from sae.settings import Training

Line = Mapping[str, Any]
"""A line of train.jsonl: step, tokens and figures."""


class TensorBoard:
    """Event files in FOLDER/tensorboard, over tokens; written anew at each start, from the log."""

    def __init__(self, folder: Path, settings: Training) -> None:
        del settings
        from torch.utils.tensorboard import SummaryWriter

        place = folder / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)
        # purge_step: a TensorBoard that is looking on forgets what it had from the files before
        self._writer = SummaryWriter(str(place), purge_step=0)

    def line(self, line: Line) -> None:
        for name, value in line.items():
            if name not in ("step", "tokens"):
                self._writer.add_scalar(name, value, line["tokens"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in FOLDER/wandb, over tokens. The key is WANDB_API_KEY and nothing else.

    WANDB_MODE=offline needs no key and no network; the newest offline run in the folder then holds the whole curve.
    """

    def __init__(self, folder: Path, settings: Training) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise InputError("--track wandb has no key: set WANDB_API_KEY, or WANDB_MODE=offline to sync it later.")
        remembered = folder / "wandb.json"
        if not remembered.exists():
            write_json(remembered, {"id": uuid.uuid4().hex[:12]})
        identity = read_json(remembered)["id"]
        for old in (folder / "wandb").glob(f"offline-run-*-{identity}"):
            shutil.rmtree(old)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "sae-workbench"),
                name=folder.name,
                id=identity,
                resume="allow" if mode == "online" else None,
                dir=folder,
                config=json.loads(json.dumps(dataclasses.asdict(settings))),
                reinit="create_new",
                # No code, no output of the terminal, nothing printed over the bar.
                settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"--track wandb could not begin ({reason}): WANDB_MODE=offline needs no network."
            ) from None
        self._run.define_metric("*", step_metric="tokens")

    def line(self, line: Line) -> None:
        if line["step"] >= self._run.step:  # what the server has already is not sent again
            self._run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | WandB
_TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def tracker(kind: str, folder: Path, settings: Training) -> Tracker:
    """The tracker "wandb" or "tensorboard" of the dictionary in `folder`.

    Raises InputError when it is unknown, not installed or has no key.
    """
    if kind not in _TRACKERS:
        raise InputError(f"Tracker {kind!r} is unknown: expected one of {', '.join(_TRACKERS)}.")
    try:
        return _TRACKERS[kind](folder, settings)
    except ImportError:
        raise InputError(
            f"--track {kind} needs a package that is not installed: pip install 'sae-workbench[tracking]'."
        ) from None
