"""Each kernel equals its plain twin: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

from tests.interpreter import DEVICE

pytest.importorskip("triton")

from sae import jump as plain_jump  # noqa: E402
from sae import kernels, sparse  # noqa: E402
from sae.dense import FLOAT8, LARGEST, SCALE, product, to_float8  # noqa: E402
from sae.kernels import adam, codes, jump, select  # noqa: E402
from sae.select import topk, topk_dense  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def topk_reference(pre, k, signed):
    """Dense form of the k largest, lowest index first among equals."""
    key = pre.float().abs() if signed else pre.float().relu()
    chosen = key.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(key).scatter_(1, chosen, 1.0) * (key > 0)
    return torch.where(kept > 0, pre.float(), 0.0)


def check_topk(pre, k, signed):
    values, indices = select.topk(pre, k, signed)
    expected = topk_reference(pre, k, signed)
    assert torch.equal(sparse.to_dense(values, indices, pre.shape[1]), expected)
    used = values != 0
    assert torch.equal(used.sum(dim=1), (expected != 0).sum(dim=1))
    places = torch.arange(k, device=DEVICE)
    assert torch.equal(used, places < used.sum(dim=1, keepdim=True)), "unused places come last"
    assert torch.equal(indices[~used], torch.zeros_like(indices[~used]))
    ascending = torch.where(used, indices, pre.shape[1] + places)
    assert (ascending.diff(dim=1) > 0).all()
    return values, indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("n", "d_sae", "k"), [(5, 1000, 7), (3, 64, 64), (2, 17, 3), (2, 9216, 32), (1, 3000, 300)])
def test_topk_chooses_the_largest_and_the_lowest_index_of_equals(n, d_sae, k, signed, dtype):
    check_topk(random(n, d_sae, dtype=dtype), k, signed)


@pytest.mark.parametrize("signed", [False, True])
def test_topk_is_the_twin_with_and_without_ties(signed):
    for pre in (random(6, 500), random(6, 500).mul_(2).round_()):
        values, indices = select.topk(pre, 9, signed)
        expected_values, expected_indices = topk(pre.cpu(), 9, signed)
        assert torch.equal(values.cpu(), expected_values)
        used = expected_values != 0
        assert torch.equal(indices.cpu()[used], expected_indices[used])
        columns, real = torch.randperm(500)[:200], torch.rand(200) < 0.8
        dense = select.topk_dense(pre, 9, signed, columns.to(DEVICE), real.to(DEVICE))
        assert torch.equal(dense.cpu(), topk_dense(pre.cpu(), 9, signed, columns, real))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
def test_topk_of_rows_that_defeat_the_short_way(signed, dtype):
    pre = random(9, 3000, dtype=dtype)
    pre[0] = 0.0
    pre[1] = -1.0
    pre[2] = 1.0  # one tie over the whole row, more than are kept apart
    pre[3, 1000:2000] = 5.0
    pre[4, 512:1536] += 100.0  # all the large ones side by side
    pre[5] = -pre[5].abs()
    pre[5, 77] = 2.0
    pre[6] = torch.where(pre[6] > 0, 0.5, -0.5)
    pre[7] *= 1e-38
    pre[8, ::2] = -0.0
    check_topk(pre, 20, signed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_shows_what_is_not_finite_and_stays_in_bounds(dtype):
    pre = random(4, 2000, dtype=dtype)
    pre[0, 5] = float("nan")
    pre[1, 7] = float("inf")
    pre[2] = float("nan")
    pre[3] = float("-inf")
    for signed in (False, True):
        values, indices = select.topk(pre, 12, signed)
        assert ((indices >= 0) & (indices < 2000)).all()
        assert values[0].isnan().sum() == 1
        assert values[1].isinf().sum() == 1
        assert values[2].isnan().all()
        assert torch.equal(values[3].isinf(), torch.full((12,), signed, device=DEVICE))


def test_topk_of_no_rows():
    values, indices = select.topk(random(0, 40), 3)
    assert values.shape == indices.shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("whole_row", [16_384, 512])
def test_dense_keeps_what_reaches_the_kth_largest(whole_row, signed, dtype, monkeypatch):
    monkeypatch.setattr(select, "WHOLE_ROW", whole_row)
    pre = random(7, 1300, dtype=dtype)
    pre[1] = -1.0
    pre[2] = 1.0
    pre[3] = 0.0
    pre[3, 4] = 2.0
    key = pre.float().abs() if signed else pre.float().relu()
    expected = key.topk(100, dim=1).values[:, -1]
    columns = torch.arange(1300, device=DEVICE)
    dense = select.topk_dense(pre, 100, signed, columns, columns >= 0)
    assert dense.dtype == dtype
    assert torch.equal(dense.float(), torch.where((key >= expected[:, None]) & (key > 0), pre.float(), 0.0))


def some_codes(n, k, d_sae):
    values = random(n, k)
    values[torch.rand_like(values) < 0.2] = 0.0
    indices = torch.rand(n, d_sae, device=DEVICE).argsort(dim=1)[:, :k]
    indices[:, 0] = 2  # a latent that fires everywhere
    return values, torch.where(values == 0, 0, indices)


SIZES = [(37, 6, 50, 12), (12, 17, 40, 200), (70, 3, 9, 65)]


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("n", "k", "d_sae", "d"), SIZES)
def test_decode_is_the_sparse_product(n, k, d_sae, d, dtype):
    values, indices = some_codes(n, k, d_sae)
    W = random(d_sae, d, dtype=dtype)
    expected = sparse.decode(values.cpu(), indices.cpu(), W.float().cpu())
    torch.testing.assert_close(codes.decode(values, indices, W).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("span", [64, 128, None])
@pytest.mark.parametrize(("n", "k", "d_sae", "d"), SIZES)
def test_dots_are_the_chosen_entries_of_the_product(n, k, d_sae, d, span, dtype, monkeypatch):
    monkeypatch.setattr(codes, "DOTS_SPAN", span)
    values, indices = some_codes(n, k, d_sae)
    W, g = random(d_sae, d, dtype=dtype), random(n, d, dtype=dtype)
    expected = torch.einsum("nd,nkd->nk", g.float(), W.float()[indices])
    torch.testing.assert_close(codes.dots(g, W, indices), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(codes.dots(g, W, indices, values), expected * (values != 0), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("d_sae", [50, 65_536, 70_000])
def test_entries_are_sorted_by_latent_and_unused_ones_spread(d_sae):
    values, indices = random(40, 8), torch.randint(d_sae, (40, 8), device=DEVICE)
    values[:, 5:], indices[:, 5:] = 0.0, 0
    indices[0, 0], indices[1, 1] = d_sae - 1, 0
    order, starts = codes.by_latent(indices, d_sae)
    assert torch.equal(order, indices.flatten().argsort(stable=True))
    assert torch.equal(starts.diff(), torch.bincount(indices.flatten(), minlength=d_sae))
    order, starts = codes.by_latent(indices, d_sae, values)
    assert torch.equal(order.sort().values, torch.arange(320, device=DEVICE))
    for i in (0, 1, d_sae - 1):
        entries = order[starts[i] : starts[i + 1]]
        used = entries[values.flatten()[entries] != 0]
        expected = ((indices.flatten() == i) & (values.flatten() != 0)).nonzero()[:, 0]
        assert torch.equal(used, expected)
    assert starts.diff().max() < 120


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("segment", [8, 128])
@pytest.mark.parametrize(("n", "k", "d_sae", "d"), SIZES)
def test_rows_are_the_transposed_product(n, k, d_sae, d, segment, dtype, monkeypatch):
    monkeypatch.setattr(codes, "SEGMENT", segment)
    values, indices = some_codes(n, k, d_sae)
    y = random(n, d, dtype=dtype)
    dense = sparse.to_dense(values, indices, d_sae)
    order, starts = codes.by_latent(indices, d_sae)
    out, sums = codes.rows(values, order, starts, y)
    torch.testing.assert_close(out, dense.T @ y.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums, dense.sum(dim=0), atol=1e-5, rtol=1e-5)

    order, starts = codes.by_latent(indices, d_sae, values)
    out, sums = codes.rows(values, order, starts, y)
    torch.testing.assert_close(out, dense.T @ y.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums, dense.sum(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("segment", [8, 128])
def test_products_with_a_flat_table_are_their_twins(segment, monkeypatch):
    """Rows, and bags within rows, of 0 to 40 places; entries behind the last bag have value 0."""
    monkeypatch.setattr(codes, "SEGMENT", segment)
    lengths = torch.tensor([0, 3, 40, 0, 1, 17, 0, 2])
    n_entries, filler, d_sae, d = int(lengths.sum()), 5, 23, 70
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(DEVICE)
    bag = torch.arange(8).repeat_interleave(lengths)
    bag = torch.cat([bag, torch.zeros(filler, dtype=torch.long)]).to(DEVICE)
    values, indices = random(n_entries + filler, 1), torch.randint(d_sae, (n_entries + filler, 1), device=DEVICE)
    values[n_entries:] = 0
    W, y, g = random(d_sae, d), random(8, d), random(8, d)
    plain = [x.cpu()[:n_entries] for x in (values, indices, bag)]
    torch.testing.assert_close(
        codes.decode(values, indices, W, starts).cpu(), sparse.decode(*plain[:2], W.cpu(), starts.cpu())
    )
    made = codes.dots(g, W, indices, values, starts).cpu()
    expected = sparse.dots(g.cpu(), W.cpu(), plain[1], plain[0], starts.cpu())
    torch.testing.assert_close(made[:n_entries], expected, atol=1e-4, rtol=1e-5)
    assert (made[n_entries:] == 0).all()
    out, sums = codes.rows(values, *codes.by_latent(indices, d_sae, values), y, bag)
    expected_out, expected_sums = sparse.rows(plain[0], *sparse.by_latent(plain[1], d_sae, plain[0]), y.cpu(), plain[2])
    torch.testing.assert_close(out.cpu(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.cpu(), expected_sums, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(("d_sae", "d"), [(11, 7), (5, 576), (3, 2500)])
def test_adam_steps_as_torch_does(d_sae, d, unit):
    w = random(d_sae, d)
    if unit:
        w /= w.norm(dim=1, keepdim=True)
    parameter = torch.nn.Parameter(w.clone())
    m, v, low = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    for t in range(1, 4):
        g = random(d_sae, d)
        projected = g - (g * w).sum(dim=1, keepdim=True) * w if unit else g
        torch.testing.assert_close(adam.squares(g), g.square().sum())
        parameter.grad = projected * 0.5
        optimizer.step()
        if unit:
            parameter.data.div_(parameter.data.norm(dim=1, keepdim=True))
        hyper = torch.tensor([0.01, 1 - 0.9**t, 1 - 0.99**t, 0.5], device=DEVICE)
        adam.adam_rows(w, g, m, v, low, hyper, (0.9, 0.99), 1e-8, unit)
        torch.testing.assert_close(w, parameter.data)
        torch.testing.assert_close(low.float(), w, atol=0.0, rtol=1 / 128)  # the interpreter rounds towards 0
    torch.testing.assert_close(m, optimizer.state[parameter]["exp_avg"])
    torch.testing.assert_close(v, optimizer.state[parameter]["exp_avg_sq"])


def test_adam_writes_the_encoder_in_eight_bits():
    w = random(20, 300) * torch.tensor([0.02, 5.0], device=DEVICE).repeat(150)  # 448 / 64 is the largest that fits
    m, v, low = torch.zeros_like(w), torch.zeros_like(w), torch.empty_like(w, dtype=FLOAT8)
    hyper = torch.tensor([1e-3, 0.1, 0.001, 1.0], device=DEVICE)
    adam.adam_rows(w, random(20, 300), m, v, low, hyper, (0.9, 0.999), 1e-8, unit=False)
    expected = to_float8(w, SCALE).float()
    assert (w.abs() > LARGEST / SCALE).any()
    assert (expected.abs() <= LARGEST).all()
    if DEVICE == "cuda":
        assert torch.equal(low.float(), expected)
    else:  # the interpreter's rounding to eight bits loses a carry now and then
        near = torch.isclose(low.float(), expected, atol=2**-7, rtol=1 / 8)
        assert near.float().mean() > 0.97


def test_adam_without_a_copy_in_low_precision():
    w, m, v = torch.ones(4, 3, device=DEVICE), torch.zeros(4, 3, device=DEVICE), torch.zeros(4, 3, device=DEVICE)
    hyper = torch.tensor([0.1, 0.1, 0.001, 1.0], device=DEVICE)
    adam.adam_rows(w, torch.ones_like(w), m, v, None, hyper, (0.9, 0.999), 1e-8, unit=False)
    torch.testing.assert_close(w, torch.full_like(w, 0.9))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("n", "d_sae"), [(37, 300), (130, 600), (3, 5)])
def test_jumprelu_and_its_gradients_are_the_plain_ones(n, d_sae, dtype):
    pre, bound, dz = random(n, d_sae, dtype=dtype), random(d_sae).abs(), random(n, d_sae, dtype=dtype)
    weight = torch.tensor(0.3, device=DEVICE)
    z, on = plain_jump.jump(pre.float().cpu(), bound.cpu())
    plain = plain_jump.jump_backward(pre.float().cpu(), bound.cpu(), dz.float().cpu(), weight.cpu(), 0.7)

    got, count = jump.jump(pre, bound)
    assert got.dtype == dtype
    assert torch.equal(got.float().cpu(), z)
    assert torch.equal(count.cpu(), on)
    dp, db, dt = jump.jump_backward(pre, bound, dz, weight, 0.7)
    assert dp is dz
    torch.testing.assert_close(dp.cpu(), plain[0].to(dtype))
    torch.testing.assert_close(db.cpu(), plain[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dt.cpu(), plain[2], atol=1e-4, rtol=1e-4)


def test_the_same_input_gives_the_same_bytes():
    values, indices = some_codes(60, 6, 12)
    y = random(60, 70)
    order, starts = codes.by_latent(indices, 12)
    first = codes.rows(values, order, starts, y)[0]
    assert all(torch.equal(codes.rows(values, order, starts, y)[0], first) for _ in range(3))


def test_kernels_are_for_gpus_only():
    assert not kernels.available(torch.zeros(1))
    assert kernels.available(torch.zeros(1, device=DEVICE)) == (DEVICE == "cuda")


def test_the_product_in_eight_bits_is_near_the_product():
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no products in eight bits")
    x, w, bias = random(48, 256).bfloat16(), random(160, 256) / 16, random(160).bfloat16()
    exact = x.float() @ w.T + bias
    made = product(x, to_float8(w, SCALE), bias)
    assert made.dtype == torch.bfloat16
    # Entries are rounded to 1 / 16 at worst, 1 / 40 in the middle, and the sum of 256 such errors is random.
    assert ((made - exact).norm() / exact.norm()).item() < 0.06
    x[3] = 1e4  # too large for eight bits: it counts as 448, and nothing else changes
    again = product(x, to_float8(w, SCALE), bias)
    assert torch.isfinite(again).all()
    rest = torch.arange(len(x), device=DEVICE) != 3
    assert torch.equal(again[rest], made[rest])
