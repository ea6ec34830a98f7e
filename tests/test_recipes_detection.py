"Detection recipes: every method makes two steps on tiny data in the official layout; what was published; what is refused."
import json, math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest, torch
from PIL import Image

from kdnotes.data.datasets import BCCD_CLASSES, COCO_IDS
from kdnotes.distiller import Term
from kdnotes.loop import evaluate, fit
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.losses.local_affinity import LocalAffinity
from kdnotes.losses.pair_wise import PairWise
from kdnotes.recipes import RECIPES, bccd, describe, detector_methods, on_levels, scenes_detection

NAMES = ['scenes-detection', 'bccd', 'skd-coco-fcos-mobilenetv2', 'cwd-coco-retinanet-r50']
METHODS = {'scenes-detection': ['none', 'channel_wise', 'pixel_wise', 'pair_wise', 'skd'], 'bccd': ['none', 'channel_wise', 'pair_wise'],
           'skd-coco-fcos-mobilenetv2': ['none', 'pixel_wise', 'pair_wise', 'skd'], 'cwd-coco-retinanet-r50': ['none', 'channel_wise']}


# tiny data, as the sets are delivered

def draw_boxes(file, seed, classes, size=(64, 96)):
    "A picture of noise with three bright boxes -> rows (x0, y0, x1, y1), labels."
    draw = np.random.default_rng(seed)
    pixels, rows = draw.integers(0, 128, (*size, 3), np.uint8), []
    for _ in range(3):
        x, y, w, h = (int(v) for v in (draw.integers(0, size[1] - 40), draw.integers(0, size[0] - 40), *draw.integers(16, 40, 2)))
        pixels[y:y + h, x:x + w] += 120
        rows.append([x, y, x + w, y + h])
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return rows, [int(v) for v in draw.choice(classes, 3)]


def write_coco(root):
    for split, n in (('train', 3), ('val', 1)):
        images, notes = [], []
        for i in range(n + 1):
            name = f'{i:012d}.jpg'
            rows, ids = draw_boxes(root / f'coco/{split}2017/{name}', i, list(COCO_IDS))
            images.append({'id': i, 'file_name': name, 'height': 64, 'width': 96})
            if i == n: continue                                                    # a picture without things, as COCO has
            notes += [{'id': len(notes) + k, 'image_id': i, 'category_id': c, 'bbox': [x0, y0, x1 - x0, y1 - y0], 'area': 1, 'iscrowd': 0}
                      for k, ((x0, y0, x1, y1), c) in enumerate(zip(rows, ids))]
        file = root / f'coco/annotations/instances_{split}2017.json'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({'images': images, 'annotations': notes, 'categories': [{'id': i, 'name': name} for i, name in COCO_IDS.items()]}))


def write_bccd(root):
    for split, n in (('train', 10), ('val', 2)):
        images = []
        for i in range(n):
            name = f'images/{split}/BloodImage_{i:05d}.jpg'
            boxes, labels = draw_boxes(root / 'bccd' / name, i, range(3))
            images.append({'file': name, 'width': 96, 'height': 64, 'boxes': boxes, 'labels': labels})
        (root / f'bccd/{split}.json').write_text(json.dumps({'classes': list(BCCD_CLASSES), 'images': images}))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('boxes')
    write_coco(folder); write_bccd(folder)
    return folder


def small(name):
    "The recipe itself, but for the size of its data and the length of its budget."
    recipe = RECIPES[name]
    cut = {'scenes-detection': dict(labelled=4, teacher=4, valid=2), 'bccd': dict(every=2, size=(64, 96))}.get(name, dict(crop=64))
    return replace(recipe, data=partial(recipe.data, **cut), budget=replace(recipe.budget, steps=2, batch_size=2, workers=0, eval_batch=1))


def prints(net): return {k: float(v.double().sum()) for k, v in net.state_dict().items()}


@pytest.mark.parametrize('name', NAMES)
def test_every_method_makes_two_steps(name, root):
    recipe = small(name)
    splits = recipe.data(root)
    torch.manual_seed(0)
    teacher = recipe.teacher().eval()
    before = prints(teacher)
    assert list(recipe.methods) == METHODS[name]
    for method, terms in recipe.methods.items():
        torch.manual_seed(0)
        distiller = recipe.distiller(method, teacher if terms else None)
        start = prints(distiller.student)
        history = fit(distiller, splits.train, splits.valid if method == 'none' else None, budget=recipe.budget, progress=False)
        weights = {'task': 1., **{t.name: t.weight for t in terms}}
        for row in history.steps:
            assert set(row) == {'step', 'lr', 'loss', *weights} and all(map(math.isfinite, row.values())), (method, row)
            assert row['loss'] == pytest.approx(sum(w * row[k] for k, w in weights.items()), rel=1e-4, abs=1e-6), method
        moved = prints(distiller.student)
        assert any(moved[k] != start[k] for k in moved), method
        if terms: assert all(distiller.terms[i].name == t.name for i, t in enumerate(terms))
        if method == 'none': assert 0 <= history.metrics[-1]['map'] <= 1
    assert prints(teacher) == before and not any(p.requires_grad for p in teacher.parameters())


def test_each_level_is_a_term_of_its_own():
    terms = on_levels(partial(ChannelWise, temperature=2.), 3., 5)
    assert [t.name for t in terms] == [f'channel_wise_{i}' for i in range(5)] and [t.at for t in terms] == [f'net.backbone.levels.{i}' for i in range(5)]
    assert len({id(t.loss) for t in terms}) == 5 and {t.weight for t in terms} == {3.} and {t.loss.temperature for t in terms} == {2.}
    assert [t.name for t in detector_methods()['skd']] == ['pixel_wise', 'pair_wise_0', 'pair_wise_1', 'pair_wise_2']


def test_what_was_published_stands_in_the_recipes():
    skd, cwd = (RECIPES[n] for n in NAMES[2:])
    assert [t.weight for t in skd.methods['skd']] == [10.] * 6 and [t.weight for t in cwd.methods['channel_wise']] == [10.] * 5
    assert {t.loss.granularity for t in skd.methods['pair_wise']} == {(1, 1)} and {t.loss.temperature for t in cwd.methods['channel_wise']} == {1.}
    assert skd.student.keywords['channels'] == 128
    for recipe in (skd, cwd):
        budget = recipe.budget
        assert (budget.steps, budget.batch_size, budget.lr, budget.weight_decay, budget.milestones) == (90_000, 16, .01, 1e-4, (60_000, 80_000))
        assert budget == recipe.teacher_budget and 'found in no source' in recipe.about and 'remembered' in recipe.about


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_is_a_page(name):
    recipe = RECIPES[name]
    for page in (repr(recipe), recipe._repr_markdown_()):
        assert ' at 0x' not in page and len(page) < 5000 and page.endswith(recipe.about)
        for word in (name, f'steps={recipe.budget.steps}', recipe.student.func.__name__, *recipe.methods): assert word in page
    assert json.dumps(describe(recipe))


def test_the_embedded_pair_is_small_and_begins_with_boxes_of_some_size():
    recipe = RECIPES['scenes-detection']
    for build in (recipe.teacher, recipe.student):
        net = build()
        assert sum(p.numel() for p in net.parameters()) <= 500_000
        assert (net.net.head.regression_head.bbox_reg.bias == 1).all()
    assert (recipe.student().net.head.regression_head.bbox_reg.bias.grad is None) and recipe.budget.channels_last


def test_pictures_to_tune_on_are_in_no_other_part(root):
    def files(part):
        raw = part.dataset
        return {tuple(np.asarray(raw[i]['image'], dtype=np.int64).sum((1, 2)).tolist()) for i in range(len(raw))}
    final, tuning = (RECIPES['bccd'].data(root, every=2, size=(64, 96), tuning=t) for t in (False, True))
    assert [len(p) for p in final] == [4, 2, 8] and [len(p) for p in tuning] == [4, 2, 8]
    assert files(final.train) < files(final.teacher_train) == files(tuning.teacher_train)
    assert not files(tuning.valid) & files(tuning.teacher_train) and not files(final.valid) & files(tuning.valid)


@pytest.mark.parametrize('name', NAMES[1:])
def test_missing_data_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match='coco' if 'coco' in name else 'bccd'): RECIPES[name].data(tmp_path)


def test_adapters_where_channels_differ(root):
    recipe = small('scenes-detection')
    distiller = recipe.distiller('channel_wise', recipe.teacher())
    batch = {k: torch.as_tensor(v)[None] for k, v in recipe.data(None).train[0, 0].items()}
    assert distiller.prepare(batch) == [f'channel_wise_{i}: Conv2d1x1 (32, {h}, {2 * h}) -> (48, {h}, {2 * h})' for i, h in enumerate((16, 8, 4))]


def test_neighbours_are_not_compared_in_a_list_of_anchors():
    recipe = replace(small('scenes-detection'), methods={'pairs': [Term(PairWise(), 'logits', 1.)], 'near': [Term(LocalAffinity(), 'logits', 1.)]})
    batch = {k: torch.as_tensor(v)[None] for k, v in recipe.data(None).train[0, 0].items()}
    for method in ('pairs', 'near'):
        with pytest.raises(ValueError, match='logits of detection are a list'): recipe.distiller(method, recipe.teacher()).prepare(batch)


def test_what_the_experiment_varies():
    recipe = scenes_detection('mine', labelled=5, steps=7, lr=.1, teacher_weights='file', methods={'cw': on_levels(ChannelWise, 2.)})
    assert recipe.teacher_budget is None and recipe.budget.steps == 7 and list(recipe.methods) == ['none', 'cw']
    assert bccd('b', tuning=True).data.keywords == {'every': 8, 'tuning': True}
