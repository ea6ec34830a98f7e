"""Tasks beyond their notebook: parts weighed by `count` are the whole, ties by enumeration, several processes."""
import itertools, os, socket, warnings

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from torchvision.ops import box_iou

from kdnotes.data.datasets import collate
from kdnotes.networks import faster_rcnn, retinanet, ssd, tiny_detector_student
from kdnotes.tasks import Classification, Depth, Detection, Segmentation, _hits

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


def agree(found, expected):
    "The same scores to 1e-6, None where None is expected."
    assert {k: v is None for k, v in found.items()} == {k: v is None for k, v in expected.items()}
    numbers = [k for k, v in expected.items() if v is not None]
    assert [found[k] for k in numbers] == pytest.approx([expected[k] for k in numbers], rel=1e-6, abs=1e-9), (found, expected)


# Depth.

@quick
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 5), min_size=0, max_size=3), share=st.floats(0, 1), bins=st.sampled_from([None, 2, 7]))
def test_depth_parts_weighed_by_count_are_the_whole(seed, cuts, share, bins):
    g = torch.Generator().manual_seed(seed)
    task = Depth(nearest=1, farthest=20, bins=bins)
    z = torch.randn(6, bins or 1, 3, 4, generator=g, dtype=torch.float64).requires_grad_()
    depth = 30 * torch.rand(6, 6, 8, generator=g, dtype=torch.float64)
    depth[torch.rand(6, 6, 8, generator=g) < share * torch.rand(6, 1, 1, generator=g)] = 0
    depth[seed % 6] = 0
    pieces = lambda x: x.tensor_split(sorted(set(cuts)))
    whole = task.loss(z, {'depth': depth})
    parts = weighed(task, pieces(z), [{'depth': d} for d in pieces(depth)])
    assert task.count({'depth': depth}) == (depth > 0).sum() and task.count({'depth': depth}).shape == ()
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    (a,), (b,) = torch.autograd.grad(parts, z), torch.autograd.grad(whole, z)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def measured(task, z, depth, cuts=()):
    scores = task.scores()
    for a, b in zip(z.tensor_split(cuts), depth.tensor_split(cuts)): task.score(scores, a, {'depth': b})
    return task.results(scores)


@quick
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 4), bins=st.sampled_from([None, 2, 7]), known=st.floats(0, 1))
def test_depth_scores_are_those_of_numpy(seed, cut, bins, known):
    g = torch.Generator().manual_seed(seed)
    task, z = Depth(nearest=1, farthest=20, bins=bins), torch.randn(5, bins or 1, 3, 4, generator=g)
    depth = 30 * torch.rand(5, 6, 8, generator=g)
    depth[torch.rand(5, 6, 8, generator=g) > known] = 0
    depth[seed % 5], depth[(seed + 1) % 5, 0, 0], depth[(seed + 1) % 5, 0, 1] = 0, torch.nan, torch.inf
    found, valid = measured(task, z, depth, (cut,)), (depth > 0) & (depth < torch.inf)
    if not valid.any(): assert found == dict.fromkeys(('abs_rel', 'rmse', 'log10', 'delta1', 'delta2', 'delta3')); return
    d, truth = (x[valid].double().numpy() for x in (task.predict(z, {'depth': depth}), depth))
    assert d.min() >= 1 - 1e-6 and d.max() <= 20 + 1e-5
    ratio = np.maximum(d / truth, truth / d)
    assert found == pytest.approx({
        'abs_rel': (np.abs(d - truth) / truth).mean(), 'rmse': np.sqrt(((d - truth) ** 2).mean()), 'log10': np.abs(np.log10(d / truth)).mean(),
        **{f'delta{k}': (ratio < 1.25 ** k).mean() for k in (1, 2, 3)}}, rel=1e-6)


def test_large_sums_keep_their_digits():
    task, z = Depth(nearest=1, farthest=100), torch.zeros(1, 1, 2, 2)
    depth = torch.full((1, 480, 640), 50.)
    scores = task.scores()
    for _ in range(700): task.score(scores, z, {'depth': depth[:, ::8, ::8] if _ else depth})
    assert task.results(scores) == pytest.approx({'abs_rel': 49 / 50, 'rmse': 49, 'log10': np.log10(50), 'delta1': 0, 'delta2': 0, 'delta3': 0}, rel=1e-6)


@pytest.mark.parametrize('bins', [None, 4])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_depth_is_computed_in_float32(dtype, bins):
    task, z, depth = Depth(nearest=1, farthest=20, bins=bins), torch.randn(2, bins or 1, 3, 4).to(dtype), 1 + 19 * torch.rand(2, 6, 8)
    for f in (task.loss, task.predict):
        assert f(z, {'depth': depth}).dtype == torch.float32 and torch.equal(f(z, {'depth': depth}), f(z.float(), {'depth': depth}))


@pytest.mark.parametrize('bins', [None, 4])
def test_depth_maps_of_other_images_are_refused(bins):
    task, z, depth = Depth(nearest=1, farthest=20, bins=bins), torch.randn(1, bins or 1, 3, 4), torch.ones(3, 3, 4)
    with pytest.raises(ValueError, match='maps of 1 images, but depth or images of 3'): task.predict(z, {'depth': depth})
    with pytest.raises(ValueError, match='1.*3'): task.loss(z, {'depth': depth})


@pytest.mark.parametrize('bins', [2, 5, 255])
def test_the_ends_of_the_range_are_inside(bins):
    task, ends = Depth(nearest=1, farthest=60, bins=bins), torch.tensor([[[.01, 1, 60, 600]]])
    assert task.labels({'depth': ends}).tolist() == [[[0, 0, bins - 1, bins - 1]]]
    regression = Depth(nearest=1, farthest=60)
    assert regression.predict(ends.log()[None], {'depth': ends}).tolist() == [[[1, 1, pytest.approx(60), 60]]]
    assert regression.loss(ends.log()[None], {'depth': ends}) == 0 and regression.count({'depth': ends}) == 4


@quick
@given(bins=st.integers(2, 255), nearest=st.floats(.1, 5), factor=st.floats(1.5, 100), seed=st.integers(0, 10**6))
def test_a_bin_is_what_its_edges_say(bins, nearest, factor, seed):
    task = Depth(nearest=nearest, farthest=nearest * factor, bins=bins)
    depth = nearest * factor ** (1.4 * torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - .2)
    ids = task.labels({'depth': depth})
    position = bins * (depth / nearest).log() / np.log(factor)
    on_edge = (position - position.round()).abs() < 1e-6
    assert ids.dtype == torch.int64 and torch.equal(ids[~on_edge], position.floor().clamp(0, bins - 1).long()[~on_edge])
    middle = nearest * factor ** ((torch.arange(bins) + .5) / bins)
    sure = task.predict(100. * torch.eye(bins)[None, :, :, None] * bins, {'image': torch.zeros(1, 3, bins, 1)})
    torch.testing.assert_close(sure[0, :, 0], middle.float())


# Detection.

class Says:
    "A detector's output written by hand."
    def __init__(self, found): self.found = found
    def detections(self): return self.found
    def losses(self, boxes, labels): raise NotImplementedError
    logits = losses


def drawn(seed, images, classes, whole=False):
    "Truth and detections by lot, some images without either; `whole`: few whole numbers, so that overlaps and scores are tied."
    g = torch.Generator().manual_seed(seed)
    def boxes(n, scored):
        corner, size = (20 * torch.rand(n, 2, generator=g), 2 + 10 * torch.rand(n, 2, generator=g))
        if whole: corner, size = (corner / 4).round(), (size / 2).round()
        labels, scores = torch.randint(0, classes, (n,), generator=g), torch.rand(n, generator=g)
        return {'boxes': torch.cat([corner, corner + size], 1), 'labels': labels} | ({'scores': (4 * scores).round() / 4 if whole else scores} if scored else {})
    many = lambda: int(torch.randint(0, 7, (), generator=g))
    truth, found = [boxes(many(), False) for _ in range(images)], []
    for t in truth:
        f, again = boxes(many(), True), boxes(len(t['labels']), True)
        shift = (0 if whole else .4) * torch.randn(t['boxes'].shape, generator=g).clamp(-2, 2)             # sides are 2 or more
        again['boxes'], again['labels'] = t['boxes'] + shift, t['labels']
        found.append({k: torch.cat([f[k], again[k]]) for k in f})
    return truth, found


def batch_of(truth): return collate([{'image': torch.zeros(3, 1, 1), **t} for t in truth])

def detected(task, found, truth, parts=1):
    scores = task.scores()
    for rows in np.array_split(range(len(truth)), min(parts, len(truth))):
        task.score(scores, Says([found[i] for i in rows]), batch_of([truth[i] for i in rows]))
    return task.results(scores)


def average_precision(found, truth, c, t):
    "COCO's definition; of equal overlaps the last box is taken, as pycocotools does."
    hits, sure, n = [], [], 0
    for f, g in zip(found, truth):
        own = f['labels'] == c
        best = f['scores'][own].argsort(descending=True, stable=True)[:100]
        overlap = box_iou(f['boxes'][own][best].double(), g['boxes'][g['labels'] == c].double())
        n, sure = n + overlap.shape[1], sure + f['scores'][own][best].tolist()
        for row in overlap:
            hits.append(len(row) > 0 and float(row.max()) >= t)
            if hits[-1]: overlap[:, len(row) - 1 - int(row.flip(0).argmax())] = 0
    if not n: return None
    right = np.cumsum(np.array(hits, dtype=float)[np.argsort(-np.array(sure), kind='stable')])
    precision, recall = right / np.arange(1, len(right) + 1), right / n
    return np.mean([max(precision[recall >= r], default=0.) for r in np.linspace(0, 1, 101)])


@settings(quick, max_examples=25)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 6), classes=st.integers(1, 4), whole=st.booleans(), parts=st.integers(1, 3))
def test_average_precision_is_cocos_definition(seed, images, classes, whole, parts):
    truth, found = drawn(seed, images, classes, whole)
    task = Detection(classes + 1)                                       # the last one has no box
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        results = detected(task, found, truth, parts)
    each = [[average_precision(found, truth, c, t) for t in np.linspace(.5, .95, 10)] for c in range(classes + 1)]
    there = [aps for aps in each if aps[0] is not None]
    mean = lambda x: float(np.mean(x)) if there else None
    expected = {'map': mean(there), 'map50': mean([a[0] for a in there]), 'map75': mean([a[5] for a in there]),
                **{f'map/class {c}': None if aps[0] is None else float(np.mean(aps)) for c, aps in enumerate(each)}}
    agree(results, expected)


NAN, INF = float('nan'), float('inf')

@pytest.mark.parametrize('box,score', [([NAN] * 4, .9), ([0, 0, NAN, 10], .1), ([0, 0, INF, INF], .9), ([0, 0, 10, 10], NAN), ([0, 0, 10, 10], INF), ([NAN] * 4, NAN)])
def test_detections_that_are_no_numbers_earn_nothing(box, score):
    truth = {'boxes': torch.tensor([[0., 0, 10, 10]]), 'labels': torch.tensor([0])}
    broken = {'boxes': torch.tensor([box]).float(), 'labels': torch.tensor([0]), 'scores': torch.tensor([score])}
    found = {'boxes': torch.cat([broken['boxes'], truth['boxes']]), 'labels': torch.tensor([0, 0]), 'scores': torch.tensor([score, .9])}
    assert detected(Detection(1), [broken], [truth])['map'] == 0
    assert detected(Detection(1), [found], [truth])['map'] == pytest.approx(.5)                        # it comes first


@pytest.mark.filterwarnings('ignore:The ``compute`` method')
def test_without_images_there_are_no_detection_or_depth_scores():
    for task in (Detection(2), Depth(nearest=1, farthest=9)): assert set(task.results(task.scores()).values()) == {None}


@pytest.mark.parametrize('box', [[0., 0, INF, 10], [0, NAN, 10, 10], [5, 5, 5, 9], [9, 0, 5, 5]])
def test_true_boxes_are_boxes(box):
    with pytest.raises(ValueError, match='expected finite x1 < x2 and y1 < y2'):
        detected(Detection(1), [{'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0).long(), 'scores': torch.zeros(0)}],
                 [{'boxes': torch.tensor([box]), 'labels': torch.tensor([0])}])


@pytest.mark.parametrize('kind', [torch.int64, torch.float16, torch.float64])
def test_boxes_of_any_number_type_are_scored(kind):
    boxes, labels = torch.tensor([[0, 0, 10, 10], [20, 4, 40, 8]], dtype=kind), torch.tensor([0, 1])
    found = {'boxes': boxes, 'labels': labels, 'scores': torch.tensor([.5, .25], dtype=kind if kind.is_floating_point else torch.float32)}
    assert detected(Detection(2), [found], [{'boxes': boxes, 'labels': labels}])['map'] == 1


def test_scoring_says_nothing(capfd):
    truth, found = drawn(0, 3, 2)
    found[0] = {k: v.repeat(60, 1) if v.ndim == 2 else v.repeat(60) for k, v in found[0].items()}    # more than 100
    detected(Detection(2), found, truth)
    assert capfd.readouterr() == ('', '')


def detectors():
    body = lambda: tiny_detector_student(3).net.backbone.body
    torch.manual_seed(0)
    return {'retinanet': retinanet(body(), num_classes=3, channels=32, extra=None, convs=1), 'fcos': tiny_detector_student(3),
            'ssd': ssd(body(), num_classes=3, extra=(32, 32)), 'faster_rcnn': faster_rcnn(body(), num_classes=3, channels=32, hidden=64)}


@pytest.mark.parametrize('name', ['retinanet', 'fcos', 'ssd', 'faster_rcnn'])
def test_fillers_do_not_count_and_images_without_boxes_are_finite(name):
    net, task, image = detectors()[name].eval(), Detection(3), torch.rand(2, 3, 64, 96)
    batch = {'image': image, 'boxes': torch.tensor([[[4., 4, 30, 40], [0, 0, 0, 0]], [[10, 10, 20, 50], [40, 8, 90, 60]]]), 'labels': torch.tensor([[0, -1], [2, 1]])}
    def loss(batch):
        torch.manual_seed(0)                                            # Faster R-CNN draws samples
        return task.loss(net(batch['image']), batch)
    whole = loss(batch)
    wider = {'image': image, 'boxes': torch.nn.functional.pad(batch['boxes'], (0, 0, 0, 3), value=-7), 'labels': torch.nn.functional.pad(batch['labels'], (0, 3), value=-1)}
    assert torch.equal(loss(wider), whole) and whole.shape == () and task.count(batch) == 2
    for none in ({**batch, 'labels': batch['labels'] * 0 - 1}, {**batch, 'boxes': batch['boxes'][:, :0], 'labels': batch['labels'][:, :0]}):
        nothing = loss(none)
        nothing.backward()
        assert nothing.isfinite() and nothing >= 0 and all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
        assert any(p.grad.any() for p in net.parameters() if p.grad is not None) == (name != 'ssd')    # it picks negatives by the positives
        net.zero_grad()


@settings(quick, max_examples=5)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 4))
def test_retinanet_is_a_mean_over_images(seed, cut):
    truth, _ = drawn(seed, 5, 3)
    net, task, batch = detectors()['retinanet'].eval().double(), Detection(3), batch_of([{k: v * 4 if k == 'boxes' else v for k, v in t.items()} for t in truth])
    batch['image'] = torch.rand(5, 3, 64, 96, dtype=torch.float64)
    parts = [{k: v[part] for k, v in batch.items()} for part in (slice(0, cut), slice(cut, 5))]
    of = lambda b: net(b['image'])
    torch.testing.assert_close(weighed(task, map(of, parts), parts), task.loss(of(batch), batch), rtol=1e-10, atol=0)


# Several processes.

def _scored(task, outputs, batches):
    scores = task.scores()
    for output, batch in zip(outputs, batches): task.score(scores, output, batch)
    return task.results(scores)

def _some(rows):
    "Name -> results over these images, of what all processes know."
    (z, label), detected = _data(), {}
    for name, whole in (('detection', False), ('detection, tied', True)):
        truth, found = drawn(3, 13, 3, whole)
        detected[name] = _scored(Detection(4), [Says([found[i]]) for i in rows], [batch_of([truth[i]]) for i in rows])
    g = torch.Generator().manual_seed(1)
    maps, depth = torch.randn(13, 1, 3, 4, generator=g), 20 * torch.rand(13, 6, 8, generator=g)
    depth[[0, 4]] = 0
    each = lambda f: [f(i) for i in rows]
    return {**detected, 'classification': _scored(Classification(6), each(lambda i: z[i:i + 1]), each(lambda i: {'label': label[i:i + 1]})),
            'depth': _scored(Depth(nearest=1, farthest=20), each(lambda i: maps[i:i + 1]), each(lambda i: {'depth': depth[i:i + 1]}))}

SPLITS = {'dealt in turn': (range(0, 13, 2), range(1, 13, 2)), 'in a row': (range(5), range(5, 13)), 'one has nothing': (range(13), range(0))}

def _process(rank, port, out):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    warnings.filterwarnings('ignore', message='The ``compute`` method')      # of a process without images
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    torch.save({split: _some(parts[rank]) for split, parts in SPLITS.items()}, f'{out}{rank}')
    torch.distributed.destroy_process_group()


def _data():
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 4, (13, 6), generator=g).float(), torch.randint(0, 6, (13,), generator=g)


def test_two_processes_score_as_one(tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(_process, (port, tmp_path / 'found'), nprocs=2)
    alone, found = _some(range(13)), [torch.load(tmp_path / f'found{rank}') for rank in range(2)]
    assert alone['detection']['map/class 3'] is None and alone['detection']['map'] > 0
    assert found[0] == found[1] and list(found[0]) == list(SPLITS)
    in_a_row = found[0]['in a row'].pop('detection, tied')
    for there in found[0].values():
        for task, results in there.items(): agree(results, alone[task])
    assert in_a_row['map'] != alone['detection, tied']['map']               # ties want the images in their order
