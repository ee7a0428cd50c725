"""What indexing 131,072 latents adds to a process in which their dictionary is loaded, measured in one of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
D_SAE, N_TOKENS, BUDGET_MIB = 131_072, 160_000, 1024

INDEX = """
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from activations import load_model
from activations.run import Run
from activations.tokens import Tokens
from autointerp.index import index
from data.store import open_store
from sae import load_sae, save_sae
from sae.architectures.topk import TopKConfig, TopKSAE
from tests.tiny import HOOK, plant, spaced_tokenizer
folder, d_sae, n_tokens, map = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
d, per_shard = 64, 1 << 16
def now(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024
torch.manual_seed(0)
config = LlamaConfig(hidden_size=d, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=101)
LlamaForCausalLM(config).save_pretrained(folder / "model")
spaced_tokenizer().save_pretrained(folder / "model")
run = Run.create(folder / "run", model=str(folder / "model"), revision="r", model_dtype="float32", corpus="made up",
                 corpus_hash="0", context=128, n_tokens=n_tokens)
row = torch.arange(n_tokens, dtype=torch.int32)
tokens = Tokens(row * 7 % 101, row // 500, row % 128)
cut = [slice(at, at + per_shard) for at in range(0, n_tokens, per_shard)]
shards = [Tokens(*(column[part] for column in tokens[:3])) for part in cut]
plant(run, [(shard, torch.randn(len(shard.ids), d).bfloat16()) for shard in shards])
sae = TopKSAE(TopKConfig(d_in=d, d_sae=d_sae, k=48))
with torch.no_grad():
    sae.W_dec.normal_()
    sae.W_enc.copy_(sae.W_dec.T)
sae.metadata = {"hook_name": HOOK, "model_name": str(folder / "model")}
place = run.dictionary("wide")
place.mkdir(parents=True)
save_sae(sae, place)
real, calls = TopKSAE.encode_sparse, 0
def encode_sparse(self, x):
    # As the encoder does it for some batches; then made up, for time: 32 to 64 latents a row, a few of them dense.
    global calls
    calls += 1
    if calls <= 2:
        return real(self, x)
    values = torch.rand(len(x), 64) + 0.1
    values[torch.arange(64) >= torch.randint(32, 65, (len(x), 1))] = 0
    start = (d_sae * torch.rand(len(x), 64).double() ** 3).long()
    return values, ((start * 64 + torch.arange(64)) % d_sae)  # in a row all different
TopKSAE.encode_sparse = encode_sparse
del sae, tokens, row
load_model(str(folder / "model"), dtype="float32", device="cpu").token_bytes()
sae = load_sae(place)
before = now("VmRSS")
del sae
Path("/proc/self/clear_refs").write_text("5")
path = index(place, device="cpu", map=map)
added = now("VmHWM") - before
with open_store(path.parent) as store:
    found = store.summary()
    assert found.n_features == d_sae and found.n_alive > d_sae // 2 and found.n_tokens > 0.9 * n_tokens
    assert int(store.meta["coactivation_tokens"]) > 100_000
    profile = store.profile(0)
    assert len(profile.by_phi) == 10 and len(store.feature(0).neighbours) == 10
print(added)
"""


def added_mib(folder: Path, how: str) -> float:
    """Peak resident memory of an index less what the process held with the dictionary loaded."""
    command = [sys.executable, "-c", INDEX, str(folder), str(D_SAE), str(N_TOKENS), how]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.timeout(900)
def test_131_072_latents_add_less_than_1_gib(tmp_path: Path) -> None:
    assert added_mib(tmp_path, "pca") < BUDGET_MIB
