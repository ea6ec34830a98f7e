"GLD's backbone in other networks: two steps of every method on tiny trees of the official formats, and where each network begins."
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest, timm, torch
from PIL import Image

import kdnotes.recipes as recipes
from kdnotes.compare import _First, compare
from kdnotes.loop import fit
from kdnotes.recipes import Start, describe
from kdnotes.taps import find_module

NAMES = 'gld-imagenet-r34-r18', 'gld-voc-ssd-r18', 'gld-voc-deeplabv3plus-r18'
BUILD = {name: getattr(recipes, name.replace('-', '_')) for name in NAMES}


# tiny data, as the sets are delivered

def picture(file, seed, size=(60, 90)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(file)


def write_imagefolder(root):
    for split, n in (('train', 2), ('val', 1)):
        for c, name in enumerate(('n01440764', 'n01443537', 'n01484850')):
            for i in range(n): picture(root / f'imagefolder/{split}/{name}/{name}_{i}.JPEG', 10 * c + i, size=(70, 60 + i))


def write_voc2007(root):
    folder, lists = root / 'voc/VOCdevkit/VOC2007', {'trainval': ['000005', '000007', '000009'], 'test': ['000001']}
    thing = ('<object><name>{}</name><pose>Left</pose><truncated>0</truncated><difficult>{}</difficult>'
             '<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>')
    for split, names in lists.items():
        for name in names:
            picture(folder / f'JPEGImages/{name}.jpg', int(name))
            things = thing.format('dog', 0, 5, 10, 50, 55) + thing.format('person', 0, 40, 1, 88, 60) + thing.format('car', 1, 1, 1, 20, 20)
            xml = f'<annotation><filename>{name}.jpg</filename><size><width>90</width><height>60</height><depth>3</depth></size>{things}</annotation>'
            for kind, text, end in (('Annotations', xml, 'xml'),):
                (folder / kind).mkdir(exist_ok=True); (folder / kind / f'{name}.{end}').write_text(text)
        (folder / 'ImageSets/Main').mkdir(parents=True, exist_ok=True)
        (folder / f'ImageSets/Main/{split}.txt').write_text('\n'.join(names) + '\n')


def write_voc2012(root):
    folder, lists = root / 'voc/VOCdevkit/VOC2012', {'trainaug': ['2007_000001', '2008_000002', '2008_000003'], 'val': ['2007_000004']}
    for split, names in lists.items():
        for seed, name in enumerate(names):
            picture(folder / f'JPEGImages/{name}.jpg', seed)
            mask = np.random.default_rng(seed).choice((0, 1, 7, 20, 255), (6, 9)).astype(np.uint8).repeat(10, 0).repeat(10, 1)
            for kind in ('SegmentationClass', 'SegmentationClassAug'):
                (folder / kind).mkdir(exist_ok=True); Image.fromarray(mask).save(folder / kind / f'{name}.png')
        (folder / 'ImageSets/Segmentation').mkdir(parents=True, exist_ok=True)
        (folder / f'ImageSets/Segmentation/{split}.txt').write_text('\n'.join(names) + '\n')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sets')
    for write in (write_imagefolder, write_voc2007, write_voc2012): write(folder)
    return folder


CUT = {'gld-imagenet-r34-r18': dict(crop=64, num_classes=3), 'gld-voc-ssd-r18': dict(side=128), 'gld-voc-deeplabv3plus-r18': dict(crop=65)}

def small(recipe, steps=2):
    "The recipe, and the one it starts from, but for the size of their data and the length of their budgets."
    budget = replace(recipe.budget, steps=steps, batch_size=2, workers=0, eval_batch=1, milestones=())
    first = recipe.start and replace(recipe.start, recipe=small(recipe.start.recipe, steps))
    return replace(recipe, data=partial(recipe.data, **CUT[recipe.name]), budget=budget, teacher_budget=budget, start=first)


@pytest.mark.parametrize('name', NAMES)
def test_every_method_makes_two_steps(name, root):
    recipe = small(BUILD[name]())
    splits = recipe.data(root)
    torch.manual_seed(0); teacher = recipe.teacher().eval()
    for method, terms in recipe.methods.items():
        torch.manual_seed(0); distiller = recipe.distiller(method, teacher if terms else None)
        start = {k: p.detach().clone() for k, p in distiller.student.named_parameters()}
        history = fit(distiller, splits.train, splits.valid if method == 'none' else None, budget=recipe.budget, progress=False)
        assert len(history.steps) == 2 and all(map(math.isfinite, (v for row in history.steps for v in row.values())))
        assert {k for row in history.steps for k in row} == {'step', 'lr', 'loss', 'task', *(t.name for t in terms)}
        assert all(not torch.equal(p, start[k]) for k, p in distiller.student.named_parameters() if p.dim() == 4), method
        if method == 'none': assert 0 <= history.metrics[-1][recipe.task.metric] <= 1


@pytest.mark.parametrize('name', NAMES[1:])
def test_networks_begin_with_the_backbones(name, root, tmp_path):
    recipe = small(BUILD[name](), steps=1)
    results = compare(recipe, tmp_path / 'out', data_root=root, seeds=1, progress=False)
    assert [r['method'] for r in results['summary']] == ['none', 'global_local', 'soft_targets']
    assert sorted(p.name for p in (tmp_path / 'out/start/runs').iterdir()) == ['global_local-0', 'none-0', 'soft_targets-0']
    first = _First(recipe, root, tmp_path / 'out', False)
    for method in recipe.methods:
        torch.manual_seed(0); net, alone = recipe.student(), None
        torch.manual_seed(0); alone = recipe.student().state_dict()
        first.to_student(net, method, 0)
        from kdnotes.networks import load_weights
        there = load_weights(recipe.start.recipe.student(), tmp_path / f'out/start/runs/{method}-0/weights.safetensors').state_dict()
        inside = f'{recipe.start.onto}.'
        for k, v in net.state_dict().items(): assert torch.equal(v, there[k.removeprefix(inside)] if k.startswith(inside) else alone[k]), k
        assert {k for k in there} - {k.removeprefix(inside) for k in net.state_dict()} == {'fc.weight', 'fc.bias'}
    large = recipe.teacher(); first.to_teacher(large)
    assert torch.equal(find_module(large, recipe.start.onto).state_dict()['layer4.2.conv2.weight'], first.teacher.state_dict()['layer4.2.conv2.weight'])


def test_other_parts_are_refused():
    recipe = BUILD['gld-voc-ssd-r18']()
    with pytest.raises(ValueError, match="does not fit"): Start(recipe.start.recipe, 'layer4', 'net.backbone.body').give(recipe.start.recipe.student(), recipe.student())
    with pytest.raises(ValueError, match="does not fit"): recipe.start.give(recipe.start.recipe.teacher(), recipe.student())       # ResNet-34 into ResNet-18


def test_what_a_recipe_says():
    first, detector, segmenter = (BUILD[n]() for n in NAMES)
    loss = first.methods['global_local'][0].loss
    assert (loss.alpha, loss.beta, loss.divisions, first.task_weights) == (.7, 2000., 2, {'global_local': pytest.approx(.3), 'soft_targets': pytest.approx(.1)})
    assert first.budget.steps == 500_455 and first.budget.milestones == (150_136, 300_273, 450_410)       # 100, 30, 60, 90 passes of 1 281 167 in 256s
    assert (detector.budget.lr, detector.budget.steps, detector.budget.milestones) == (.001, 120_000, (80_000, 100_000))
    assert (segmenter.budget.lr, segmenter.budget.steps, segmenter.budget.batch_size) == (.007, 30_000, 16)
    for r in (first, detector, segmenter):
        assert 'found in no source' in r.about
        for page in (repr(r), r._repr_markdown_()): assert len(page) < 5000 and ' at 0x' not in page and page.endswith(r.about) and r.student.func.__name__ in page
    for r in (detector, segmenter):
        assert r.start.recipe.name == 'gld-imagenet-r34-r18' and describe(r)['start']['methods'] == {'global_local': 'global_local', 'soft_targets': 'soft_targets'}
        assert all(not terms for terms in r.methods.values())


@pytest.mark.parametrize('name, folder', [(NAMES[0], 'imagefolder'), (NAMES[1], 'voc'), (NAMES[2], 'voc')])
def test_missing_data_is_named(name, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=folder): BUILD[name]().data(tmp_path)


def test_the_number_of_classes_is_looked_at(root):
    with pytest.raises(ValueError, match='3 folders of classes, expected 1000'): BUILD[NAMES[0]]().data(root)
    mine = BUILD[NAMES[0]](num_classes=3)
    assert len(mine.data(root).train) == 6 and mine.student().get_classifier().out_features == 3
