"""The shared file is the student, the whole student and nothing else; nothing of a stranger's file is executed."""
import importlib.util, json, shutil, subprocess, sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import batched_nms

import kdnotes.export as export
from kdnotes.compare import examine, train
from kdnotes.distiller import Distiller, Term
from kdnotes.export import build_network, card_path, export_student, load_student, network_plan, open_run, read_card
from kdnotes.networks import (cifar_resnet, deeplabv3, deeplabv3plus, encoder_decoder, espnetc, faster_rcnn, fcos, pspnet, retinanet, ssd, tiny_depth_student,
                              tiny_depth_teacher, tiny_detector_student, tiny_detector_teacher, tiny_student, tiny_teacher)
from kdnotes.loop import Budget
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.recipes import RECIPES, Recipe, scenes_data, scenes_recipe
from kdnotes.taps import Taps
from kdnotes.tasks import Depth, Detection, Segmentation, main_output

needs_onnx = pytest.mark.skipif(not (importlib.util.find_spec('onnx') and importlib.util.find_spec('onnxscript')),
                                reason='ONNX export: onnx and onnxscript are not installed (pip install "kdnotes[onnx]")')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('export') / 'run'
    train(replace(scenes_recipe(), data=partial(scenes_data, labelled=4, teacher=4, valid=2)), folder, method='channel_wise', max_steps=1, progress=False)
    return folder


def left(folder): return sorted(p.name for p in folder.iterdir())


def test_every_recipe_has_a_student_that_a_card_can_describe():
    for name in RECIPES:
        plan = json.loads(json.dumps(network_plan(RECIPES[name].student)))
        with torch.device('meta'): built, own = build_network(plan), RECIPES[name].student()
        assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}, name


def test_the_file_holds_the_student_and_no_more(run, tmp_path):
    card = export_student(run, tmp_path / 's.safetensors', progress=False)
    ours, theirs = load_file(tmp_path / 's.safetensors'), load_file(run / 'runs/channel_wise-0/weights.safetensors')
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert left(tmp_path) == ['s.safetensors', 's.safetensors.json'] and read_card(tmp_path / 's.safetensors') == card
    assert json.loads((run / 'results.json').read_text())['runs'][0]['metrics'] == card['metrics']


@pytest.mark.parametrize('build, size', [
    (partial(tiny_teacher, 4), (48, 64)), (partial(espnetc, num_classes=4), (48, 64)), (partial(cifar_resnet, 8, 10), (32, 32)),
    (partial(pspnet, 'resnet18', num_classes=4, output_stride=32, channels=8, stem='plain'), (64, 96)),
    (partial(deeplabv3, 'resnet18', num_classes=4, output_stride=32, channels=8), (64, 96))], ids=lambda x: x.func.__name__ if isinstance(x, partial) else '')
def test_torch_files_are_equal_at_free_sizes(build, size, tmp_path):
    card = export_student(build(), tmp_path / 's.pt2', size=size, progress=False)
    assert card['check']['free'] == ['batch', 'height', 'width'] and card['check']['of the largest score'] < 1e-5
    assert [s[0] for s in card['check']['images']] == [1, 3] and len({tuple(s[2:]) for s in card['check']['images']}) == 2


@needs_onnx
@pytest.mark.parametrize('build, size, free', [
    (partial(cifar_resnet, 8, 10), (32, 32), True), (partial(tiny_teacher, 4), (48, 64), False),
    pytest.param(partial(pspnet, 'resnet18', num_classes=4, output_stride=32, channels=8, stem='plain'), (64, 96), False, marks=pytest.mark.soak)],
    ids=lambda x: x.func.__name__ if isinstance(x, partial) else '')
def test_onnx_files_agree_and_say_what_is_free(build, size, free, tmp_path):
    import onnx
    net = build()
    card = export_student(net, tmp_path / 's.onnx', size=size, progress=False)
    assert ('height' in card['check']['free']) == free and 'batch' in card['check']['free'] and card['check']['of the largest score'] < 1e-4
    graph = onnx.load(tmp_path / 's.onnx').graph
    assert [o.name for o in graph.output] == ['out'] and [i.name for i in graph.input] == ['image']
    assert not any('aux' in t.name for t in graph.initializer)


@needs_onnx
def test_without_onnxruntime_the_reference_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(export, '_onnx_runner', lambda: 'onnx')
    card = export_student(tiny_student(3), tmp_path / 's.onnx', size=(32, 48), progress=False)
    assert card['check']['by'].startswith('onnx ') and card['check']['of the largest score'] < 1e-5


# --- boxes and depths

SMALL = dict(num_classes=3, channels=16)
DETECTORS = {'fcos': partial(fcos, 'resnet18', convs=1, **SMALL), 'retinanet': partial(retinanet, 'resnet18', convs=1, ratios=[.5, 1.], **SMALL),
             'ssd': partial(ssd, 'resnet18', num_classes=3, extra=[16, 16]), 'tiny': partial(tiny_detector_student, 3)}
def body(): return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), AsList())      # exporting a ResNet takes ten times as long


class AsList(nn.Module):
    "map -> [map]"
    def forward(self, x): return [x]


def unsure(kind):
    "A fresh detector that lets low scores through, or it would find nothing."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = (DETECTORS[kind]() if kind == 'tiny' else DETECTORS[kind].func(body(), **{'extra': 'pool', **DETECTORS[kind].keywords})).eval()
    detector.net.score_thresh = .005
    for m in detector.modules():
        if isinstance(m, nn.Conv2d) and m.out_channels in (3, 6, 18): m.weight.data.mul_(20)       # and different ones
    return detector


def chosen(scores, boxes, rules):
    "What the card says is still to be done, for one image."
    anchor, label = (scores > rules['score_thresh']).nonzero().T
    keep = batched_nms(boxes[anchor], scores[anchor, label], label, rules['nms_thresh'])[:rules['detections_per_img']]
    return {'boxes': boxes[anchor][keep], 'scores': scores[anchor, label][keep], 'labels': label[keep]}


@pytest.mark.parametrize('kind', DETECTORS)
def test_detectors_as_graphs_of_torch(kind, tmp_path):
    detector = unsure(kind)
    card = export_student(detector, tmp_path / 'd.pt2', size=(32, 64), progress=False)
    assert card['check']['of the largest score'] < 1e-6 and 'batch' in card['check']['free']
    image = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    scores, boxes = torch.export.load(tmp_path / 'd.pt2').module()(image)
    with torch.no_grad(): found = detector(image).detections()
    rules = card['output']['still to be done']
    assert scores.shape == (2, boxes.shape[1], 3) and 0 <= scores.min() and scores.max() <= 1 and boxes.shape[2] == 4
    for i, f in enumerate(found):
        for k, v in chosen(scores[i], boxes[i], rules).items(): assert torch.allclose(v, f[k], atol=1e-4), k
        assert 5 < len(f['scores'])


@needs_onnx
@pytest.mark.parametrize('kind', ['tiny', 'retinanet', pytest.param('ssd', marks=pytest.mark.soak)])
def test_detectors_as_onnx(kind, tmp_path):
    import onnx, onnxruntime
    detector = unsure(kind)
    card = export_student(detector, tmp_path / 'd.onnx', size=(32, 64), progress=False)
    assert card['check']['by'].startswith('onnxruntime ') and card['check']['of the largest score'] < 1e-4
    assert [o.name for o in onnx.load(tmp_path / 'd.onnx').graph.output] == ['scores', 'boxes']
    image = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    scores, boxes = map(torch.from_numpy, onnxruntime.InferenceSession(tmp_path / 'd.onnx').run(None, {'image': image.numpy()}))
    with torch.no_grad(): found = detector(image).detections()
    for i, f in enumerate(found):
        got = chosen(scores[i], boxes[i], card['output']['still to be done'])
        assert len(got['scores']) == len(f['scores']) > 5 and torch.allclose(got['scores'], f['scores'], atol=1e-5)


@pytest.mark.parametrize('build', [*DETECTORS.values(), partial(tiny_detector_teacher, 3), partial(faster_rcnn, 'resnet18', hidden=16, **SMALL)],
                         ids=lambda b: b.func.__name__)
def test_detectors_are_read_back(build, tmp_path):
    detector = build().eval()
    export_student(detector, tmp_path / 'd.safetensors', size=(64, 96), about={'network': network_plan(build)}, progress=False)
    back, card = load_student(tmp_path / 'd.safetensors')
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(back(image).logits(), detector(image).logits())
    assert type(back.net) is type(detector.net) and list(card['output']) == ['detections()']
    assert load_file(tmp_path / 'd.safetensors').keys() == detector.state_dict().keys()


@pytest.mark.parametrize('ending', ['.onnx', '.pt2'])
def test_two_stages_are_refused_as_a_graph(ending, tmp_path):
    with pytest.raises(ValueError, match='Faster R-CNN .* Share it as .safetensors, or train a RetinaNet, FCOS or SSD'):
        export_student(faster_rcnn('resnet18', hidden=16, **SMALL), tmp_path / f'd{ending}', size=(64, 64))
    assert left(tmp_path) == []


def test_a_detector_that_was_written_wrongly_is_noticed(tmp_path, monkeypatch):
    "Each of the two outputs."
    right, build = export._WRITERS['.safetensors'], partial(tiny_detector_student, 3)
    for layer, name in (('classification_head.cls_logits', 'scores'), ('regression_head.bbox_reg', 'boxes')):
        def lies(net, file, image, free):
            weight = net.get_submodule(f'net.head.{layer}').weight.data
            weight.add_(.01); right(net, file, image, free); weight.sub_(.01)
        monkeypatch.setitem(export._WRITERS, '.safetensors', lies)
        with pytest.raises(RuntimeError, match=f'is not written.*differ by.*{name}'):
            export_student(build(), tmp_path / 'd.safetensors', size=(64, 64), about={'network': network_plan(build)})
    assert left(tmp_path) == []


@pytest.mark.parametrize('build', [partial(tiny_depth_student, 1), partial(tiny_depth_teacher, 8), partial(encoder_decoder, 'resnet18', out_channels=1, channels=16),
                                   partial(deeplabv3plus, 'resnet18', num_classes=4, channels=16)], ids=lambda b: b.func.__name__)
def test_depth_networks_and_decoders_travel(build, tmp_path):
    net = build().eval()
    for ending in ('.safetensors', '.pt2')[:1 + (build.func is tiny_depth_teacher or build.func is deeplabv3plus)]:
        card = export_student(net, tmp_path / f's{ending}', size=(64, 96), about={'network': network_plan(build)}, progress=False)
        assert card['check']['of the largest score'] < 1e-5 and 'height' in card['check']['free']
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(load_student(tmp_path / 's.safetensors')[0](image)['out'], net(image)['out'])


@needs_onnx
def test_depth_as_onnx(tmp_path):
    card = export_student(tiny_depth_student(8), tmp_path / 's.onnx', size=(32, 48), progress=False)
    assert card['check']['of the largest score'] < 1e-4 and card['check']['by'].startswith('onnxruntime ')


@pytest.mark.parametrize('bins', [None, 6])
def test_the_card_of_a_depth_run_leads_to_metres(bins):
    task = Depth(nearest=1., farthest=60., bins=bins)
    said, z = export._metres(task), torch.randn(1, task.num_classes, 8, 8, dtype=torch.float64)
    if bins: edges = torch.tensor(said['depth']['edges']).log(); metres = (z.softmax(1) * ((edges[1:] + edges[:-1]) / 2)[None, :, None, None]).sum(1).exp()
    else: metres = z[:, 0].exp().clamp(said['depth']['nearest'], said['depth']['farthest'])
    assert torch.allclose(metres, task.predict({'out': z}, {'image': torch.zeros(1, 3, 8, 8)})) and ('softmax' in said['output']['out']) == bool(bins)
    assert export._metres(Segmentation(3)) == {}


def detection_or_depth(kind):
    "A recipe of a minute ago: nothing is learned in its steps."
    task, keys, student, teacher, place = {
        'boxes': (Detection(3), ('boxes', 'labels'), partial(tiny_detector_student, 3), partial(tiny_detector_teacher, 3), 'net.backbone.levels.0'),
        'depth': (Depth(nearest=1., farthest=60.), ('depth',), partial(tiny_depth_student, 1), partial(tiny_depth_teacher, 1), 'head.bottleneck'),
        'bins': (Depth(nearest=1., farthest=60., bins=6), ('depth',), partial(tiny_depth_student, 6), partial(tiny_depth_teacher, 6), 'head.bottleneck')}[kind]
    data = partial(scenes_data, labelled=4, teacher=4, valid=2, size=(48, 96), keys=('image', *keys))
    return Recipe(f'tiny {kind}', task, data, teacher, student, Budget(steps=1, batch_size=2, lr=1e-3), {'channel_wise': [Term(ChannelWise(), place, 1.)]},
                  teacher_budget=Budget(steps=1, batch_size=2, lr=1e-3), size=(48, 96))


@pytest.mark.parametrize('kind', ['boxes', 'depth', 'bins'])
def test_a_run_of_another_task(kind, tmp_path):
    "Trained with stored answers, looked at by the doctor, exported and read back."
    recipe, folder = detection_or_depth(kind), tmp_path / 'run'
    train(recipe, folder, teacher_cache=tmp_path / 'cache', progress=False)
    said = examine(recipe, folder, teacher_cache=tmp_path / 'cache', progress=False)
    assert any(f.means == 'stored, and its own' for f in said.findings) and not any('failed' in f.what for f in said.findings), str(said)
    card = export_student(folder, tmp_path / 's.safetensors', recipe=recipe, progress=False)
    assert card['task'] == recipe.task.name and card['metric'] in card['metrics'] and card['input']['mean']
    assert ('depth' in card) == (kind != 'boxes') and ('edges' in card.get('depth', {})) == (kind == 'bins')
    net, image = load_student(tmp_path / 's.safetensors')[0], torch.randn(1, 3, 48, 96)
    with torch.no_grad(): assert torch.equal(recipe.task.logits(net(image)), recipe.task.logits(open_run(folder, recipe=recipe)[0].eval()(image)))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name.startswith('onnx') else found(name, *a))
    with pytest.raises(RuntimeError, match=r'ONNX needs onnx and onnxscript: pip install "kdnotes\[onnx\]"'):
        export_student(tiny_student(3), tmp_path / 's.onnx', size=(32, 48))
    assert left(tmp_path) == []


@pytest.mark.parametrize('ending', ['.safetensors', '.pt2'])
def test_a_writer_that_lies_or_dies_leaves_what_was_there(ending, tmp_path, monkeypatch):
    path = tmp_path / f's{ending}'
    export_student(tiny_student(3), path, size=(32, 48), progress=False)
    before, right = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, export._WRITERS[ending]
    def lies(net, file, image, free):
        for p in net.parameters(): p.data.mul_(1.001)
        right(net, file, image, free)
        for p in net.parameters(): p.data.div_(1.001)
    def dies(*_): raise KeyError('disk on fire')
    for wrong, message in ((lies, 'differ by'), (dies, 'disk on fire')):
        monkeypatch.setitem(export._WRITERS, ending, wrong)
        with pytest.raises(RuntimeError, match=f'is not written.*{message}'): export_student(tiny_student(3), path, size=(32, 48))
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_wrapped_and_compiled_students_are_taken_out(tmp_path):
    student = tiny_student(3)
    distiller = Distiller(student, tiny_teacher(3), Segmentation(3), [])
    for source in (distiller, nn.DataParallel(student), torch.compile(student)):
        export_student(source, tmp_path / 's.safetensors', size=(32, 48), progress=False)
        assert load_file(tmp_path / 's.safetensors').keys() == student.state_dict().keys()
    assert student.training and all(p.requires_grad for p in student.parameters())
    with Taps(student, {'f': 'head.bottleneck'}), pytest.raises(ValueError, match='forward hooks'): export_student(student, tmp_path / 't.pt2', size=(32, 48))


def test_reading_draws_nothing_and_gives_the_same_scores(run, tmp_path):
    export_student(run, tmp_path / 's.safetensors', progress=False)
    state = torch.get_rng_state()
    net, card = load_student(tmp_path / 's.safetensors')
    assert torch.equal(torch.get_rng_state(), state) and not net.training
    image = torch.randn(2, 3, 40, 56)
    with torch.no_grad(): assert torch.equal(main_output(net(image)), main_output(open_run(run)[0].eval()(image)))


@pytest.mark.parametrize('plan', [
    {'call': 'os.system', 'args': ['touch visited']}, {'call': 'kdnotes.networks.load_weights', 'args': []}, {'call': 'builtins.eval', 'args': ['1']},
    {'call': 'kdnotes.networks.pspnet', 'args': ['local-dir:/etc'], 'num_classes': 3}, {'call': 'kdnotes.networks.pspnet', 'args': ['resnet18'], 'num_classes': 3, 'pretrained': True},
    {'call': 'timm.models._factory.create_model', 'args': ['resnet18'], 'num_classes': 3, 'checkpoint_path': 'x.pth'},
    {'call': 'timm.models._factory.create_model', 'args': ['hf-hub:someone/something'], 'num_classes': 3},
    {'call': 'kdnotes.networks.tiny_student', 'args': [{'a': 1}]}, {'call': 'kdnotes.networks.tiny_student', 'args': ['__import__("os")']},
    {'call': 'kdnotes.networks.tiny_student', 'args': 8}, {'call': ['kdnotes.networks.tiny_student']}, 'kdnotes.networks.tiny_student', None, [], 3])
def test_a_strangers_plan_is_refused(run, tmp_path, plan):
    card = export_student(run, tmp_path / 's.safetensors', progress=False)
    card_path(tmp_path / 's.safetensors').write_text(json.dumps({**card, 'network': plan}))
    with pytest.raises(ValueError): load_student(tmp_path / 's.safetensors')


@pytest.mark.parametrize('text', ['', '{', '[]', '3', '{"kdnotes": "other"}', '{"kdnotes": "kdnotes student, format 1"}', '{"kdnotes": "kdnotes student, format 1", "file": 3}'])
def test_a_strangers_card_is_refused(tmp_path, text):
    (tmp_path / 's.safetensors').write_bytes(b''); card_path(tmp_path / 's.safetensors').write_text(text)
    with pytest.raises(ValueError, match='s.safetensors.json'): load_student(tmp_path / 's.safetensors')


def test_one_changed_byte_is_noticed(run, tmp_path):
    export_student(run, tmp_path / 's.safetensors', progress=False)
    data = bytearray((tmp_path / 's.safetensors').read_bytes()); data[-1] ^= 1; (tmp_path / 's.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='SHA-256 differs'): load_student(tmp_path / 's.safetensors')


def test_several_runs_have_to_be_named(run, tmp_path):
    many = shutil.copytree(run, tmp_path / 'many')
    for name in ('none-0', 'none-12', 'a-b-3'): shutil.copytree(run / 'runs/channel_wise-0', many / 'runs' / name)
    shutil.copytree(run / 'runs/channel_wise-0', many / 'runs/half-0'); (many / 'runs/half-0/record.json').unlink()       # not finished
    for which in ({}, {'method': 'none'}, {'seed': 0}, {'method': 'half'}):
        with pytest.raises(ValueError, match=r'finished runs fit .*\(method seed\): a-b 3, channel_wise 0, none 0, none 12$'): open_run(many, **which)
    assert [open_run(many, method=m, seed=s)[1]['seed'] for m, s in (('none', 12), ('a-b', None), (None, 12))] == [12, 3, 12]


def test_folders_that_do_not_fit(run, tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no settings.json'): export_student(tmp_path, tmp_path / 's.pt2')
    with pytest.raises(ValueError, match='students of another kind'): export_student(run, tmp_path / 's.pt2', recipe='camvid')
    with pytest.raises(ValueError, match="no recipe 'nonsense'"): export_student(run, tmp_path / 's.pt2', recipe='nonsense')
    assert left(tmp_path) == []


def test_a_run_says_how_its_images_come_and_other_folders_beside_it_do_not_matter(run, tmp_path):
    many = shutil.copytree(run, tmp_path / 'many')
    shutil.copytree(run / 'runs/channel_wise-0', many / 'runs/channel_wise-0.bak')
    assert open_run(many)[1]['input']['mean'] and export._input({'transform': 'Resize(3)'}) == {'image': 'float32 (B,3,H,W), as the data set of the run gives it'}


class Own(nn.Module):
    """A network that the package cannot build."""
    def __init__(self, width=4): super().__init__(); self.score = nn.Conv2d(3, width, 3, padding=1)
    def forward(self, image): return {'out': self.score(image)}


def test_a_network_of_ones_own_travels_by_its_builder(tmp_path):
    net, path = Own(), tmp_path / 's.safetensors'
    for about, why in (({}, 'pass it as `network`'), ({'network': network_plan(partial(Own, 4))}, 'Own. is no network of this package.*pass it as `network`')):
        card = export_student(net, path, size=(32, 48), about=about, progress=False)
        with pytest.raises(ValueError, match=why): load_student(path)
        assert torch.equal(load_student(path, network=Own())[0].score.weight, net.score.weight) and card['check']['largest difference'] == 0
    with pytest.raises(ValueError, match='does not fit the network'): load_student(path, network=Own(5))


def test_the_check_sees_odd_sides():
    for size in ((32, 48), (50, 50), (713, 713), (20, 30)):
        _, other = export._images(size, ('batch', 'height', 'width'))
        assert all(side % 2 for side in other.shape[2:]) and other.shape[2:] != size


@pytest.mark.parametrize('name', ['s', 's.bin', 's.pt'])
def test_unknown_endings_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r'should end in \.safetensors or \.onnx or \.pt2'): export_student(tiny_student(3), tmp_path / name, size=(32, 48))
    assert left(tmp_path) == []


def test_the_command(run, tmp_path):
    flags = ['--run', run, '--method', 'channel_wise', '--seed', 0, '--out', 'sub/s.pt2']
    done = subprocess.run([sys.executable, '-c', 'from kdnotes.export import export_cli; export_cli()', *map(str, flags)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 's.pt2: 21,672 parameters' in done.stdout and 'free: batch, height, width' in done.stdout
    assert left(tmp_path / 'sub') == ['s.pt2', 's.pt2.json']


def test_the_command_says_in_a_line_what_is_wrong(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end: export.export_cli(['--run', str(run), '--seed', '7', '--out', str(tmp_path / 's.pt2')])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith('kdnotes_export: 0 finished runs fit') and said.count('\n') == 1
