"""Search by meaning, prompt and another feature: on planted stores, with the real embedder and a tiny model."""

import dataclasses
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from activations.embedder import Embedder, load_embedder
from activations.errors import InputError
from activations.model import Model
from activations.splice import read
from autointerp.search import (
    LabelVectors,
    by_feature,
    by_meaning,
    by_prompt,
    by_token,
    by_words,
    meaning,
    prompt,
    search,
)
from autointerp.search.meaning import FILE
from autointerp.search.prompt import Reading, peaks, read_text
from data.store import Explanation, Filters, Score, Store, open_store
from sae import SAE, load_sae
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.base import Statistics
from steering import steer
from steering.edit import ablate
from tests.planted import planted_store
from tests.tiny import HOOK, spaced_tokenizer, tiny_dictionary, tiny_model

N = 36
TEXTS = {1: "ships and sailing", 2: "cooking recipes", 3: "numbers and arithmetic", 4: "kings and queens"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_store(tmp_path_factory.mktemp("run") / "demo" / "dictionaries" / "planted", n_features=N)


@pytest.fixture
def store(planted: Path, tmp_path: Path) -> Iterator[Store]:
    folder = tmp_path / "demo" / "dictionaries" / "planted"
    shutil.copytree(planted, folder)
    with open_store(folder) as store:
        yield store


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return load_embedder(device="cpu")


class Counting(Embedder):
    """The embedder, and the texts that it was given."""

    def __init__(self, real: Embedder) -> None:
        super().__init__(real.name, real.hf, real.tokenizer, real.max_tokens)
        self.texts: list[str] = []

    def embed(self, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
        self.texts += texts
        return super().embed(texts, batch)


def explain(store: Store, texts: dict[int, str], source: str = "person") -> list[Explanation]:
    said = [Explanation.new(feature=feature, text=text, source=source) for feature, text in texts.items()]
    store.add_explanations(said)
    return said


# Meaning


def test_a_label_is_found_by_what_it_means(store: Store, minilm: Embedder) -> None:
    explain(store, TEXTS)
    vectors = LabelVectors(store, minilm)
    for query, feature in {"a boat on the sea": 1, "how to bake bread": 2, "royalty": 4}.items():
        found = by_meaning(vectors, query)
        assert [hit.feature for hit in found.hits][0] == feature
        cosine = float(minilm.embed([query])[0] @ minilm.embed([TEXTS[feature]])[0])
        assert found.hits[0].numbers["cosine"] == pytest.approx(cosine, abs=2e-3)  # kept in half precision
        cosines = [hit.numbers["cosine"] for hit in found.hits]
        assert cosines == sorted(cosines, reverse=True)
        assert len(cosines) == 4


def test_only_texts_that_have_no_vector_are_embedded(store: Store, minilm: Embedder) -> None:
    explain(store, {**TEXTS, 5: TEXTS[1]})
    counting = Counting(minilm)
    first = by_meaning(LabelVectors(store, counting), "sea")
    assert sorted(counting.texts) == sorted([*TEXTS.values(), "sea"])  # the shared one once
    assert {hit.feature for hit in first.hits[:2]} == {1, 5}
    counting.texts.clear()
    again = LabelVectors(store, counting)
    assert by_meaning(again, "sea") == first
    assert counting.texts == ["sea"]
    counting.texts.clear()
    explain(store, {2: "rain and storms"})  # in the place of the one before, and as long
    assert 2 in [hit.feature for hit in by_meaning(again, "bad weather").hits[:1]]
    assert counting.texts == ["rain and storms", "bad weather"]
    with safe_open(store.folder / FILE, framework="pt") as file:
        assert file.get_tensor("vectors").shape == (4, 384)
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".label")] == []


def test_the_vectors_of_another_embedder_are_not_taken(store: Store, minilm: Embedder) -> None:
    explain(store, TEXTS)
    by_meaning(LabelVectors(store, minilm), "sea")
    with safe_open(store.folder / FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("hashes", "vectors")}
    save_file(tensors, store.folder / FILE, metadata={"embedder": "another"})
    counting = Counting(minilm)
    by_meaning(LabelVectors(store, counting), "sea")
    assert len(counting.texts) == len(TEXTS) + 1


@pytest.mark.parametrize("damage", ["bytes", "shape", "type", "names"])
def test_damaged_vectors_are_one_line_with_what_to_do(store: Store, minilm: Embedder, damage: str) -> None:
    explain(store, TEXTS)
    vectors = LabelVectors(store, minilm)
    by_meaning(vectors, "sea")
    path = store.folder / FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in ("hashes", "vectors")}
    if damage == "bytes":
        path.write_bytes(b"junk" * 100)
    else:
        if damage == "shape":
            tensors["vectors"] = tensors["vectors"][:, :10].contiguous()
        elif damage == "type":
            tensors["hashes"] = tensors["hashes"].int()
        else:
            del tensors["hashes"]
        save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match="remove it, and it is made anew") as error:
        by_meaning(LabelVectors(store, minilm), "sea")
    assert "\n" not in str(error.value)


def test_what_was_embedded_before_a_kill_is_kept(
    store: Store, minilm: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    explain(store, TEXTS)
    monkeypatch.setattr(meaning, "_SAVED", 2)
    monkeypatch.setattr(meaning, "_BAR", 1)

    class Dying(Counting):
        def embed(self, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
            if len(self.texts) == 3:
                raise KeyboardInterrupt
            return super().embed(texts, batch)

    with pytest.raises(KeyboardInterrupt):
        by_meaning(LabelVectors(store, Dying(minilm)), "sea")
    counting = Counting(minilm)
    found = by_meaning(LabelVectors(store, counting), "a boat at sea")
    assert len(counting.texts) == 2 + 1
    assert found.hits[0].feature == 1


def test_filters_reach_past_the_nearest_labels(store: Store, minilm: Embedder) -> None:
    explain(store, {i: f"ships number {i}" for i in range(30)})
    explain(store, {31: "cooking"}, source="lexical")
    found = by_meaning(LabelVectors(store, minilm), "ships", filters=Filters(source="lexical"), limit=1)
    assert [hit.feature for hit in found.hits] == [31]
    none = by_meaning(LabelVectors(store, minilm), "ships", filters=Filters(state="dead"))
    assert none.hits == []
    assert none.next_step.startswith("Leave out a filter.")


def test_a_store_without_labels_names_the_command(store: Store, minilm: Embedder) -> None:
    for ask in (lambda: by_words(store, "ships"), lambda: by_meaning(LabelVectors(store, minilm), "ships")):
        with pytest.raises(
            InputError, match="has no labels yet: make some with `sae label .*/demo/planted --explainer"
        ):
            ask()


# Prompt


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("tiny", "0", tiny_model(), spaced_tokenizer())


D_SAE = N


@pytest.fixture
def sae() -> TopKSAE:
    return tiny_dictionary(D_SAE)


TEXT = "w3 w14 w15 w92 w65 w35 w89 w79 w32 w38"


@pytest.fixture
def separated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer has no mark between documents: w0 is one."""
    monkeypatch.setattr(prompt, "separator_of", lambda _tokenizer: 0)


def z_of(sae: SAE, model: Model, ids: list[int]) -> torch.Tensor:
    """The dense codes of the tokens after the mark."""
    with read(model, [HOOK]) as got, torch.inference_mode():
        model(torch.tensor([[0, *ids]]))
        z = sae.encode(got[HOOK][0, 1:])
    return z.clone()


@pytest.mark.usefixtures("separated")
def test_all_features_of_a_text_are_found_at_their_peaks(store: Store, sae: TopKSAE, model: Model) -> None:
    ids = model.encode(TEXT)[0].tolist()
    z = z_of(sae, model, ids)
    found = by_prompt(store, sae, model, TEXT, limit=100)
    active = z.abs().amax(dim=0).nonzero().flatten().tolist()
    assert found.total == len(found.hits) == len(active) > 8
    assert {hit.feature for hit in found.hits} == set(active)
    for hit in found.hits:
        column = z[:, hit.feature]
        place = int(column.abs().argmax())
        assert hit.numbers["value"] == pytest.approx(float(column[place]), rel=1e-5)
        assert hit.numbers["tokens"] == int((column != 0).sum())
        assert hit.token == store.token_texts([ids[place]])[0]
        feature = store.feature(hit.feature)
        density = max(feature.density, 1 / store.summary().n_tokens)
        assert hit.numbers["rarity"] == pytest.approx(abs(hit.numbers["value"]) * -math.log(density))
        if feature.alive:
            assert hit.numbers["of_max"] == pytest.approx(hit.numbers["value"] / feature.max)
        else:
            assert "of_max" not in hit.numbers
    for rank, number in (("activation", "value"), ("rarity", "rarity")):
        ranked = by_prompt(store, sae, model, TEXT, rank=rank, limit=100)
        values = [hit.numbers[number] for hit in ranked.hits]
        assert values == sorted(values, reverse=True)
    assert [hit.feature for hit in ranked.hits] != [hit.feature for hit in found.hits]
    assert len(by_prompt(store, sae, model, TEXT, limit=2).hits) == 2


@pytest.mark.usefixtures("separated")
def test_sinks_do_not_count(store: Store, sae: TopKSAE, model: Model) -> None:
    ids = model.encode(TEXT)[0].tolist()
    with read(model, [HOOK]) as got, torch.inference_mode():
        model(torch.tensor([[0, *ids]]))
        norms = got[HOOK][0, 1:].norm(dim=1)
    zeros = torch.zeros(D_SAE)
    sae.statistics = Statistics(zeros, zeros, zeros, 1, 1.0, float(norms.sort().values[-2]))
    z = z_of(sae, model, ids)
    z[norms.argmax()] = 0
    found = by_prompt(store, sae, model, TEXT, limit=100)
    counts = (z != 0).sum(dim=0)
    assert {hit.feature: hit.numbers["tokens"] for hit in found.hits} == {
        int(feature): int(counts[feature]) for feature in counts.nonzero()
    }


@pytest.mark.usefixtures("separated")
def test_the_loss_effect_is_that_of_an_ablation(
    store: Store, sae: TopKSAE, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "_TOKENS", 33)  # three texts a forward
    ids = torch.tensor([[0, *model.encode(TEXT)[0].tolist()]])

    def loss() -> float:
        with torch.inference_mode():
            return float(cross_entropy(model(ids)[0, 1:-1], ids[0, 2:]))

    clean = loss()
    found = by_prompt(store, sae, model, TEXT, rank="loss", limit=100)
    assert len(found.hits) > 8
    for hit in found.hits:
        with steer(model, ablate(sae, hit.feature)):
            assert hit.numbers["nats"] == pytest.approx(loss() - clean, abs=1e-6)
    nats = [hit.numbers["nats"] for hit in found.hits]
    assert nats == sorted(nats, reverse=True)
    assert nats[0] > 0.01
    strongest = [hit.feature for hit in by_prompt(store, sae, model, TEXT, limit=4).hits]
    few = by_prompt(store, sae, model, TEXT, rank="loss", candidates=4)
    assert {hit.feature for hit in few.hits} == set(strongest)
    assert few.total == found.total
    assert few.notes == [f"Measured are the 4 of {found.total} features that fire most strongly."]


@pytest.mark.usefixtures("separated")
def test_filters_come_before_the_candidates(store: Store, sae: TopKSAE, model: Model) -> None:
    dead = by_prompt(store, sae, model, TEXT, filters=Filters(state="dead"), limit=100)
    alive = by_prompt(store, sae, model, TEXT, filters=Filters(state="alive"), limit=100)
    assert not any(hit.facts.alive for hit in dead.hits)
    assert all(hit.facts.alive for hit in alive.hits)
    one = by_prompt(store, sae, model, TEXT, rank="loss", filters=Filters(state="alive"), candidates=1)
    assert [hit.feature for hit in one.hits] == [alive.hits[0].feature]
    none = by_prompt(store, sae, model, TEXT, rank="loss", filters=Filters(max_density=0, state="alive"))
    assert (none.hits, none.total) == ([], 0)
    assert none.next_step


@pytest.mark.usefixtures("separated")
def test_a_long_text_is_cut_and_says_so(
    store: Store, sae: TopKSAE, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "LONGEST", 4)
    found = by_prompt(store, sae, model, TEXT, limit=100)
    assert found.notes == ["Only the first 4 tokens of the text were read."]
    assert len(read_text(sae, model, TEXT).ids) == 4


def test_what_cannot_be_read_is_one_line(store: Store, sae: TopKSAE, model: Model) -> None:
    with pytest.raises(InputError, match="tiny cannot read a text here: the tokenizer has no separator"):
        by_prompt(store, sae, model, TEXT)
    with pytest.raises(InputError, match="nothing to search for"):
        by_prompt(store, sae, model, "  ")
    with pytest.raises(InputError, match="expected activation or rarity or loss"):
        by_prompt(store, sae, model, TEXT, rank="cosine")
    half = Model("tiny", "0", tiny_model().bfloat16(), spaced_tokenizer())
    with pytest.raises(InputError, match="needs the model in float32"):
        by_prompt(store, sae, half, TEXT, rank="loss")
    other = TopKSAE(TopKConfig(d_in=32, d_sae=7, k=3))
    with pytest.raises(InputError, match="has 36 features, its dictionary 7: build it again with `sae index"):
        by_prompt(store, other, model, TEXT)


@pytest.mark.usefixtures("separated")
def test_one_token_predicts_nothing(store: Store, sae: TopKSAE, model: Model) -> None:
    assert by_prompt(store, sae, model, "w3").hits
    with pytest.raises(InputError, match="one token, which predicts nothing"):
        by_prompt(store, sae, model, "w3", rank="loss")


def test_the_peak_is_the_largest_magnitude_and_the_first_of_equal_ones() -> None:
    values = torch.tensor([[1.0, -2.0], [3.0, 0.0], [3.0, -4.0]])
    indices = torch.tensor([[5, 9], [5, 9], [5, 2]])
    on = peaks(Reading([1, 2, 3], 0, values, indices, cut=False))
    assert on.feature.tolist() == [2, 5, 9]
    assert on.value.tolist() == [-4, 3, -2]
    assert on.place.tolist() == [2, 1, 0]
    assert on.n_tokens.tolist() == [1, 3, 1]


# Another feature


def refuse() -> SAE:
    raise AssertionError("the store has enough")


@pytest.mark.parametrize("signed", [False, True])
def test_stored_neighbours_are_the_first_of_all_features(tmp_path: Path, signed: bool) -> None:
    folder = planted_store(tmp_path / "d", n_features=30, signed=signed)
    with open_store(folder) as store:
        few = by_feature(store, refuse, 3, limit=10)
        every = by_feature(store, lambda: load_sae(folder), 3, limit=100)
    assert len(every.hits) == 29
    assert [hit.feature for hit in few.hits] == [hit.feature for hit in every.hits[:10]]
    cosines = np.array([hit.numbers["cosine"] for hit in every.hits])
    assert cosines[:10] == pytest.approx([hit.numbers["cosine"] for hit in few.hits], abs=1e-6)
    sizes = np.abs(cosines) if signed else cosines
    assert (np.diff(sizes) <= 1e-7).all()
    assert (cosines < 0).any()


def test_filters_make_it_look_further_than_the_stored_neighbours(store: Store, planted: Path) -> None:
    near = [hit.feature for hit in by_feature(store, lambda: load_sae(planted), 3, limit=100).hits]
    explain(store, {near[-1]: "the farthest"})
    found = by_feature(store, lambda: load_sae(planted), 3, filters=Filters(source="person"))
    assert [hit.feature for hit in found.hits] == [near[-1]]


@pytest.mark.parametrize("rank", ["phi", "jaccard"])
def test_without_a_stored_list_common_windows_are_counted(store: Store, rank: str) -> None:
    """The planted store has no list of what fires together; features i and i + 1 share a word."""
    found = by_feature(store, refuse, 4, rank=rank)
    assert {hit.feature for hit in found.hits[:2]} == {3, 5}
    values = [hit.numbers[rank] for hit in found.hits]
    assert values == sorted(values, reverse=True)
    assert "windows of the random sample" in found.notes[0]
    assert "windows" in found.definitions["n"]


def test_stored_lists_are_counted_on_tokens(small_run: Path) -> None:
    with open_store(small_run) as store:
        number = next(i for i in store.features() if (p := store.profile(i)) and len(p.by_phi) == 10)
        profile = store.profile(number)
        assert profile is not None
        for rank, stored in (("phi", profile.by_phi), ("jaccard", profile.by_jaccard)):
            found = by_feature(store, refuse, number, rank=rank)
            assert [hit.feature for hit in found.hits] == [pair.feature for pair in stored]
            assert [hit.numbers["n"] for hit in found.hits] == [pair.n for pair in stored]
            assert found.notes == []
            assert "tokens" in found.definitions["n"]
            filtered = by_feature(store, refuse, number, rank=rank, filters=Filters(max_density=0.5), limit=40)
            assert "windows" in filtered.definitions["n"]
            assert len(filtered.hits) > 10


def test_a_number_that_is_none_is_one_line(store: Store) -> None:
    with pytest.raises(InputError, match="no feature 36: expected 0 to 35"):
        by_feature(store, refuse, 36)
    for text in ("x", "-1", "1.5", "", "\u0663", "9" * 30, "1; DROP TABLE features"):
        with pytest.raises(InputError, match="no feature number"):
            search(store.folder, text, by="feature")


# All of them


def test_an_answer_says_where_and_how_it_was_found(store: Store) -> None:
    (said,) = explain(store, {7: "ships"}, source="lexical")
    store.add_scores(
        [
            Score(
                explanation_id=said.id,
                feature=7,
                scorer="detection",
                value=0.8,
                lo=0.7,
                hi=0.9,
                n=10,
                chance=0.5,
                control=None,
                failures=0,
                cost_tokens=0,
                created=said.created,
                model="",
            )
        ]
    )
    found = search(store.folder, "Ships")
    assert (found.by, found.rank, found.query, found.total) == ("words", "words", "Ships", 1)
    assert found.address.endswith("demo/planted")
    assert found.hook == "blocks.0.hook_resid_post"
    (hit,) = found.hits
    assert (hit.feature, hit.facts.label, hit.facts.score, hit.facts.source) == (7, "ships", 0.8, "lexical")
    assert set(hit.numbers) == set(found.definitions)
    assert dataclasses.asdict(found)["hits"][0]["facts"]["feature"] == 7


def test_wrong_questions_are_one_line(store: Store) -> None:
    explain(store, TEXTS)
    for text, options, says in (
        ("x", {"by": "magic"}, "expected one of words, meaning, token, prompt, feature"),
        ("x", {"rank": "loss"}, "no order of a search by words: expected words"),
        ("x", {"by": "token", "rank": "loss"}, "expected firings or value"),
        ("x", {"limit": 0}, "limit=0 is too small"),
        ("", {}, "nothing to search for"),
        (" \n", {"by": "token"}, "nothing to search for"),
        ("\ud800", {}, "no valid text"),
        ("\ud800", {"by": "token"}, "no valid text"),
    ):
        with pytest.raises(InputError, match=says):
            search(store.folder, text, **options)


def test_an_empty_answer_says_what_to_do(store: Store) -> None:
    explain(store, TEXTS)
    assert "--by meaning" in by_words(store, "zebra").next_step
    assert "not one token" in by_token(store, "two words").next_step
    assert by_words(store, "zebra", filters=Filters(min_score=0.5)).next_step.startswith("Leave out a filter.")
