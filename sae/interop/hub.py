"""Dictionaries on the Hugging Face hub: OWNER/REPO or OWNER/REPO/FOLDER, into the hub's own cache on this machine.

Only the files that our readers take are fetched, and code never. What is in the cache already needs no network.
"""

import re
from pathlib import Path

from activations.errors import InputError

_NAME = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)((?:/[\w][\w.+-]*)*)/?", flags=re.ASCII)
FILES = (
    "cfg.json",
    "config.json",
    "hyperparams.json",
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.safetensors",
    "params.npz",
    "ae.pt",
    "checkpoints/final.safetensors",
    "checkpoints/pruned.safetensors",
)


def is_name(address: str) -> bool:
    """Whether `address` may be of the hub: it has its form, and its first part is no folder here."""
    return bool(_NAME.fullmatch(address)) and not Path(address.split("/")[0]).exists()


def fetch(address: str) -> Path:
    """The local folder of a dictionary on the hub; a file where one is named (.pt or .npz). Raises InputError."""
    found = _NAME.fullmatch(address)
    assert found is not None, address
    repo, inside = found[1], found[2].strip("/")
    named = inside.endswith((".pt", ".npz", ".safetensors"))
    folder = inside.rpartition("/")[0] if named else inside
    prefix = f"{folder}/" if folder else ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [*(prefix + name for name in FILES), *([inside] if named else [])]
    try:
        snapshot = Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{address} is no folder here, and the hub did not give it ({reason}): check the name and the network, or "
            "fetch it elsewhere and give its folder."
        ) from None
    place = snapshot / inside
    if not place.exists():
        raise InputError(
            f"{repo} has nothing that is read here at {inside or 'its top'}: expected a dictionary's folder."
        )
    return place
