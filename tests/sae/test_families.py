"""Feature families: a planted tree comes back as it is; the search equals the paper's steps in networkx."""

import json

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from activations.errors import InputError
from sae import coactivation
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.coactivation import edges, firings, independent
from sae.evals.families import _held, find_families, measured, splits
from sae.families import Family, FamilySettings, _different, entering, families
from sae.files import save_sae
from tests.tiny import HOOK, planted_run


def planted_firings(n: int = 12_000, seed: int = 0) -> csr_matrix:
    """20 latents: 0 above 1 to 5 (disjoint parts of its rows), 1 above 6 to 8; 10 above 11 to 14; the others alone."""
    rng = np.random.default_rng(seed)
    on = np.zeros((n, 20), bool)
    on[: n // 20, 0] = True
    on[n // 2 : n // 2 + n // 25, 10] = True
    for parent, children in ((0, range(1, 6)), (1, range(6, 9)), (10, range(11, 15))):
        rows = rng.permutation(np.flatnonzero(on[:, parent]))
        for child, part in zip(children, np.array_split(rows, len(children)), strict=True):
            on[part[: len(part) - child], child] = True  # densities differ, so that the order is known
    for latent in (9, *range(15, 20)):
        on[rng.choice(np.arange(n * 3 // 4, n), 60 + latent, replace=False), latent] = True
    return csr_matrix(on.astype(np.int32))


def test_the_planted_trees_are_the_families():
    found = families(planted_firings(), FamilySettings(rounds=0))
    assert found == [
        Family(parent=0, children=(1, 6, 7, 8, 2, 3, 4, 5), under=(0, 1, 1, 1, 0, 0, 0, 0), round=0),
        Family(parent=10, children=(11, 12, 13, 14), under=(10, 10, 10, 10), round=0),
    ]


def test_without_its_parent_a_child_is_the_parent_of_a_smaller_family():
    on = planted_firings().toarray()
    rows = np.flatnonzero(on[:, 8])
    extra = np.zeros((len(on), 2), np.int32)
    extra[rows[::2], 0], extra[rows[1::3], 1] = 1, 1
    found = families(csr_matrix(np.hstack([on, extra])), FamilySettings(rounds=0, min_firings=3))
    assert [(f.parent, len(f.children)) for f in found] == [(0, 10), (10, 4), (1, 5)]


def test_a_family_that_a_parent_outshone_is_found_in_a_later_round():
    on = np.zeros((1000, 12), np.int32)
    on[:150, 0] = 1
    on[:80, 1] = on[900:930, 1] = 1
    on[:80:16, 1] = 0  # so that 2 to 6 fire with 0 a little more than with 1
    for i in range(5):
        on[16 * i : 16 * i + 15, 2 + i] = 1
        on[80 + 14 * i : 80 + 14 * i + 13, 7 + i] = 1
    assert [(f.parent, f.children, f.round) for f in families(csr_matrix(on))] == [
        (0, tuple(range(2, 12)), 0),  # 1 points at one of them, and is no child of 0
        (1, tuple(range(2, 7)), 1),
    ]
    assert len(families(csr_matrix(on), FamilySettings(rounds=0))) == 1


def test_of_families_that_are_nearly_the_same_the_larger_stays():
    def family(parent: int, *children: int) -> Family:
        return Family(parent=parent, children=children, under=(parent,) * len(children), round=0)

    large, same_parent, alike = family(0, *range(1, 9)), family(0, 20, 21, 22, 23), family(9, *range(1, 8))
    other = family(10, 1, 2, 3, 4)  # half of the large one's
    assert _different([alike, other, same_parent, large]) == [large, other]


def test_the_search_is_the_papers_step_by_step():
    rng = np.random.default_rng(3)
    factors = rng.random((600, 5)) < 0.12
    on = (factors[:, rng.integers(5, size=60)] & (rng.random((600, 60)) < rng.uniform(0.05, 0.9, 60))) | (
        rng.random((600, 60)) < 0.01
    )
    fires = csr_matrix(on.astype(np.int32))
    found = families(fires, FamilySettings(chance=1e9))
    assert len(found) > 3
    assert {(f.parent, frozenset(f.children)) for f in found} == reference(on)


def reference(on: np.ndarray) -> set[tuple[int, frozenset[int]]]:
    """saerch's steps with networkx, dense, with the differences that `sae.families` names."""
    each, counts = on.sum(axis=0), on.T.astype(int) @ on.astype(int)
    names = [i for i in range(on.shape[1]) if 10 <= each[i] < 0.2 * len(on)]
    found: list[tuple[int, frozenset[int]]] = []
    for _ in range(4):
        graph = nx.Graph()
        graph.add_nodes_from(names)
        for i in names:
            for j in names:
                share = counts[i, j] / (min(each[i], each[j]) + 1)
                if i < j and share >= 0.1:
                    above, below = sorted((i, j), key=lambda k: (-each[k], k))
                    tie = 1e-8 * each[above] + 1e-12 * (100 * above + below)  # as `forest` decides between equals
                    graph.add_edge(i, j, weight=np.exp(share - tie))
        directed = nx.DiGraph()
        directed.add_nodes_from(names)
        for i, j in nx.maximum_spanning_tree(graph, algorithm="kruskal").edges:
            directed.add_edge(*sorted((i, j), key=lambda k: (-each[k], k)))
        here = subtrees(directed)
        if not here:
            break
        found += [(root, frozenset(tree.nodes) - {root}) for root, tree in here]
        names = [name for name in names if name not in {root for root, _ in here}]
    kept: list[tuple[int, frozenset[int]]] = []
    for root, members in sorted((f for f in found if len(f[1]) > 3), key=lambda f: -len(f[1])):
        if not any(root == r or len(members & m) > 0.6 * len(members | m) for r, m in kept):
            kept.append((root, members))
    return set(kept)


def subtrees(graph: nx.DiGraph) -> list[tuple[int, nx.DiGraph]]:
    found = []
    for node in sorted(graph.nodes):
        if graph.in_degree(node) == 0 and graph.out_degree(node) > 2:
            tree = nx.dfs_tree(graph, node)
            rest = tree.copy()
            rest.remove_node(node)
            found += [(node, tree), *subtrees(rest)]
    return found


def test_shares_are_of_the_rarer_latent_and_counting_in_pieces_changes_nothing(monkeypatch):
    fires = planted_firings()
    latents = entering(fires, FamilySettings())
    whole = edges(fires, latents, 0.05, 1e9)
    on = fires.toarray()
    for a, b, share in zip(*whole, strict=True):
        assert share == pytest.approx((on[:, a] & on[:, b]).sum() / (on[:, b].sum() + 1))
        assert on[:, a].sum() >= on[:, b].sum()
    assert len(whole.a) == len({*zip(whole.a.tolist(), whole.b.tolist(), strict=True)}) > 10
    monkeypatch.setattr(coactivation, "PRODUCTS", 50)
    for before, after in zip(whole, edges(fires, latents, 0.05, 1e9), strict=True):
        np.testing.assert_array_equal(before, after)


def test_pairs_that_chance_explains_are_left_out():
    rng = np.random.default_rng(1)
    alone = csr_matrix((rng.random((800, 150)) < 0.04).astype(np.int32))
    latents = entering(alone, FamilySettings())
    assert len(edges(alone, latents, 0.1, 1e9).a) > 500
    assert len(edges(alone, latents, 0.1, 0.05).a) == 0
    planted = planted_firings()
    whole = edges(planted, entering(planted, FamilySettings()), 0.1, 1e9)
    np.testing.assert_array_equal(edges(planted, entering(planted, FamilySettings()), 0.1, 0.05).a, whole.a)


def test_latents_that_fire_with_everything_or_hardly_ever_do_not_enter():
    fires = planted_firings()
    each = fires.getnnz(axis=0)
    got = entering(fires, FamilySettings(max_density=0.045, min_firings=50))
    assert set(got) == {i for i in range(20) if 50 <= each[i] < 540}
    assert 0 not in got


def test_what_a_family_holds_together_is_its_definition():
    fires = planted_firings()
    family = Family(parent=1, children=(6, 7, 8, 15), under=(1,) * 4, round=0)
    on = fires.toarray()
    each = on.sum(axis=0)
    shares = [(on[:, 1] & on[:, i]).sum() / each[i] for i in family.children]
    covered = (on[:, 1] & on[:, list(family.children)].any(axis=1)).sum() / each[1]
    among = [(on[:, i] & on[:, j]).sum() / min(each[i], each[j]) for i in family.children for j in family.children]
    above = [(on[:, 1] & on[:, i]).sum() / min(each[1], each[i]) for i in family.children]
    expected = (np.mean(shares), covered, np.mean(above) / np.mean(among))
    assert _held(fires.tocsc(), 1, family) == pytest.approx(expected)
    assert shares[-1] == 0
    assert 0.7 < covered < 1


def test_controls_know_nothing_of_the_families():
    fires = planted_firings()
    alone = independent(fires, np.random.default_rng(0))
    np.testing.assert_array_equal(alone.getnnz(axis=0), fires.getnnz(axis=0))
    assert alone.max() == 1
    settings = FamilySettings(rounds=0)
    trees = families(fires, settings)
    held = [_held(fires.tocsc(), tree.parent, tree) for tree in trees]
    found = {name: m.value for name, m in measured(fires, trees, held, settings, "all", 0).items()}
    assert (found["families.n"], found["control.independent.families.n"]) == (2, 0)
    assert found["families.together"] == 1.0
    assert found["families.coverage"] > 0.9
    assert found["control.stand_in.families.together"] < 0.3
    assert found["families.members"] == 14 / 20


def topk(W: torch.Tensor, k: int) -> TopKSAE:
    sae = TopKSAE(TopKConfig(d_in=W.shape[1], d_sae=len(W), k=k))
    with torch.no_grad():
        sae.W_dec.copy_(W)
        sae.W_enc.copy_(W.T)
    return sae


def test_families_of_a_dictionary_on_disk_with_how_latents_split(tmp_path):
    on = torch.from_numpy(planted_firings().toarray()).float()
    run = planted_run(tmp_path / "run", on[torch.randperm(len(on), generator=torch.Generator().manual_seed(0))])
    sae = topk(torch.eye(20), 6)
    sae.metadata = {"hook_name": HOOK}
    save_sae(sae, run.dictionary("a"))
    wide = topk(torch.cat([torch.eye(20), torch.eye(20)[:5]]), 6)
    save_sae(wide, run.dictionary("wide"))
    path = find_families(run.dictionary("a"), all_rows=True, against=run.dictionary("wide"))
    first = path.read_bytes()
    told = json.loads(first)
    tops = {family["parent"]: {child["latent"] for child in family["children"]} for family in told["families"]}
    assert tops[0] == set(range(1, 9))
    assert tops[10] == set(range(11, 15))
    assert told["splits"]["0"] == [[0, 1.0], [20, 1.0]]
    assert told["metrics"]["splits.several"]["value"] == 5 / 20
    assert told["metrics"]["control.random.splits.cosine"]["value"] < 0.8
    assert find_families(run.dictionary("a"), all_rows=True, against=run.dictionary("wide")).read_bytes() == first
    held_out = firings(sae, run.activations(HOOK), "held-out")
    assert 0 < held_out.shape[0] < firings(sae, run.activations(HOOK), "all").shape[0] / 5
    assert firings(sae, run.activations(HOOK), "all", n_rows=1000).shape == (1000, 20)
    with pytest.raises(InputError, match="lower --min-firings"):
        find_families(run.dictionary("a"), FamilySettings(min_firings=10**6))
    with pytest.raises(InputError, match="of the same hook"):
        splits(sae, topk(torch.eye(5), 2), "other")
