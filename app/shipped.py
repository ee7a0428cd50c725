"""The runs that ship with the package: dictionaries with stores and explanations, without their activations.

They are copied into the user's cache once, since labels and notes are written beside a store.
data/samples/runs/README.md says how they were made and what they reach.
"""

import hashlib
import shutil
from pathlib import Path

from activations.embedded import cache_folder
from activations.files import lock, write_aside

SHIPPED = Path(__file__).resolve().parent.parent / "data" / "samples" / "runs"


def shipped_runs() -> Path:
    """The folder of the runs that ship, a copy of the user's own; another version's is another folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in SHIPPED.glob("*/**/*") if path.is_file()):  # another README is no other version
        digest.update(f"{path.relative_to(SHIPPED)}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    target = cache_folder() / f"shipped-{digest.hexdigest()[:12]}"
    if not target.exists():
        with lock(cache_folder() / "shipped.lock"):
            if not target.exists():
                with write_aside(target) as aside:
                    shutil.copytree(SHIPPED, aside)
    return target
