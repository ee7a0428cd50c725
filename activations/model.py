"""A language model: `load_model` gives plain transformers (fast), with a TransformerLens bridge on demand."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from activations import embedded
from activations.errors import InputError
from activations.hooks import final_norm_of, hook_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Model:
    """A causal language model from transformers with its tokenizer; made by `load_model`."""

    def __init__(self, name: str, revision: str, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = name
        self.revision = revision
        self.hf = hf
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def d_model(self) -> int:
        return int(self.hf.config.hidden_size)

    def hooks(self) -> list[str]:
        """TransformerLens' hook names that this model has; any module path works as a name too."""
        return hook_names(self.hf)

    @torch.inference_mode()
    def __call__(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits after each token, in the model's dtype. No BOS is added."""
        logits: Tensor = self.hf(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    def encode(self, text: str) -> Int[Tensor, "1 time"]:
        """Token ids of `text`, nothing added; special tokens written out in the text count as such."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([ids], dtype=torch.long, device=self.device)

    def generate(
        self,
        prompt: str | Int[Tensor, "batch time"],
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str | Int[Tensor, "batch longer"]:
        """Go on from `prompt`: text gives the prompt and its continuation as text, ids give ids.

        temperature: 0 takes the likeliest token each time; above 0 samples with `seed` (the caller's random state
        stays). Raises InputError for an empty prompt.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt.to(self.device)
        if ids.shape[1] == 0:
            raise InputError("The prompt is empty: expected at least one token to go on from.")
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        with torch.inference_mode(), torch.random.fork_rng(devices=_cuda_of(self.device)):
            torch.manual_seed(seed)
            out: Tensor = self.hf.generate(  # type: ignore[operator]  # transformers types it as a mixin's
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                **sampling,
            )
        return str(self.tokenizer.decode(out[0], skip_special_tokens=True)) if isinstance(prompt, str) else out

    @cached_property
    def bridge(self) -> Any:
        """The same model as a TransformerLens bridge: a copy of its own, since the bridge changes what it wraps."""
        from transformer_lens.model_bridge import TransformerBridge

        source = self.hf.config._name_or_path
        return TransformerBridge.boot_transformers(source, dtype=self.dtype, device=str(self.device))

    def token_bytes(self) -> list[bytes]:
        """The bytes of every vocabulary entry, by id; entries past the tokenizer's own are empty.

        Byte-level vocabularies (GPT-2's alphabet) are mapped back byte by byte, so that joining gives exact UTF-8.
        """
        vocab = self.tokenizer.get_vocab()
        table = [b""] * max(int(self.hf.config.vocab_size), len(vocab))
        special = set(self.tokenizer.all_special_tokens)
        byte_level = "\u0120" in "".join(list(vocab)[:2000])  # "Ġ", how that alphabet writes a space
        for token, index in vocab.items():
            if byte_level and token not in special and all(c in _BYTES for c in token):
                table[index] = bytes(_BYTES[c] for c in token)
            else:
                table[index] = token.replace("\u2581", " ").encode()
        return table

    def unembed(self) -> Float[Tensor, "d_model vocab"]:
        """W_U in float32 with the final norm's gain folded in, for the logit lens; not centred."""
        head = self.hf.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        gain = final_norm_of(self.hf).weight
        assert isinstance(gain, Tensor)
        return (head.weight.detach().float() * gain.detach().float()).T


def load_model(name: str = embedded.NAME, *, dtype: str | None = None, device: str = "auto") -> Model:
    """Load the embedded model, a local folder, or a Hugging Face name ("org/model" or "org/model@revision").

    dtype: "float32", "bfloat16" or "float16"; None takes bfloat16 where the processor has it, else float32.
    device: "auto" takes a GPU when there is one.
    Raises InputError for a model that cannot be found, or an unknown dtype or device.
    """
    where = pick_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown: expected one of {', '.join(DTYPES)}.")
    torch_dtype = DTYPES[dtype] if dtype else fast_dtype(where)
    if name.lower() in (embedded.NAME, "default"):
        name, source, revision = embedded.NAME, str(embedded.model_folder()), None
    else:
        source, _, at = name.partition("@")
        revision = at or None
    logging.disable_progress_bar()  # the bar of the weights is over in a second
    try:
        hf = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=torch_dtype, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"Model {name!r} could not be loaded ({str(error).strip().splitlines()[0]}): expected {embedded.NAME!r}, "
            "a local folder with config.json and weights, or a Hugging Face name that is cached or within reach."
        ) from error
    return Model(name, _revision(name, source, hf), hf.eval().requires_grad_(False).to(where), tokenizer)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        raise InputError(
            f"Device {name!r} is not here: expected auto, cpu" + (", cuda." if torch.cuda.is_available() else ".")
        )
    return torch.device(name)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and on processors that multiply it in hardware (2.3 times as fast), else float32."""
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def _revision(name: str, source: str, hf: PreTrainedModel) -> str:
    """What pins the weights: a commit of the hub, or a hash over a local folder's configuration and weight files."""
    if name == embedded.NAME:
        return embedded.REVISION
    if commit := getattr(hf.config, "_commit_hash", None):
        return str(commit)
    digest = hashlib.sha256()
    for path in sorted(Path(source).glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
    return f"local-{digest.hexdigest()[:12]}"


def _cuda_of(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _gpt2_alphabet()
