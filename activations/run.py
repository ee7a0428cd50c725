"""A run is a folder: one model, one corpus, the activations cached from them, any number of dictionaries.

`run.json` says what the run is made of; a later command that disagrees with it is refused.
"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from activations.cache import CachedActivations
from activations.errors import InputError
from activations.files import read_json, safe_name, write_json

FORMAT = 1
NO_MODEL = "vectors"
"""The model of a run whose vectors came from elsewhere."""
_IDENTITY = ("model", "revision", "model_dtype", "corpus", "corpus_hash", "context", "n_tokens")
_DEFAULTS = {"layout": "packed"}  # part of the identity that older runs do not name


class Run:
    """The folder `path` and its `meta` (run.json). Made by `Run.open` or `Run.create`."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run. Raises InputError when the folder is none."""
        path = Path(path)
        if not (path / "run.json").exists():
            raise InputError(f"{path} is no run: expected a folder with run.json. Make one with `sae collect {path}`.")
        meta = read_json(path / "run.json")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise InputError(
                f"{path / 'run.json'} has another format than {FORMAT}: it is damaged or from a newer version."
            )
        return cls(path, meta)

    @classmethod
    def create(cls, path: str | Path, **identity: Any) -> "Run":
        """Open the run when it is there and agrees with `identity`, else make it.

        identity: model, revision, model_dtype, corpus, corpus_hash, context, n_tokens, and layout where it is not
        "packed" (how the corpus is cut into sequences). What a run that `start` made does not know yet becomes known.
        Raises InputError naming the first thing that differs.
        """
        identity = {**_DEFAULTS, **identity}
        assert set(identity) == {*_IDENTITY, *_DEFAULTS}, sorted(set(identity) ^ {*_IDENTITY, *_DEFAULTS})
        path = Path(path)
        if (path / "run.json").exists():
            run = cls.open(path)
            if not run.is_begun:
                return cls._write(path, {**run.meta, **identity})
            for key, value in identity.items():
                if (made_with := run.meta.get(key, _DEFAULTS.get(key))) != value:
                    raise InputError(
                        f"{path} was made with {key} {made_with!r}, not {value!r}: "
                        "use the same, or give the new run another folder."
                    )
            return run
        return cls._write(path, identity)

    @classmethod
    def start(cls, path: str | Path) -> "Run":
        """Open the run, or make one without model and text: a place for dictionaries from elsewhere."""
        path = Path(path)
        return cls.open(path) if (path / "run.json").exists() else cls._write(path, dict.fromkeys(_IDENTITY))

    @classmethod
    def _write(cls, path: Path, identity: dict[str, Any]) -> "Run":
        safe_name(path.resolve().name)
        provenance = {"created": datetime.now(UTC).isoformat(timespec="seconds"), **versions()}
        write_json(path / "run.json", {"format": FORMAT, **identity, **provenance})
        return cls.open(path)

    @property
    def is_begun(self) -> bool:
        """Whether it has a model and a text by now."""
        return self.meta.get("model") is not None

    @property
    def model_name(self) -> str:
        """The model that it is of. Raises InputError when the run has none yet."""
        if not self.is_begun:
            raise self._not_begun()
        return str(self.meta["model"])

    def _not_begun(self) -> InputError:
        return InputError(
            f"{self.path} has no model and no activations yet: run `sae collect {self.path} --model M --hook H`, M and "
            "H those of its dictionary."
        )

    @property
    def has_text(self) -> bool:
        """Whether the rows are a language model's tokens, and not vectors from elsewhere."""
        return not str(self.meta.get("layout", "")).startswith(("vectors", "embeddings"))

    def hooks(self) -> list[str]:
        """Hooks with cached activations, finished or not."""
        folder = self.path / "activations"
        return sorted(p.parent.name for p in folder.glob("*/manifest.json") if p.parent.name != "tokens")

    def activations(self, hook: str, *, roles: Sequence[str] = (), follow: bool = False) -> CachedActivations:
        """The cached activations of one hook; see `CachedActivations`. Raises InputError when they are missing."""
        if hook not in self.hooks():
            have = ", ".join(self.hooks()) or "none"
            if not self.is_begun:
                raise self._not_begun()
            raise InputError(
                f"{self.path} has no activations at {hook!r} (it has: {have}): "
                f"run `sae collect {self.path} --hook {hook}`."
            )
        return CachedActivations(self.path / "activations", hook, roles=roles, follow=follow)

    def dictionaries(self) -> list[Path]:
        """Folders of the run's trained dictionaries, by name."""
        return sorted(p.parent for p in (self.path / "dictionaries").glob("*/cfg.json"))

    def dictionary(self, name: str) -> Path:
        """Where the dictionary `name` of this run is or will be."""
        return self.path / "dictionaries" / safe_name(name)


def dictionary_folder(address: str | Path) -> Path:
    """The folder of a dictionary, from RUN (its only one), RUN/ID, or the folder itself.

    Raises InputError with the choices when RUN has none or several.
    """
    path = Path(address)
    if (path / "cfg.json").exists():
        return path
    if (path.parent / "run.json").exists():
        run, name = Run.open(path.parent), path.name
        if run.dictionary(name).joinpath("cfg.json").exists():
            return run.dictionary(name)
        choices = ", ".join(f"{run.path / p.name}" for p in run.dictionaries()) or "none yet; run `sae train`"
        raise InputError(f"{run.path} has no dictionary {name!r}: expected one of {choices}.")
    run = Run.open(path)
    found = run.dictionaries()
    if not found:
        raise InputError(f"{run.path} has no dictionary yet: run `sae train {run.path} --arch topk`.")
    if len(found) > 1:
        raise InputError(
            f"{run.path} has {len(found)} dictionaries: name one of " + ", ".join(str(run.path / p.name) for p in found)
        )
    return found[0]


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the git commit of a checkout, for provenance."""
    packages = ("sae-workbench", "torch", "transformers")
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    here = Path(__file__).resolve().parent.parent
    if (here / ".git").exists():
        done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
        if done.returncode == 0:
            found["git"] = done.stdout.strip()
    return found
