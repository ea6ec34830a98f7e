"Recipes: every method of every name makes two steps on tiny data in the official layouts; settings, names, laziness."
import hashlib, json, math, os, pickle, subprocess, sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest, torch
from PIL import Image

from kdnotes.distiller import Term
from kdnotes.loop import fit, train_supervised
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.losses.holistic import Critic, Holistic
from kdnotes.losses.knowledge_adaptation import KnowledgeAdaptation
from kdnotes.networks import tiny_teacher
from kdnotes.recipes import RECIPES, Shelf, Splits, describe, scenes_recipe

ROWS = 'cwd', 'ifvd', 'at', 'local', 'pa', 'pi', 'ho'
NAMES = ['scenes', 'camvid', 'scenes-all', 'camvid-all', 'skd-cityscapes-r18', *(f'{row}-cityscapes-r18' for row in ROWS), 'skd-camvid-espnetc',
         'skd-ade20k-r18', 'ka-voc-mobilenetv2', 'ka-cityscapes-mobilenetv2', 'ka-context-mobilenetv2', 'gld-cifar100-r110-r20']
TASKS = ['scenes-classification', 'cifar10-jpeg', 'scenes-detection', 'bccd', 'scenes-depth', 'scenes-depth-log', 'rgbd-7scenes', 'gld-imagenet-r34-r18',
         'gld-voc-ssd-r18', 'gld-voc-deeplabv3plus-r18', 'skd-coco-fcos-mobilenetv2', 'cwd-coco-retinanet-r50', 'skd-nyu-mobilenetv2']   # test_recipes_*.py
METHODS = ['none', 'pixel_wise', 'channel_wise', 'pair_wise', 'local_affinity', 'attention_transfer', 'intra_class_variation',
           'knowledge_adaptation', 'holistic', 'global_local', 'skd']


# tiny data, as the sets are delivered

def street(seed, ids, size=(64, 96)):
    "A picture, and a mask in blocks of 8 with ids drawn from `ids`."
    draw = np.random.default_rng(seed)
    blocks = draw.choice(ids, (size[0] // 8, size[1] // 8)).astype(np.uint8)
    return draw.integers(0, 256, (*size, 3), np.uint8), blocks.repeat(8, 0).repeat(8, 1)


def save(image_file, mask_file, ids, seed):
    for file, pixels in zip((image_file, mask_file), street(seed, ids)):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


def listed(folder, images, masks, lists, ids):
    "NAME.jpg, NAME.png and lists of names, as VOC has them."
    for seed, name in enumerate(sorted({n for names in lists.values() for n in names})):
        for place in masks: save(folder / images / f'{name}.jpg', folder / place / f'{name}.png', ids, seed)
    for file, names in lists.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text('\n'.join(names) + '\n')


def write_cityscapes(root):
    for split, city, n in (('train', 'aachen', 3), ('val', 'ulm', 1)):
        for i in range(n):
            stem = f'{city}/{city}_{i:06d}_000019'
            save(root / f'cityscapes/leftImg8bit/{split}/{stem}_leftImg8bit.png', root / f'cityscapes/gtFine/{split}/{stem}_gtFine_labelIds.png', (0, 4, 7, 11, 26, 33), i)


def write_camvid(root):
    for split, n in (('train', 3), ('val', 1)):
        for i in range(n): save(root / f'camvid/{split}/images/{i:04d}.png', root / f'camvid/{split}/labels/{i:04d}.png', (0, 1, 3, 8, 10, 11), i)


def write_voc(root):
    lists = {'train': ['2007_000001'], 'trainaug': ['2007_000001', '2008_000002', '2008_000003'], 'val': ['2007_000004']}
    listed(root / 'voc/VOCdevkit/VOC2012', 'JPEGImages', ('SegmentationClass', 'SegmentationClassAug'),
           {f'ImageSets/Segmentation/{k}.txt': v for k, v in lists.items()}, (0, 1, 7, 20, 255))


def write_context(root):
    lists = {'train': ['2008_000001', '2008_000002', '2008_000003'], 'val': ['2008_000004']}
    listed(root / 'pascal_context', 'JPEGImages', ('SegmentationClassContext',),
           {f'ImageSets/SegmentationContext/{k}.txt': v for k, v in lists.items()}, (0, 1, 30, 59))


def write_ade20k(root):
    folder = root / 'ade20k/ADEChallengeData2016'
    for split, n in (('training', 3), ('validation', 1)):
        for i in range(n): save(folder / f'images/{split}/ADE_{i:08d}.jpg', folder / f'annotations/{split}/ADE_{i:08d}.png', (0, 1, 77, 150), i)


def write_cifar100(root):
    folder = root / 'cifar100/cifar-100-python'
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in ('train', 'test'):
        content = {'data': draw.integers(0, 256, (4, 3072), np.uint8), 'fine_labels': [0, 7, 99, 7]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / 'meta').write_bytes(pickle.dumps({'fine_label_names': [f'thing {i}' for i in range(100)]}, protocol=2))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sets')
    for write in (write_cityscapes, write_camvid, write_voc, write_context, write_ade20k, write_cifar100): write(folder)
    return folder


def small(name):
    "The recipe itself, but for the size of its data and the length of its budget."
    recipe = RECIPES[name]
    if name.startswith('scenes'): cut = dict(labelled=4, teacher=4, valid=2, size=(48, 96))
    elif name.startswith('gld'): cut = dict(official=False)
    else: cut = dict(crop=128 if name in ('camvid', 'camvid-all') else 97 if name.startswith('ka') else 64)     # a critic's map has 8 x 8 positions
    budget = replace(recipe.budget, steps=2, batch_size=2, workers=0, eval_batch=1)
    return replace(recipe, data=partial(recipe.data, **cut), budget=budget)


_teachers = {}

def teacher_of(recipe):
    "The recipe's teacher, untrained; built once for all recipes that share it."
    key = json.dumps(describe(recipe.teacher))
    if key not in _teachers:
        torch.manual_seed(0)
        _teachers[key] = recipe.teacher().eval()
    return _teachers[key]


def prints(net): return {k: float(v.double().sum()) for k, v in net.state_dict().items()}


@pytest.mark.parametrize('name', NAMES)
def test_every_method_makes_two_steps(name, root):
    recipe = small(name)
    splits, teacher = recipe.data(root), teacher_of(recipe)
    before = prints(teacher)
    for method, terms in recipe.methods.items():
        torch.manual_seed(0)
        distiller = recipe.distiller(method, teacher if terms else None)
        start = prints(distiller.student)
        history = fit(distiller, splits.train, splits.valid if method == 'none' else None, budget=recipe.budget, progress=False)
        weights = {'task': recipe.task_weights.get(method, 1.), **{t.name: t.weight for t in terms}}
        assert len(history.steps) == 2
        for row in history.steps:
            assert set(row) == {'step', 'lr', 'loss', *weights} and all(map(math.isfinite, row.values())), (method, row)
            assert row['loss'] == pytest.approx(sum(w * row[k] for k, w in weights.items()), rel=1e-4, abs=1e-6), method
        moved = prints(distiller.student)
        assert all(moved[k] != start[k] for k, p in distiller.student.named_parameters() if p.dim() > 1), method
        for loss in distiller.losses.values():
            if hasattr(loss, 'fitted'): assert loss.fitted
            if hasattr(loss, 'own_step'): assert loss.own_step.state                              # the critic has stepped
        if method == 'none': assert 0 <= history.metrics[-1][recipe.task.metric] <= 1
    assert prints(teacher) == before and not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_is_trained_by_its_budget(root):
    recipe = small('scenes-all')
    splits = recipe.data(root)
    net = recipe.teacher()
    history = train_supervised(net, recipe.task, splits.teacher_train, splits.valid, budget=replace(recipe.teacher_budget, steps=2, batch_size=2), progress=False)
    assert len(history.steps) == 2 and 0 <= history.metrics[-1]['miou'] <= 1


# names and settings

def test_the_names():
    assert sorted(RECIPES) == sorted(NAMES + TASKS) and all(r.name == n and r.about for n, r in RECIPES.items())
    for row in ROWS: assert list(RECIPES[f'{row}-cityscapes-r18'].methods)[:3] == ['none', 'logits', 'features'][:2 + (row != 'ho')]
    assert list(RECIPES['scenes-all'].methods) == list(RECIPES['camvid-all'].methods) == METHODS
    assert all(list(RECIPES[f'skd-{n}'].methods) == ['none', 'pixel_wise', 'pixel_wise+pair_wise', 'skd', 'skd_paper'] for n in ('cityscapes-r18', 'camvid-espnetc', 'ade20k-r18'))


@pytest.mark.parametrize('name, digest', [('scenes', '9847d041326d63a4'), ('camvid', 'cadd819ddd36b33c')])
def test_the_first_recipes_stay_as_they_were(name, digest):
    "Folders and ledger files of earlier runs belong to exactly these settings."
    text = json.dumps(describe(RECIPES[name]), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest, text


def test_what_was_published_stands_in_the_recipes():
    def weights(name, method): return [t.weight for t in RECIPES[name].methods[method]]
    assert weights('skd-cityscapes-r18', 'skd') == [80., .5, .1]                       # 10, summed over 8 images
    assert weights('skd-cityscapes-r18', 'skd_paper') == [10., 10., .1]
    assert weights('cwd-cityscapes-r18', 'logits') + weights('cwd-cityscapes-r18', 'features') == [3., 50.]
    assert weights('pi-cityscapes-r18', 'logits') == [pytest.approx(10 / 19)] and weights('pi-cityscapes-r18', 'features') == [pytest.approx(10 / 512)]
    assert weights('ifvd-cityscapes-r18', 'ifvd') == [pytest.approx(10 / 19), 200., .001]
    assert weights('at-cityscapes-r18', 'features') == [1e4] and weights('ho-cityscapes-r18', 'logits') == [.001]
    ka, gld = (RECIPES[n] for n in ('ka-voc-mobilenetv2', 'gld-cifar100-r110-r20'))
    loss = ka.methods['knowledge_adaptation'][0].loss
    assert (loss.beta, loss.gamma, ka.budget.lr, ka.budget.weight_decay, ka.budget.batch_size) == (50., 1., .007, 4e-5, 16)
    assert (gld.methods['global_local'][0].loss.alpha, gld.task_weights['global_local'], gld.budget.steps) == (.7, pytest.approx(.3), 156_250)
    assert gld.budget.milestones == (78_125, 117_187) and gld.budget == gld.teacher_budget           # 200, 100, 150 passes of 50 000 in 64s
    assert all(build().features.stage3[0].beside for build in (gld.teacher, gld.student))            # 1x1 convolutions, as GLD's models.py
    assert loss.channels == (256, 256, 128) and loss.strides == (2, 1, 1) and loss.adapter_layers == 1
    skd = RECIPES['skd-cityscapes-r18'].methods
    assert [t.loss.granularity for t in skd['skd'][1:2] + skd['skd_paper'][1:2]] == [(32, 32), (2, 2)]
    critics = [skd['skd'][2].loss, skd['skd_paper'][2].loss, RECIPES['ho-cityscapes-r18'].methods['logits'][0].loss]
    assert [(c.optimizer, c.lr, c.penalty, c.critic.image_channels) for c in critics] == [('sgd', 4e-4, 10., 0), ('adam', 4e-4, 10., 3), ('adam', 4e-4, 10., 0)]


def test_what_is_remembered_or_found_nowhere_is_said():
    for name in NAMES[4:]: assert 'found in no source' in RECIPES[name].about or 'in no source' in RECIPES[name].about
    for name in [n for n in NAMES if n.startswith(('cwd', 'ka')) or 'espnetc' in n]: assert 'remembered' in RECIPES[name].about


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_is_a_page(name):
    recipe = RECIPES[name]
    for page in (repr(recipe), recipe._repr_markdown_()):
        assert ' at 0x' not in page and len(page) < 5000 and page.endswith(recipe.about)
        for word in (name, f'steps={recipe.budget.steps}', f'lr={recipe.budget.lr}', recipe.student.func.__name__, *recipe.methods): assert word in page
        for t in [t for terms in recipe.methods.values() for t in terms]: assert f'{t.weight:.4g} {type(t.loss).__name__}(' in page and f'at {t.at}' in page
    assert ('crop=' in page) != name.startswith('scenes')


def test_a_recipe_of_ones_own_is_a_page():
    scenes = RECIPES['scenes']
    page = repr(replace(scenes, data=Splits([1], [2]), teacher=tiny_teacher(8), teacher_budget=None, student=lambda: tiny_teacher(8), about='Mine.'))
    assert 'data sets as given' in page and 'SegmentationNet' in page and '<lambda>' in page and page.endswith('Mine.')
    assert '<lambda>' in repr(replace(scenes, data=lambda root: None))


def test_shared_settings_of_the_table():
    rows = [describe(RECIPES[f'{row}-cityscapes-r18']) for row in ROWS]
    assert all({**r, 'name': 0, 'methods': 0} == {**rows[0], 'name': 0, 'methods': 0} for r in rows)
    assert rows[0]['budget']['steps'] == 40_000 and rows[0]['data']['flip'] == 0.


# looking builds nothing

def test_looking_builds_nothing():
    built = []
    shelf = Shelf({'a': lambda: built.append('a') or object(), 'b': lambda: built.append('b') or object()})
    assert 'a' in shelf and 'c' not in shelf and list(shelf) == sorted(shelf) == ['a', 'b'] and len(shelf) == 2 and 'a' in repr(shelf)
    assert shelf.get('c') is None and not built
    assert shelf['b'] is shelf['b'] is shelf.get('b') and built == ['b']
    with pytest.raises(KeyError, match='c'): shelf['c']


def test_an_error_while_building_is_not_swallowed():
    def broken(): raise KeyError('inside')
    with pytest.raises(KeyError, match='inside'): Shelf({'a': broken}).get('a')


def in_another_process(code):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_builds_no_critic():
    in_another_process('import kdnotes.losses.holistic as h\n'
                       'def never(*args, **kwargs): raise AssertionError("a critic was built")\n'
                       'h.Critic.__init__ = never\n'
                       'from kdnotes.recipes import RECIPES\n'
                       'assert len(sorted(RECIPES)) == len(RECIPES) > 10 and "scenes-all" in RECIPES and RECIPES["scenes"].name == "scenes"')


def test_a_recipe_is_the_same_in_every_process():
    "Whatever was drawn or built before; else a comparison could not be continued. And building draws nothing."
    code = ('import json, torch\nfrom kdnotes.recipes import RECIPES, describe\ntorch.manual_seed(5); torch.rand(3); state = torch.get_rng_state()\n'
            'print(json.dumps({n: describe(RECIPES[n]) for n in reversed(list(RECIPES))}))\nassert torch.equal(state, torch.get_rng_state())')
    assert json.loads(in_another_process(code)) == json.loads(json.dumps({n: describe(r) for n, r in RECIPES.items()}))


def test_what_a_run_draws_itself_is_no_setting():
    "The start of a critic without a seed and of knowledge adaptation: drawn by `prepare`, not by whoever built the term."
    def built(draw, seed=None):
        torch.manual_seed(draw)
        return describe([Holistic(Critic(3, width=2, seed=seed)), KnowledgeAdaptation(4, 4)])
    assert built(1) == built(2) and built(1, seed=0) == built(2, seed=0) != built(1, seed=1) != built(1)
    assert describe(KnowledgeAdaptation(4, 4, beta=1.)) != describe(KnowledgeAdaptation(4, 4))


# what is refused, and what a recipe hands out

@pytest.mark.parametrize('name', [n for n in NAMES if not n.startswith('scenes')])
def test_missing_data_is_named(name, tmp_path):
    folder = 'camvid' if 'camvid' in name else 'context' if 'context' in name else next(s for s in ('cityscapes', 'ade20k', 'voc', 'cifar100') if s in name)
    with pytest.raises(FileNotFoundError, match=folder): RECIPES[name].data(tmp_path)
    with pytest.raises(FileNotFoundError, match='nowhere'): RECIPES[name].data(tmp_path / 'nowhere')


def test_a_distiller_has_copies_of_the_terms():
    recipe, teacher = RECIPES['scenes-all'], tiny_teacher(8)
    a, b = (recipe.distiller('holistic', teacher) for _ in range(2))
    critics = [recipe.methods['holistic'][0].loss, a.losses['holistic'], b.losses['holistic']]
    assert len({id(c) for c in critics}) == 3 and a.student is not b.student and a.teacher is teacher
    assert recipe.distiller('none', None).terms == [] and recipe.distiller('none', None, student=a.student).student is a.student
    with pytest.raises(ValueError, match="no method 'pixelwise'"): recipe.distiller('pixelwise', teacher)


def test_task_weights():
    gld = RECIPES['gld-cifar100-r110-r20']
    assert gld.distiller('global_local', gld.teacher()).task_weight == pytest.approx(.3)
    for wrong in ({'none': .5}, {'unknown': .5}, {'global_local': -1.}, {'global_local': float('nan')}):
        with pytest.raises(ValueError, match='task_weights'): replace(gld, task_weights=wrong)
    assert describe(replace(gld, task_weights={'global_local': .4})) != describe(gld)


def test_differing_is_one_line():
    cwd = RECIPES['cwd-cityscapes-r18']
    mine = replace(cwd, methods={'mine': [Term(ChannelWise(temperature=2.), 'logits', 3.)]})
    assert {k for k, v in describe(mine).items() if v != describe(cwd)[k]} == {'methods'}
    ours = scenes_recipe('mine', methods={'mine': mine.methods['mine']}, steps=3)
    assert list(ours.methods) == ['none', 'mine'] and ours.budget.steps == 3
