"Depth recipes: every method makes two steps on tiny data in the official layouts; settings and words."
import math
from inspect import signature
from dataclasses import replace
from functools import partial

import numpy as np
import pytest, torch
from PIL import Image

from kdnotes.distiller import Distiller, Term
from kdnotes.loop import fit
from kdnotes.losses.pixel_wise import PixelWise
from kdnotes.recipes import RECIPES

DEPTH = 'scenes-depth', 'scenes-depth-log', 'rgbd-7scenes', 'skd-nyu-mobilenetv2'


def write_depth(folder, counts, size=(96, 128)):
    "Pairs of files as NYU and 7-Scenes have them here: JPEG, and millimetres in 16-bit PNG of the same name, 0 = unknown."
    draw = np.random.default_rng(0)
    for split, n in counts.items():
        for i in range(n):
            metres = np.linspace(3.5, .9, size[0])[:, None] * draw.uniform(.9, 1.1, size)
            metres[draw.random(size) < .1] = 0
            for kind, pixels, end in (('images', draw.integers(0, 256, (*size, 3), np.uint8), 'jpg'), ('depth', (1000 * metres).round().astype(np.uint16), 'png')):
                file = folder / split / kind / f'{i:06d}.{end}'
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sets')
    for name in ('nyu', 'rgbd-7scenes'): write_depth(folder / name, {'train': 4, 'val': 2})
    return folder


def small(name):
    recipe = RECIPES[name]
    cut = {'scenes': dict(labelled=4, teacher=4, valid=2, size=(48, 96)), 'rgbd': dict(every=2, size=(48, 64)), 'skd': dict(crop=64)}[name.split('-')[0]]
    return replace(recipe, data=partial(recipe.data, **cut), budget=replace(recipe.budget, steps=2, batch_size=2, workers=0, eval_batch=1))


def prints(net): return {k: float(v.double().sum()) for k, v in net.state_dict().items()}


@pytest.mark.parametrize('name', DEPTH)
def test_every_method_makes_two_steps(name, root):
    recipe = small(name)
    splits = recipe.data(root)
    torch.manual_seed(0)
    teacher = recipe.teacher().eval()
    before = prints(teacher)
    for method, terms in recipe.methods.items():
        torch.manual_seed(0)
        distiller = recipe.distiller(method, teacher if terms else None)
        start = prints(distiller.student)
        history = fit(distiller, splits.train, splits.valid if method == 'none' else None, budget=recipe.budget, progress=False)
        weights = {'task': 1., **{t.name: t.weight for t in terms}}
        assert len(history.steps) == 2
        for row in history.steps:
            assert set(row) == {'step', 'lr', 'loss', *weights} and all(map(math.isfinite, row.values())), (method, row)
            assert row['loss'] == pytest.approx(sum(w * row[k] for k, w in weights.items()), rel=1e-4, abs=1e-6), method
        moved = prints(distiller.student)
        assert all(moved[k] != start[k] for k, p in distiller.student.named_parameters() if p.dim() > 1), method
        for loss in distiller.losses.values():
            if hasattr(loss, 'own_step'): assert loss.own_step.state
        if method == 'none': assert history.metrics[-1]['abs_rel'] > 0 and 0 <= history.metrics[-1]['delta1'] <= 1
    assert prints(teacher) == before


@pytest.mark.parametrize('name', [n for n in DEPTH if RECIPES[n].task.bins is None])
def test_one_channel_is_refused_by_a_softmax_over_channels(name, root):
    recipe = small(name)
    splits = recipe.data(root)
    distiller = Distiller(recipe.student(), recipe.student(), recipe.task, [Term(PixelWise(), 'logits', 1.)])
    with pytest.raises(ValueError, match='over 1 channel these are constant; expected 2 or more'):
        fit(distiller, splits.train, budget=recipe.budget, progress=False)


def test_the_range_holds_what_zooming_makes_of_the_data(root):
    "Enlarging divides metres; a task that ended before them would punish a student for being right."
    for name in ('scenes-depth', 'scenes-depth-log', 'rgbd-7scenes'):
        recipe = small(name)
        splits = recipe.data(root)
        for part in splits:
            for i in range(len(part)):
                known = part[i]['depth'][part[i]['depth'] > 0]
                assert recipe.task.nearest < known.min() and known.max() < recipe.task.farthest


def test_the_student_of_the_room_has_every_seventh_frame(root):
    recipe = RECIPES['rgbd-7scenes']
    splits = replace(recipe, data=partial(recipe.data, every=2)).data(root)
    assert (len(splits.train), len(splits.teacher_train), len(splits.valid)) == (2, 4, 2)
    assert torch.equal(splits.train.dataset[1]['depth'], splits.teacher_train.dataset[2]['depth'])
    assert signature(recipe.data).parameters['every'].default == 7


def test_what_was_published_and_what_was_not():
    nyu = RECIPES['skd-nyu-mobilenetv2']
    pairs, judge = nyu.methods['skd']
    assert (pairs.weight, pairs.loss.granularity, judge.weight, judge.loss.critic.image_channels) == (10., (2, 2), .1, 3)
    assert nyu.methods['pair_wise'] == [pairs] and nyu.teacher.args == ('resnext101_32x8d',) and nyu.student.args == ('mobilenetv2_100',)
    assert 'found in no source' in nyu.about and nyu.task.bins is None
    for name in DEPTH:
        recipe = RECIPES[name]
        assert recipe.name == name and recipe.about and (recipe.task.metric, recipe.task.higher_is_better) == ('abs_rel', False)
        assert recipe.teacher_budget is not None


def test_the_scenes_pair_keeps_the_book_s_measure():
    "Tiny: half a million parameters at most; and nobody trains on what is scored."
    for name in DEPTH[:3]:
        recipe = RECIPES[name]
        sizes = [sum(p.numel() for p in build().parameters()) for build in (recipe.teacher, recipe.student)]
        assert sizes[0] <= 500_000 and sizes[0] > 10 * sizes[1]
