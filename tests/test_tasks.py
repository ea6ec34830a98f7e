"""Tasks beyond their notebook: parts weighed by `count` are the whole, ties by enumeration, several processes."""
import itertools, os, socket

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st

from kdnotes.tasks import Classification, Segmentation, _hits

quick = settings(deadline=None, derandomize=True, max_examples=40)


def weighed(task, outputs, batches):
    parts = [(task.loss(o, b), task.count(b)) for o, b in zip(outputs, batches)]
    return sum(n * L for L, n in parts) / sum(n for _, n in parts).clamp(min=1)


@quick
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 5), min_size=0, max_size=3), share=st.floats(0, 1), aux=st.booleans())
def test_segmentation_parts_weighed_by_count_are_the_whole(seed, cuts, share, aux):
    g = torch.Generator().manual_seed(seed)
    task, z = Segmentation(4), torch.randn(6, 4, 3, 4, generator=g, dtype=torch.float64).requires_grad_()
    mask = torch.randint(0, 4, (6, 6, 8), generator=g)
    mask[torch.rand(6, 6, 8, generator=g) < share * torch.rand(6, 1, 1, generator=g)] = 255       # unevenly ignored
    mask[seed % 6] = 255
    out = lambda x: {'out': x, 'aux': x.flip(1)} if aux else x
    pieces = lambda x: x.tensor_split(sorted(set(cuts)))
    whole = task.loss(out(z), {'mask': mask})
    parts = weighed(task, [out(x) for x in pieces(z)], [{'mask': m} for m in pieces(mask)])
    assert task.count({'mask': mask}) == (mask != 255).sum() and task.count({'mask': mask}).shape == ()
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    (a,), (b,) = torch.autograd.grad(parts, z), torch.autograd.grad(whole, z)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


@quick
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_classification_parts_weighed_by_count_are_the_whole(seed, cuts):
    g = torch.Generator().manual_seed(seed)
    task, z, label = Classification(5), torch.randn(7, 5, generator=g, dtype=torch.float64), torch.randint(0, 5, (7,), generator=g)
    pieces = lambda x: x.tensor_split(sorted(set(cuts)))
    parts = weighed(task, pieces(z), [{'label': y} for y in pieces(label)])
    torch.testing.assert_close(parts, task.loss(z, {'label': label}), rtol=1e-12, atol=0)
    assert task.count({'label': label}) == 7 and task.count({'label': label}).is_floating_point()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_scores_are_summed_in_float32(dtype):
    z, label = torch.randn(64, 10).to(dtype), torch.randint(0, 10, (64,))
    loss = Classification(10).loss(z, {'label': label})
    assert loss.dtype == torch.float32 and torch.equal(loss, Classification(10).loss(z.float(), {'label': label}))


@quick
@given(st.lists(st.integers(0, 2), min_size=2, max_size=5), st.integers(0, 4), st.integers(1, 5))
def test_a_tie_is_what_lots_give_on_average(scores, label, k):
    label %= len(scores)
    orders = list(itertools.permutations(range(len(scores))))       # every way to break ties: sort by (score, lot)
    won = sum(label in sorted(range(len(scores)), key=lambda c: (-scores[c], lots[c]))[:k] for lots in orders)
    found = _hits(torch.tensor([scores]).float(), torch.tensor([label]), k)
    torch.testing.assert_close(found, torch.tensor([won / len(orders)]))


@pytest.mark.parametrize('classes', [2, 3, 5, 100])
def test_a_network_that_knows_nothing_earns_what_chance_gives(classes):
    task, scores = Classification(classes), Classification(classes).scores()
    task.score(scores, torch.full((10, classes), .25, dtype=torch.bfloat16), {'label': torch.zeros(10, dtype=torch.int64)})
    found = task.results(scores)
    assert found == pytest.approx({'top1': 1 / classes, 'top5': min(1, 5 / classes)})


@pytest.mark.parametrize('classes', [3, 10])
@pytest.mark.parametrize('bad', [float('nan')])
def test_scores_that_are_no_numbers_earn_nothing(classes, bad):
    task = Classification(classes)
    z, scores = torch.zeros(4, classes), task.scores()
    z[:, 0] = bad
    task.score(scores, z, {'label': torch.zeros(4, dtype=torch.int64)})
    assert task.results(scores) == {'top1': 0., 'top5': 0.}


def _process(rank, port, out):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    task, (z, label) = Classification(6), _data()
    part = slice(0, 5) if rank == 0 else slice(5, None)              # 5 images and 8
    scores = task.scores()
    task.score(scores, z[part], {'label': label[part]})
    found = task.results(scores)
    if rank == 0: torch.save(found, out)
    torch.distributed.destroy_process_group()


def _data():
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 4, (13, 6), generator=g).float(), torch.randint(0, 6, (13,), generator=g)


def test_two_processes_score_as_one(tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(_process, (port, tmp_path / 'found'), nprocs=2)
    task, (z, label) = Classification(6), _data()
    scores = task.scores()
    task.score(scores, z, {'label': label})
    assert torch.load(tmp_path / 'found') == pytest.approx(task.results(scores), rel=1e-6)
