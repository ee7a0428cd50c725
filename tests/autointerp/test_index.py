"""`index` on a run of one random model and a cache whose codes are known: rows are chosen, not captured."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

import duckdb
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activations import InputError, Run, load_model
from activations.files import lock
from activations.ranks import Ranks
from activations.tokens import Tokens
from app.cli.index import command
from autointerp import index as module
from autointerp import lens
from autointerp.index import index
from autointerp.lens import logit_lens, neighbours
from autointerp.scratch import Scratch
from data.store import open_store
from sae import load_sae, save_sae
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from tests.tiny import HOOK, plant

D, N_WORDS, CONTEXT = 8, 40, 64
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer; its vocabulary has 38 words and 2 entries without text."""
    folder = tmp_path_factory.mktemp("model")
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(N_WORDS - 2)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w1").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=N_WORDS,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def planted_rows(n: int, seed: int) -> Tensor:
    """Each row has one entry of magnitude 2 to 4 and one of magnitude 1 to 2, of either sign; the others are 0.01."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(n, D - 1, generator=generator).argsort(dim=1)[:, :2]  # entry 7 is never chosen
    sizes = 1 + torch.rand(n, 2, generator=generator) + torch.tensor([1.0, 0.0]) * torch.rand(n, 2, generator=generator)
    signs = torch.randint(0, 2, (n, 2), generator=generator) * 2 - 1
    return torch.full((n, D), 0.01).scatter_(1, places, sizes * signs)


@pytest.fixture
def make_run(tmp_path: Path, model_folder: Path) -> MakeRun:
    """make_run(signed=, dtype=): a run of two shards of 640 rows and a dictionary that is the identity, k=2."""

    def make(signed: bool = False, dtype: torch.dtype = torch.float32, d_in: int = D) -> Path:
        run = Run.create(
            tmp_path / "demo",
            model=str(model_folder),
            revision="r",
            model_dtype="float32",
            corpus="made up",
            corpus_hash="0",
            context=CONTEXT,
            n_tokens=1280,
        )
        shards = []
        for shard in range(2):
            row = torch.arange(640, dtype=torch.int32)
            rows = planted_rows(640, shard).to(dtype)
            rows[100] = 100.0  # a sink
            docs = (row + 640 * shard) // 100
            shards.append((Tokens(row % (N_WORDS - 2), docs.int(), row % CONTEXT), rows))
        plant(run, shards, find_sinks=True)
        sizes = {"d_in": d_in, "d_sae": D, "k": 2}
        sae = AbsTopKSAE(AbsTopKConfig(**sizes)) if signed else TopKSAE(TopKConfig(**sizes))
        with torch.no_grad():
            sae.W_enc.copy_(torch.eye(d_in, D))
            sae.W_dec.copy_(torch.eye(D, d_in))
        sae.metadata = {"hook_name": HOOK, "model_name": str(model_folder)}
        folder = run.dictionary("planted")
        folder.mkdir(parents=True)
        save_sae(sae, folder)
        return run.path

    return make


def ordinary(dtype: torch.dtype = torch.float32) -> Tensor:
    """All 1,280 rows, in float32, those that are not ordinary set to 0."""
    rows = torch.cat([planted_rows(640, 0), planted_rows(640, 1)]).to(dtype).float()
    rows[::CONTEXT] = 0
    rows[[100, 740]] = 0
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_a_signed_dictionary_is_that_of_the_rows(make_run: MakeRun, dtype: torch.dtype) -> None:
    path = index(make_run(signed=True, dtype=dtype), batch=100)
    rows = ordinary(dtype)
    z = rows * (rows.abs() > 0.5)
    with open_store(path.parent) as store:
        assert store.signed
        assert store.meta["n_tokens"] == str(1280 - 20 - 2)
        assert store.meta["hook"] == HOOK
        assert store.meta["architecture"] == "abstopk"
        for number in range(D - 1):
            feature = store.feature(number)
            column = z[:, number]
            fired = column[column != 0]
            assert feature.n_active == len(fired)
            assert feature.density == len(fired) / 1258
            assert (feature.max, feature.min) == (column.max().item(), column.min().item())
            assert feature.mean == pytest.approx(fired.mean().item(), abs=1e-6)
            poles = {example.pole for example in store.examples(number)}
            assert poles == {"+", "-"}
            for example in store.examples(number):
                length = len(example.token_ids)
                assert example.acts == column[example.start : example.start + length].tolist()
                assert example.token_ids == [(example.start % 640 + j) % (N_WORDS - 2) for j in range(length)]
                assert example.doc == example.start // 100
        assert not store.feature(7).alive
        assert store.vocab[:2] == [b"w0", b"w1"]
        assert len(store.vocab) == N_WORDS
    assert sorted(p.name for p in path.parent.iterdir() if not p.name.endswith((".lock", ".holder"))) == [
        "cfg.json",
        "features.duckdb",
        "sae_weights.safetensors",
    ]


def test_what_fires_together_and_where_it_lies_is_in_the_store(make_run: MakeRun) -> None:
    fires = ordinary().abs().numpy() > 0.5
    with open_store(index(make_run(signed=True)).parent) as store:
        assert store.meta["coactivation_tokens"] == store.meta["n_tokens"]
        assert 0 < float(store.meta["map_variance"]) < 1
        for number in range(D):
            profile = store.profile(number)
            assert profile is not None
            together = {pair.feature: pair.n for pair in profile.by_jaccard}
            others = [j for j in range(D) if j != number]
            counts = {j: int((fires[:, number] & fires[:, j]).sum()) for j in others}
            assert together == {j: n for j, n in counts.items() if n >= 5}
            assert sum(each.n_active for each in profile.positions) == fires[:, number].sum()
            assert profile.cluster in range(3)  # sqrt(8) of them
        places = store.map(alive_only=False)
        assert places.feature == list(range(D))
        assert (places.x[3], places.cluster[3]) == (store.profile(3).x, store.profile(3).cluster)  # type: ignore[union-attr]
        assert store.map().feature == list(range(D - 1))


def test_an_unsigned_dictionary_has_positive_values_only(make_run: MakeRun) -> None:
    with open_store(index(make_run()).parent) as store:
        assert not store.signed
        assert store.page().total >= D - 1
        for number in range(D):
            assert store.feature(number).min == 0.0
            assert {example.pole for example in store.examples(number)} <= {"+"}


def test_the_batch_changes_nothing(make_run: MakeRun) -> None:
    run = make_run(signed=True)
    tables = []
    for batch in (64, 4096):
        with duckdb.connect(str(index(run, overwrite=True, batch=batch)), read_only=True) as connection:
            names = ("features", "examples", "windows", "window_peaks", "vocab")
            tables.append([connection.execute(f"FROM {name}").fetchall() for name in names])
    assert tables[0] == tables[1]


def test_a_part_of_the_cache_can_be_indexed(make_run: MakeRun) -> None:
    run = make_run(signed=True)
    with open_store(index(run, n_tokens=700).parent) as store:
        assert store.meta["n_rows"] == "700"
        assert store.meta["n_tokens"] == str(700 - 11 - 1)
        assert store.feature(0).n_active == int((ordinary()[:700, 0].abs() > 0.5).sum())


def test_the_logit_lens_is_the_centred_product_and_leaves_out_entries_without_text(
    make_run: MakeRun, model_folder: Path
) -> None:
    run = make_run()
    model = load_model(str(model_folder), dtype="float32", device="cpu")
    head, gain = model.hf.get_output_embeddings().weight, model.hf.model.norm.weight  # type: ignore[operator,union-attr]
    logits = (head * gain)[: N_WORDS - 2].T  # the dictionary's decoder is the identity
    logits = logits - logits.mean(dim=1, keepdim=True)
    with open_store(index(run).parent) as store:
        for number in range(D):
            feature = store.feature(number)
            values, ids = logits[number].sort(descending=True)
            assert [token.id for token in feature.top_logits] == ids[:10].tolist()
            assert [token.id for token in feature.bottom_logits] == ids.flip(0)[:10].tolist()
            assert [t.value for t in feature.top_logits] == pytest.approx(values[:10].tolist(), abs=1e-6)
            assert sum(feature.logit_counts) == N_WORDS - 2
            assert feature.logit_edges[0] == pytest.approx(values[-1].item(), abs=1e-6)
            assert feature.logit_edges[-1] == pytest.approx(values[0].item(), abs=1e-6)
            assert len(feature.logit_edges) == len(feature.logit_counts) + 1


def test_the_lens_histogram_counts_every_logit_once() -> None:
    W_U = torch.tensor([[-4.0, -3.9, 0.0, 1.0, 4.0]])
    found = logit_lens(torch.tensor([[1.0], [0.0]]), W_U, torch.arange(5).numpy())
    assert found.counts[0].nonzero()[0].tolist() == [0, 20, 25, 39]  # bars of 0.2 from -4 to 4
    assert found.counts[0][[0, 20, 25, 39]].tolist() == [2, 1, 1, 1]
    assert found.counts[1].tolist() == [5] + [0] * 39
    assert found.top_ids[0].tolist() == [4, 3, 2, 1, 0]
    assert found.bottom_values[0].tolist() == pytest.approx([-4.0, -3.9, 0.0, 1.0, 4.0])


def test_neighbours_are_nearest_first_without_the_latent_itself() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 165.0, 90.0]))
    W_dec = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 3.0, 0.2, 2.0])[:, None]
    found, cosines = neighbours(W_dec, W_dec.norm(dim=1), 0, 1, signed=False)
    assert found.tolist() == [[1, 3, 2]]
    assert cosines[0].tolist() == pytest.approx([0.9848, 0.0, -0.9659], abs=1e-4)
    found, cosines = neighbours(W_dec, W_dec.norm(dim=1), 2, 4, signed=True)
    assert found.tolist() == [[0, 1, 3], [2, 1, 0]]
    assert cosines[0].tolist() == pytest.approx([-0.9659, -0.9063, 0.2588], abs=1e-4)


@pytest.mark.parametrize("m", [10, 2000, 2048])
def test_the_largest_are_those_of_the_whole_row(m: int) -> None:
    x = torch.randn(50, m, generator=torch.Generator().manual_seed(0))
    x[0] = -torch.rand(m)
    assert torch.equal(lens.largest(x, 7), x.argsort(dim=1, descending=True)[:, :7])


def test_pieces_of_the_decoder_join_to_the_whole(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    features = []
    for cells, rows in ((1 << 23, 4096), (N_WORDS * 2, 3)):
        monkeypatch.setattr(lens, "_CELLS", cells)
        for each in (lens, module):
            monkeypatch.setattr(each, "ROWS", rows)
        with open_store(index(run, overwrite=True).parent) as store:
            features.append([store.feature(number) for number in range(D)])
    assert features[0] == features[1]


def test_a_finished_index_is_only_replaced_on_request(make_run: MakeRun) -> None:
    run = make_run()
    path = index(run)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"demo is indexed already .*features.duckdb.*--overwrite"):
        index(run)
    assert path.read_bytes() == before
    with open_store(path.parent) as old:
        index(run, overwrite=True, n_tokens=640)
        assert old.replaced
        assert old.meta["n_rows"] == "1280"
        assert old.examples(1)
        with open_store(path.parent) as new:
            assert new.meta["n_rows"] == "640"


def test_wrong_input_is_one_line_and_leaves_nothing_behind(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(d_in=4)
    folder = run / "dictionaries" / "planted"
    with pytest.raises(InputError, match="rows of 4 values"):
        index(run)
    assert not (folder / ".index").exists()
    with pytest.raises(InputError, match="n_tokens=0"):
        index(run, n_tokens=0)
    with lock(folder / ".index.lock"), pytest.raises(InputError, match="in use by process"):
        index(run)
    (run / "activations" / HOOK / "manifest.json").unlink()
    with pytest.raises(InputError, match="no activations at"):
        index(run)
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "alone")
    with pytest.raises(InputError, match="lies in no run"):
        index("alone")
    assert not (tmp_path / "alone" / "features.duckdb").exists()


def test_a_full_disk_is_one_line_and_keeps_the_old_store(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    path = index(run)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "code_tables", full)
        with pytest.raises(InputError, match="could not be indexed: .*No space left.*run the same again"):
            index(run, overwrite=True)
    assert path.read_bytes() == before
    index(run, overwrite=True)
    assert not (path.parent / ".index").exists()


def test_parts_are_gone_on_with_for_the_same_dictionary_and_options_alone(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(signed=True)
    folder = run / "dictionaries" / "planted"

    def full(*_: object, **__: object) -> Path:
        raise OSError(28, "No space left on device")

    def stop_before_the_store(**options: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "build_store", full)
            with pytest.raises(InputError, match="No space left"):
                index(run, **options)

    def shards_encoded(**options: int) -> int:
        seen = []
        encode = module.code_tables
        with monkeypatch.context() as patch:
            patch.setattr(module, "code_tables", lambda *given, **named: seen.append(0) or encode(*given, **named))
            index(run, **options)
        return len(seen)

    stop_before_the_store()
    (folder / ".index" / "codes-00001.parquet").unlink()
    assert shards_encoded() == 1
    first = tables(folder / "features.duckdb")
    (folder / "features.duckdb").unlink()
    stop_before_the_store()
    assert shards_encoded(n_tokens=700) == 2
    (folder / "features.duckdb").unlink()
    stop_before_the_store()
    sae = load_sae(folder)
    with torch.no_grad():
        sae.W_enc.mul_(2)
    save_sae(sae, folder)
    assert shards_encoded() == 2
    second = tables(folder / "features.duckdb")
    assert first["features"] != second["features"]
    with open_store(folder) as store:
        assert store.feature(0).max == ordinary().amax(dim=0)[0] * 2


def test_the_command_prints_what_it_made_and_what_comes_next(make_run: MakeRun) -> None:
    run = make_run()
    result = CliRunner().invoke(command, [str(run), "--tokens", "1k"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "of 8 features fire in 982 tokens" in result.stdout
    assert f"sae label {run}" in result.stdout
    again = CliRunner().invoke(command, [str(run), "--overwrite", "--json"], catch_exceptions=False)
    facts = json.loads(again.stdout)
    assert (facts["features"], facts["tokens"]) == (8, 1258)
    assert Path(facts["path"]).is_file()
    assert CliRunner().invoke(command, [str(run), "--tokens", "some"]).exit_code == 2
    assert CliRunner().invoke(command, [str(run), "--loss-effect", "2", "--features", "1"]).exit_code == 2
    with pytest.raises(InputError, match="has no feature 8: expected 0 to 7"):
        CliRunner().invoke(command, [str(run), "--overwrite", "--features", "1,8"], catch_exceptions=False)
    for option in (["--features", "1,7"], ["--loss-effect", "2"]):
        CliRunner().invoke(command, [str(run), "--overwrite", *option], catch_exceptions=False)
        with open_store(run) as store:
            effects = {i: profile.loss for i in range(8) if (profile := store.profile(i)) and profile.loss}
            assert set(effects) == ({1} if "1,7" in option else {0, 3})  # 7 never fires
            assert effects[min(effects)].n_contexts == 16
            assert int(store.meta["loss_effect_forwards"]) >= 32 * len(effects)


KILLED = """
import os, sys
import torch
torch.set_num_threads(1)
from activations import load_model
from autointerp import index, lens
index.ROWS = lens.ROWS = 3
index.BLOCK, index.CHUNK = 2, 100
from sae import load_sae
load_sae(sys.argv[1])
load_model(sys.argv[2], dtype="float32", device="cpu")(torch.zeros(1, 3, dtype=torch.long))
print("ready", flush=True)
for _ in sys.stdin:  # a child each, so that the imports are done once
    child = os.fork()
    if child == 0:
        index.index(sys.argv[1], device="cpu", batch=64, loss_effect=5)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def tables(store: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of all tables, in their order, but when the store was made."""
    with duckdb.connect(str(store), read_only=True) as connection:
        names = [name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()]
        found = {name: connection.execute(f"FROM {name}").fetchall() for name in names}
    assert {"features", "profiles", "examples", "window_peaks", "positions", "meta"} <= set(found)
    found["meta"] = [row for row in found["meta"] if row[0] != "created"]
    return found


@pytest.mark.slow
def test_an_index_killed_at_any_moment_goes_on_and_ends_in_the_store_of_an_unbroken_one(
    make_run: MakeRun, model_folder: Path
) -> None:
    folder = make_run(signed=True) / "dictionaries" / "planted"
    scratch, store = folder / ".index", folder / "features.duckdb"
    command = [sys.executable, "-c", KILLED, str(folder), str(model_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as parent:
        stdin, stdout = cast(TextIO, parent.stdin), cast(TextIO, parent.stdout)

        def state() -> dict[str, int]:
            """The parts and the unfinished store, by name, with sizes."""
            found = {}
            for path in [*scratch.glob("*"), *folder.glob(".features.duckdb.building/*")]:
                with suppress(FileNotFoundError):  # gone since it was listed
                    found[path.name] = path.stat().st_size
            return found

        def run(changes: int | None, delay: float = 0.0) -> int:
            """Its exit code; changes: killed so many seconds after so many changes of `state`, None for not at all."""
            stdin.write("go\n")
            child, last = int(stdout.readline()), state()
            while changes and not store.exists():
                now = state()
                changes, last = changes - (now != last), now
            if changes is not None:
                time.sleep(delay)
                with suppress(ProcessLookupError):  # it may have ended
                    os.kill(child, signal.SIGKILL)
            return int(stdout.readline())

        assert stdout.readline() == "ready\n"
        assert run(None) == 0
        whole = tables(store)
        seen: list[frozenset[str]] = []
        moments = random.Random(0)
        for _ in range(4):
            store.unlink()
            while not store.exists():
                if run(moments.randrange(1, 9), moments.uniform(0, 0.05)) == -signal.SIGKILL:
                    seen.append(frozenset(state()))
            shutil.rmtree(scratch, ignore_errors=True)  # of a kill after the store was there
            assert tables(store) == whole
        stdin.close()
    assert len(set(seen)) > 5


@pytest.mark.slow
def test_two_processes_make_the_store_of_one(make_run: MakeRun) -> None:
    run = make_run(signed=True)
    store = run / "dictionaries" / "planted" / "features.duckdb"
    script = str(Path(sys.executable).with_name("sae"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [script, "index", str(run), "--device", "cpu", "--loss-effect", "5"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = []
    for each in (command, [*launcher, *command]):
        done = subprocess.run(each, capture_output=True, text=True, env=env, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("features fire") == 1  # the leader alone reports
        found.append(tables(store))
        again = subprocess.run(each, capture_output=True, text=True, env=env, timeout=200)
        assert again.returncode != 0
        assert again.stderr.count("is indexed already") == 1
        store.unlink()
        assert not (store.parent / ".index").exists()
    assert found[0] == found[1]


def test_ranks_take_turns_at_the_parts(tmp_path: Path) -> None:
    def lacking(rank: int) -> list[int]:
        return Scratch(tmp_path, Ranks(rank, 3)).lacking("codes", 8)

    Scratch(tmp_path).path("codes", 4).touch()
    assert [lacking(rank) for rank in range(3)] == [[0, 3, 6], [1, 7], [2, 5]]


def test_as_many_examples_are_kept_as_are_asked_for(make_run: MakeRun) -> None:
    run = make_run()
    kept = {}
    for examples in (8, 30):
        path = index(run, examples=examples, overwrite=True)
        with duckdb.connect(str(path), read_only=True) as store:
            counts = store.execute("SELECT feature, count(*) FROM examples GROUP BY feature").fetchall()
        kept[examples] = max(n for _, n in counts)
    assert 6 <= kept[8] <= 10 < kept[30] <= 34  # each split has top ones of its own
    with pytest.raises(InputError, match="examples=5 is too small: expected at least 6"):
        index(run, examples=5, overwrite=True)
