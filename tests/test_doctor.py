"""The doctor: planted faults are found, healthy runs are left alone, nothing is changed."""
import copy, math, random, time
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision.ops import box_convert

from kdnotes.data.datasets import IMAGENET_MEAN, IMAGENET_STD, Augmented, InMemory, collate, eval_transform
from kdnotes.data.scenes import TRAIN_SEED, Scenes
from kdnotes.distiller import Distiller, Term
from kdnotes.doctor import Finding, diagnose
from kdnotes.loop import Budget, evaluate, fit, train_supervised
from kdnotes.losses.attention_transfer import AttentionTransfer
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.losses.global_local import GlobalLocal
from kdnotes.losses.holistic import Critic, Holistic
from kdnotes.losses.intra_class_variation import IntraClassVariation
from kdnotes.losses.knowledge_adaptation import Affinity, KnowledgeAdaptation
from kdnotes.losses.local_affinity import LocalAffinity
from kdnotes.losses.pair_wise import PairWise
from kdnotes.losses.pixel_wise import PixelWise
from kdnotes.losses.soft_targets import SoftTargets
from kdnotes.networks import Stages, faster_rcnn, fcos, retinanet, ssd, tiny_depth_student, tiny_depth_teacher, tiny_student, tiny_teacher
from kdnotes.recipes import SCENES_MEAN, SCENES_STD, lesson
from kdnotes.tasks import Classification, Depth, Detection

FEATURE = 'head.bottleneck'


# --- what everything here is made of

def draw(room, *indices, width=96):
    whole = default_collate([room.data[i] for i in indices])
    return {k: whole[k][..., :width].contiguous() for k in ('image', 'mask')}


@pytest.fixture(scope='module')
def rooms():
    "Two lessons; the second's student has been distilled for a while."
    torch.set_num_threads(1)
    rooms = lesson(), lesson(seed=1)
    fit(Distiller(rooms[1].student, rooms[1].teacher, rooms[1].task, logits(PixelWise(), 1.)), rooms[1].data,
        budget=Budget(steps=12, batch_size=4, lr=.05), progress=False)
    return rooms


@pytest.fixture
def room(rooms): return rooms[0]


@pytest.fixture
def batch(room): return draw(room, 0, 1, 2, 3)


def logits(loss, weight=1., **kwargs): return [Term(loss, 'logits', weight, **kwargs)]
def feature(loss, weight, **kwargs): return [Term(loss, FEATURE, weight, **kwargs)]
def usual(): return [*logits(PixelWise(temperature=4.), .3), *feature(ChannelWise(), 3.)]


def ward(room, terms=None, *, student=None, teacher=None, kind=Distiller, **kwargs):
    "A healthy distiller with networks of its own."
    student, teacher = student or copy.deepcopy(room.student), teacher or copy.deepcopy(room.teacher)
    return kind(student, teacher, room.task, usual() if terms is None else terms, **kwargs)


def same_bytes(a, b): return a.dtype == b.dtype and torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def fingerprint(d, batch):
    "Everything that training depends on."
    flat = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)} | {f'teacher {k}': v for k, v in batch.get('teacher', {}).items()}
    state = {k: v for k, v in d.state_dict().items() if isinstance(v, torch.Tensor)}
    grads = {n: p.grad for n, p in d.named_parameters() if p.grad is not None}
    tensors = {k: v.detach().clone() for part in (flat, state, grads) for k, v in part.items()}
    tensors['torch'], tensors['python'] = torch.get_rng_state(), torch.tensor(hash(random.getstate()))
    tensors['numpy'] = torch.from_numpy(np.random.get_state()[1].copy().astype(np.int64))
    shells = [(n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in d.named_modules()]
    return tensors, (sorted(grads), shells, [(n, p.requires_grad) for n, p in d.named_parameters()], [t.weight for t in d.terms],
                     d.prepared, sorted(d.resized), {k: len(v) for k, v in d._seen.items()})


def assert_untouched(before, after):
    assert before[1] == after[1] and before[0].keys() == after[0].keys()
    assert [k for k, v in before[0].items() if not same_bytes(v, after[0][k])] == []


# --- healthy runs

METHODS = {
    'pixel-wise, T=4': lambda: logits(PixelWise(temperature=4.), .3),
    'pixel-wise, T=1': lambda: logits(PixelWise(), 10.),
    'channel-wise, scores': lambda: logits(ChannelWise(temperature=1.), 3.),
    'channel-wise, features': lambda: feature(ChannelWise(), 50.),
    'channel-wise, 3x3': lambda: feature(ChannelWise(), 5., adapter='3x3'),
    'pair-wise': lambda: feature(PairWise(), 10.),
    'local, distance': lambda: feature(LocalAffinity(), 1e-5),
    'local, cosine': lambda: feature(LocalAffinity(kind='cosine'), 1.),
    'attention': lambda: feature(AttentionTransfer(), 500.),
    'intra-class': lambda: feature(IntraClassVariation(8), 50.),
    'affinity': lambda: feature(Affinity(), 1.),
    'holistic, scores': lambda: logits(Holistic(Critic(8, width=4)), .1),
    'holistic beside others': lambda: [*logits(PixelWise(), 10.), *feature(PairWise(), 10.), *logits(Holistic(Critic(8, width=4), kind='hinge'), .1)],
    'knowledge adaptation': lambda: feature(KnowledgeAdaptation(32, 48, resize=True), .1),
    'global and local': lambda: feature(GlobalLocal(), 1.),
    'two terms': usual,
    'an adapter of its own': lambda: feature(ChannelWise(), 5., adapter=nn.Sequential(nn.Conv2d(32, 48, 1), nn.BatchNorm2d(48))),
    'other strides': lambda: [Term(ChannelWise(), ('backbone.stem', 'backbone.wide1'), 3.)],
}


def healthy(d, batch, **kwargs):
    diagnosis = diagnose(d, batch, **kwargs)
    if diagnosis.faults + diagnosis.warnings: pytest.fail(str(diagnosis))
    return diagnosis


@pytest.mark.parametrize('trained', [0, 1])
@pytest.mark.parametrize('name', METHODS)
def test_healthy_methods(rooms, name, trained):
    room = rooms[trained]
    d, i = ward(room, METHODS[name]()), list(METHODS).index(name)
    batch = draw(room, *((3 * i + 7 * trained + k) % 16 for k in range(2 + i % 3)), width=(96, 192)[i % 2])
    if i % 2 or 'knowledge' in name: d.prepare(batch, data=[batch])
    shares = healthy(d, batch).shares
    assert set(shares) == {'task', *(t.name for t in d.terms)} and math.isclose(sum(shares.values()), 1)


def test_healthy_plain_training(room, batch):
    assert healthy(Distiller(copy.deepcopy(room.student), None, room.task, []), batch).shares == {'task': 1.}


def test_healthy_unprepared_stage_one(room, batch):
    d = ward(room, METHODS['knowledge adaptation']())
    healthy(d, batch)
    assert not d.prepared and not d.terms[0].loss.fitted


def test_healthy_before_in_and_after_training(room, batch):
    d = ward(room, [*usual(), *METHODS['holistic, scores']()])
    healthy(d, batch)
    fit(d, room.data, budget=Budget(steps=6, batch_size=4, lr=.05), progress=False)
    optimizer = torch.optim.SGD(d.trainable(), lr=.05)
    healthy(d, batch, optimizer=optimizer)
    d(batch)['loss'].backward()                                  # between backward and the step: gradients, maps for the critic
    healthy(d, batch, optimizer=optimizer)
    optimizer.step(); d.update()
    healthy(d, batch, optimizer=optimizer)


@pytest.mark.parametrize('size', [1, 2, 3, 6])
def test_healthy_batch_sizes(room, size): healthy(ward(room), draw(room, *range(size)))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_healthy_dtypes(room, batch, dtype):
    d = ward(room).to(dtype)
    healthy(d, {**batch, 'image': batch['image'].to(dtype)})


def test_healthy_under_autocast(room, batch):
    with torch.autocast('cpu', torch.bfloat16): healthy(ward(room), batch)


def test_healthy_cached(room, batch):
    d = ward(room)
    d.prepare(batch)
    stored = {k: v.half() for k, v in d.their(batch).items()}
    assert set(stored) == {'logits', FEATURE}
    found = healthy(d, {**batch, 'teacher': stored}).findings
    assert sum(f.means == 'stored, and its own' for f in found) == 2


def test_healthy_in_wrappers(room, batch):
    d = ward(room)
    d.student = nn.DataParallel(d.student)
    healthy(nn.DataParallel(d), batch)


def test_healthy_compiled_by_the_distiller(room, batch):
    torch._dynamo.reset()
    d = ward(room)
    d.prepare(batch)
    with d.compiled('eager'):
        d(batch)
        was = d.student._compiled_call_impl
        healthy(d, batch)
        assert was is not None and d.student._compiled_call_impl is was
        d(batch)['loss'].backward()


def test_healthy_claims(room, batch):
    miou = diagnose(ward(room), batch).findings[0].measured
    healthy(ward(room), batch, claimed={'miou': miou}); healthy(ward(room), batch, claimed=1.3 * miou)


def test_healthy_frozen_batchnorm_zero_start_and_unlabelled_rest(room, batch):
    d = ward(room)
    nn.init.zeros_(d.student.head.classifier.weight); nn.init.zeros_(d.student.head.classifier.bias)
    for m in d.student.modules():
        if isinstance(m, nn.BatchNorm2d): m.requires_grad_(False)
    batch['mask'][:, 20:] = 255
    healthy(d, batch)
    batch['mask'][1:] = 255
    healthy(d, batch)


class Net(nn.Module):
    "A classifier of scenes by their most frequent class but road; `net` and a mean."
    def __init__(self, classes=10):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU())
        self.classifier = nn.Linear(24, classes)
    def forward(self, x): return self.classifier(self.features(x).mean((2, 3)))
    def get_classifier(self): return self.classifier


@pytest.fixture(scope='module')
def hues():
    "Classification of patches by hue: a trained teacher, a fresh student, batches of any size."
    torch.manual_seed(0)
    centres = torch.randn(10, 3)
    def draw(n, seed):
        g = torch.Generator().manual_seed(seed)
        label = torch.randint(10, (n,), generator=g)
        return {'image': centres[label][:, :, None, None] + .4 * torch.randn(n, 3, 16, 16, generator=g), 'label': label}
    teacher, student = Net(), Net()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=.02)
    for step in range(60):
        b = draw(64, step); loss = F.cross_entropy(teacher(b['image']), b['label'])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return teacher, student, draw


@pytest.mark.parametrize('size', [1, 4, 16, 64])
def test_healthy_classification(hues, size):
    teacher, student, draw = hues
    d = Distiller(copy.deepcopy(student), copy.deepcopy(teacher), Classification(10), logits(SoftTargets(), 1.))
    healthy(d, draw(size, 1000 + size), claimed={'top1': .95})
    d = Distiller(copy.deepcopy(student), copy.deepcopy(teacher), Classification(10), [Term(GlobalLocal(), 'features', .1)])
    healthy(d, draw(size, 2000 + size))


@pytest.mark.parametrize('seed', range(8))
def test_a_mediocre_classifier_is_not_called_ill_by_bad_luck(hues, seed):
    teacher, student, draw = hues
    class Mediocre(nn.Module):
        "Right in four of ten."
        def __init__(self): super().__init__(); self.net = copy.deepcopy(teacher)
        def forward(self, x):
            z = self.net(x); spoilt = (x.sum((1, 2, 3)) * 1e3).long() % 10 >= 4
            return torch.where(spoilt[:, None], z.roll(3, 1), z)
    d = Distiller(copy.deepcopy(student), Mediocre(), Classification(10), logits(SoftTargets(), 1.))
    diagnosis = diagnose(d, draw(8, 3000 + seed))
    if not diagnosis.ok: pytest.fail(str(diagnosis))


# --- planted faults

def ill(d, batch, expected, *, severity='fault', **kwargs):
    "The diagnosis has a finding of this severity that says `expected`."
    before = fingerprint(d, batch)
    diagnosis = diagnose(d, batch, **kwargs)
    assert_untouched(before, fingerprint(d, batch))
    hits = [f for f in diagnosis.findings if f.severity == severity and expected in f"{f.what} {f.means} {f.remedy}"]
    if not hits: pytest.fail(f"not found: {expected!r} in\n{diagnosis}")
    assert all(f.remedy for f in diagnosis.faults + diagnosis.warnings)
    return diagnosis


class Through(nn.Module):
    "A network with something done before and behind it."
    def __init__(self, net, before=lambda x: x, behind=lambda z: z):
        super().__init__(); self.net, self.before, self.behind = net, before, behind
    def forward(self, x): return {'out': self.behind(self.net(self.before(x))['out'])}
    def get_classifier(self): return self.net.get_classifier()


def behind(room, change): return ward(room, logits(PixelWise()), teacher=Through(copy.deepcopy(room.teacher), behind=change))
def before(room, change): return ward(room, logits(PixelWise()), teacher=Through(copy.deepcopy(room.teacher), before=change))


def plant(expected, severity='fault'):
    "Mark a function (room, batch) -> (distiller, batch, options) as a fault that must be found."
    return lambda f: FAULTS.update({f.__name__: (f, expected, severity)})
FAULTS = {}


# the teacher

@plant('little more than chance')
def never_loaded(room, batch): torch.manual_seed(1); return ward(room, teacher=tiny_teacher(8)), batch, {}

@plant('little more than chance')
def half_loaded(room, batch):
    d = ward(room); fresh = tiny_teacher(8)
    d.teacher.head.load_state_dict(fresh.head.state_dict()); return d, batch, {}

@plant('never loaded')
def statistics_not_loaded(room, batch):
    d = ward(room)
    for m in d.teacher.modules():
        if isinstance(m, nn.BatchNorm2d): m.reset_running_stats()
    return d, batch, {}

@plant('claimed')
def claims_too_much(room, batch): return ward(room), batch, {'claimed': {'miou': .95}}

@plant('in training mode')
def training_mode(room, batch): d = ward(room); d.teacher.train(); return d, batch, {}

class Stubborn(nn.Module):
    "Stays in training mode, whoever asks."
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x)
    def train(self, mode=True): return super().train(True)

@plant('in training mode')
def train_overridden(room, batch): return ward(room, logits(PixelWise()), teacher=Stubborn(copy.deepcopy(room.teacher))), batch, {}

@plant('changed by one step')
def one_batchnorm_trains(room, batch): d = ward(room); d.teacher.backbone.stem[1].train(); return d, batch, {}

class Restless(nn.BatchNorm2d):
    "In eval mode by name."
    def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, .1)

@plant('changed by one step')
def batchnorm_by_hand(room, batch):
    d = ward(room); m = d.teacher.head.bottleneck[1]; new = Restless(48); new.load_state_dict(m.state_dict())
    d.teacher.head.bottleneck[1] = new.requires_grad_(False).eval(); return d, batch, {}

@plant('two looks')
def batch_statistics(room, batch):
    d = ward(room)
    for m in d.teacher.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean = m.running_var = None; m.track_running_stats = False
    return d, batch, {}

@plant('two looks')
def functional_dropout(room, batch): return behind(room, lambda z: F.dropout(z, .05)), batch, {}

@plant('want a gradient')
def one_parameter_wants(room, batch): d = ward(room); d.teacher.head.classifier.bias.requires_grad_(True); return d, batch, {}

@plant('hold a gradient')
def holds(room, batch): d = ward(room); p = d.teacher.backbone.stem[0].weight; p.grad = torch.full_like(p, 1e-3); return d, batch, {}

class Graph(Distiller):
    "Runs the teacher with its graph."
    def their(self, batch): return self.listen(self.teacher, batch['image'], 1)[1]

class Leaky(nn.Module):
    "Does not detach the teacher."
    def forward(self, s, t): return F.mse_loss(s, t)

@plant('would train the teacher')
def teacher_gets_gradients(room, batch):
    d = ward(room, logits(Leaky()), kind=Graph); d.teacher.requires_grad_(True); return d, batch, {}

@plant('share')
def same_object(room, batch): net = copy.deepcopy(room.student); return ward(room, logits(PixelWise()), student=net, teacher=net), batch, {}

@plant('are equal')
def equal_copies(room, batch):
    net = copy.deepcopy(room.student); d = ward(room, logits(PixelWise()), student=net, teacher=copy.deepcopy(net))
    d.student(batch['image']); return d, batch, {}

@plant('share')
def shared_memory(room, batch): d = ward(room); d.student.head.classifier.bias.data = d.teacher.head.classifier.bias.data; return d, batch, {}

@plant('NaN')
def nan_weight(room, batch): d = ward(room); d.student.backbone.down[0].weight.data[0, 0, 0, 0] = math.inf; return d, batch, {}

@plant('NaN')
def nan_pixel(room, batch): batch['image'][0, 0, 0, 0] = math.nan; return ward(room), batch, {}


# classes, pictures, labels

@plant('another order of classes')
def two_rows_exchanged(room, batch):
    d = ward(room); c = d.teacher.head.classifier; order = [0, 1, 3, 2, *range(4, 8)]
    c.weight.data, c.bias.data = c.weight.data[order].clone(), c.bias.data[order].clone(); return d, batch, {}

@plant('another order of classes')
def labels_count_from_one(room, batch): batch['mask'] = (batch['mask'] + 1) % 8; return ward(room), batch, {}

@plant("number of classes")
def other_number_of_classes(room, batch): return ward(room, teacher=tiny_teacher(9)), batch, {}

@plant("number of classes")
def other_number_of_classes_student(room, batch): return ward(room, logits(PixelWise()), student=tiny_student(7)), batch, {}

def unit(x): return x * torch.tensor(SCENES_STD).view(3, 1, 1) + torch.tensor(SCENES_MEAN).view(3, 1, 1)

@plant('gained by')
def images_in_bytes(room, batch): batch['image'] = 255 * unit(batch['image']); return ward(room), batch, {}

@plant('gained by')
def images_not_normalised(room, batch): batch['image'] = unit(batch['image']); return ward(room), batch, {}

@plant('gained by')
def normalised_twice(room, batch):
    batch['image'] = (batch['image'] - torch.tensor(SCENES_MEAN).view(3, 1, 1)) / torch.tensor(SCENES_STD).view(3, 1, 1); return ward(room), batch, {}

@plant('gained by')
def teacher_of_another_pipeline(room, batch):
    "It was trained on colours in 0..255, mean taken away."
    return before(room, lambda x: x / 57), batch, {}

@plant('computed before the step failed')
def images_are_bytes(room, batch): batch['image'] = (255 * unit(batch['image'])).to(torch.uint8); return ward(room), batch, {}

@plant('every label is ignored')
def all_ignored(room, batch): batch['mask'].fill_(255); return ward(room), batch, {}

@plant('neither a class nor')
def void_is_another_number(room, batch): batch['mask'][0, :5] = 254; return ward(room), batch, {}

@plant('in another order of the images')
def labels_shuffled(room, batch): batch['mask'] = batch['mask'].roll(1, 0); return ward(room), batch, {}

@plant('mirrored')
def labels_not_mirrored(room, batch): batch['image'] = batch['image'].flip(-1); return ward(room), batch, {}


# stored answers

def with_stored(room, batch, change, terms=None):
    d = ward(room, terms); d.prepare(batch)
    batch['teacher'] = {k: change(v).half() for k, v in d.their(batch).items()}; return d, batch, {}

@plant('of other images of this batch')
def cache_shuffled(room, batch): return with_stored(room, batch, lambda v: v[[2, 0, 3, 1]])

@plant('they are mirrored')
def cache_mirrored(room, batch): return with_stored(room, batch, lambda v: v.flip(-1))

@plant('another augmentation or another teacher')
def cache_of_another_augmentation(room, batch): return with_stored(room, batch, lambda v: v.roll(2, 3))

@plant('another augmentation or another teacher')
def cache_of_another_teacher(rooms_, batch):
    d, batch, options = with_stored(rooms_, batch, lambda v: v)
    other = lesson(seed=5).teacher
    batch['teacher']['logits'] = other(batch['image'])['out'].detach(); return d, batch, options

@plant('the live teacher gives')
def cache_of_another_size(room, batch): return with_stored(room, batch, lambda v: F.interpolate(v, scale_factor=2), logits(PixelWise(), adapter=nn.Upsample(scale_factor=2)))

@plant('write the cache with these places')
def cache_without_the_place(room, batch): d, batch, o = with_stored(room, batch, lambda v: v); del batch['teacher'][FEATURE]; return d, batch, o

@plant('NaN')
def cache_overflowed(room, batch): return with_stored(room, batch, lambda v: 1e6 * v)


# terms

@plant('switched off')
def weight_zero(room, batch): return ward(room, logits(PixelWise(), 0.)), batch, {}

@plant('switched off')
def one_of_two_at_zero(room, batch): return ward(room, [*logits(PixelWise(), .3), *feature(ChannelWise(), 0.)]), batch, {}

@plant('distillation is off')
def no_terms(room, batch): return ward(room, []), batch, {}

@plant('as good as off')
def vanishing(room, batch): return ward(room, logits(PixelWise(), 1e-5)), batch, {}

@plant('labels are as good as off')
def dominating(room, batch): return ward(room, feature(PairWise(), 1e6)), batch, {}

@plant('labels are faint', 'warning')
def heavy(room, batch): return ward(room, logits(PixelWise(), 3e3)), batch, {}

class Reads(nn.Module):
    "Reads the student's values."
    def forward(self, s, t): return PixelWise()(s.detach().clone().requires_grad_(), t)

@plant('does not depend')
def detached_in_the_loss(room, batch): return ward(room, logits(Reads())), batch, {}

class Swapped(nn.Module):
    "Teacher first."
    def forward(self, s, t): return ChannelWise()(t, s)

@plant('does not depend')
def exchanged(room, batch): return ward(room, logits(Swapped())), batch, {}

class NoGrad(nn.Module):
    "A head that runs without a graph."
    def __init__(self, net): super().__init__(); self.net, self.probe = net, nn.Conv2d(8, 8, 1)
    def forward(self, x):
        out = self.net(x)
        with torch.no_grad(): self.probe(out['out'])
        return out

@plant('detached')
def detached_at_the_place(room, batch):
    return ward(room, [Term(PixelWise(), ('probe', 'logits'), 1.)], student=NoGrad(copy.deepcopy(room.student))), batch, {}

class Cut(nn.Module):
    "An adapter in front of which the gradient ends."
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(32, 48, 1)
    def forward(self, x): return self.conv(x.data)

@plant('only the adapter')
def adapter_learns_alone(room, batch): return ward(room, feature(ChannelWise(), 3., adapter=Cut())), batch, {}

@plant('size 1')
def softmax_over_one_position(room, batch):
    class Pooled(nn.Module):
        def __init__(self, net, c): super().__init__(); self.net, self.pool = net, nn.AdaptiveAvgPool2d(1)
        def forward(self, x): z = self.net(x)['out']; return {'out': z + 0 * self.pool(z)}
    return ward(room, [Term(ChannelWise(), 'pool', 5.)], student=Pooled(copy.deepcopy(room.student), 32), teacher=Pooled(copy.deepcopy(room.teacher), 48)), batch, {}

class Mean(nn.Module):
    "Softmax over the one channel it has made."
    any_channels = True
    def forward(self, s, t): return PixelWise()(s.mean(1, keepdim=True), t.mean(1, keepdim=True))

@plant('exactly 0')
def constant(room, batch): return ward(room, feature(Mean(), 3.)), batch, {}

class Constant(nn.Module):
    "A layer that gives one answer for all."
    def __init__(self, net): super().__init__(); self.net, self.token = net, nn.Linear(1, 8)
    def forward(self, x):
        out = self.net(x); token = self.token(torch.ones(len(x), 1))
        return {'out': out['out'] + 0 * token[:, :, None, None]}

@plant('the same for all')
def token_instead_of_features(room, batch):
    return ward(room, [Term(SoftTargets(), 'token', 1.)], student=Constant(copy.deepcopy(room.student)), teacher=Constant(copy.deepcopy(room.teacher))), batch, {}

@plant('all are one number')
def dead_layer(room, batch):
    d = ward(room); d.teacher.head.bottleneck[1].bias.data.fill_(-1e4); return d, batch, {}


# places

@plant('layers of like depth')
def first_layer_against_last(room, batch): return ward(room, [Term(ChannelWise(), ('backbone.stem', FEATURE), 3.)]), batch, {}

@plant('differ in map size')
def strides_differ(room, batch): return ward(room, [Term(PairWise(), ('backbone.stem', 'backbone.down'), 3., adapter=None)]), batch, {}

@plant('of nearly equal stride')
def strides_far_apart(room, batch):
    class Deep(nn.Module):
        def __init__(self, net): super().__init__(); self.net, self.far = net, nn.AvgPool2d(8)
        def forward(self, x): z = self.net(x)['out']; self.far(z); return {'out': z + 0 * self.far(z).mean((2, 3), keepdim=True)}
    class Once(Deep):
        def forward(self, x): z = self.net(x)['out']; return {'out': z + 0 * self.far(z).mean((2, 3), keepdim=True)}
    return ward(room, [Term(ChannelWise(), ('far', 'logits'), 3.)], student=Once(copy.deepcopy(room.student))), batch, {}

@plant('does not pass', 'warning')
def off_the_way(room, batch):
    class Aside(nn.Module):
        def __init__(self, net): super().__init__(); self.net, self.aside = net, nn.Conv2d(3, 8, 3, 4, 1)
        def forward(self, x): self.aside(x); return self.net(x)
    return ward(room, [Term(ChannelWise(), ('aside', 'logits'), 3.)], student=Aside(copy.deepcopy(room.student))), batch, {}

@plant('has not run')
def bypassed(room, batch):
    class Bypass(nn.Module):
        def __init__(self, net): super().__init__(); self.net, self.unused = net, nn.Conv2d(8, 8, 1)
        def forward(self, x): return self.net(x)
    return ward(room, [Term(ChannelWise(), ('unused', 'logits'), 3.)], student=Bypass(copy.deepcopy(room.student))), batch, {}

@plant('has not run')
def hooks_removed(room, batch):
    class Clears(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x):
            for m in self.net.modules(): m._forward_hooks.clear()
            return self.net(x)
    return ward(room, [Term(ChannelWise(), ('net.' + FEATURE, FEATURE), 3.)], student=Clears(copy.deepcopy(room.student))), batch, {}

@plant('has not run')
def compiled_before_it_was_tapped(room, batch):
    d = ward(room); d.student.compile(backend='eager'); d.student(batch['image']); return d, batch, {}

@plant('has not run')
def compiled_teacher_in_a_wrapper(room, batch):
    d = ward(room); d.teacher = torch.compile(d.teacher, backend='eager').eval()
    with torch.no_grad(): d.teacher(batch['image'])
    return d, batch, {}


# plumbing

class Unweighted(Distiller):
    "Forgets the weights."
    def forward(self, batch, *args):
        parts = super().forward(batch, *args)
        return {**parts, 'loss': sum(v for k, v in parts.items() if k != 'loss')}

@plant('weighted sum')
def weights_forgotten(room, batch): return ward(room, kind=Unweighted), batch, {}

class Twice(Distiller):
    "Looks at the student once more."
    def forward(self, batch, *args): self.student(batch['image']); return super().forward(batch, *args)

@plant('plain training')
def student_runs_twice(room, batch): return ward(room, kind=Twice), batch, {}

@plant('overwritten')
def normalises_in_place(room, batch):
    def clip(x): return x.clamp_(-1, 1)
    return before(room, clip), batch, {}

@plant('student in training mode')
def student_in_eval_mode(room, batch): d = ward(room); d.student.eval(); return d, batch, {}

@plant('does not reach it')
def student_stays_in_eval_mode(room, batch):
    class Asleep(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return self.net(x)
        def train(self, mode=True): return super().train(False)
    return ward(room, logits(PixelWise()), student=Asleep(copy.deepcopy(room.student))), batch, {}

@plant('student that is frozen')
def student_frozen(room, batch): d = ward(room); d.student.requires_grad_(False); return d, batch, {}

@plant('student that is frozen')
def backbone_frozen(room, batch): d = ward(room); d.student.backbone.requires_grad_(False); return d, batch, {}

@plant('adapters that is frozen')
def adapter_frozen(room, batch): d = ward(room); d.prepare(batch); d.adapters.requires_grad_(False); return d, batch, {}

@plant('adapters that is frozen')
def adaptation_frozen(room, batch):
    d = ward(room, METHODS['knowledge adaptation']()); d.prepare(batch, data=[batch]); d.losses.requires_grad_(False); return d, batch, {}

@plant('does not learn')
def critic_at_rest(room, batch):
    d = ward(room, METHODS['holistic, scores']())
    for g in d.terms[0].loss.own_step.param_groups: g['lr'] = 0.
    return d, batch, {}

@plant('does not learn')
def critic_of_another_optimiser(room, batch):
    d = ward(room, METHODS['holistic, scores']()); d.terms[0].loss.critic = Critic(8, width=4).requires_grad_(False); return d, batch, {}

class Forgetful(Distiller):
    "Lists the student alone."
    def trainable(self): return list(self.student.parameters())

@plant('adapters missing')
def adapters_not_listed(room, batch): d = ward(room, kind=Forgetful); d.prepare(batch); return d, batch, {}

@plant('missing from the optimiser')
def optimiser_too_early(room, batch):
    d = ward(room); optimizer = torch.optim.AdamW(d.trainable()); d.prepare(batch); return d, batch, {'optimizer': optimizer}

@plant('missing from the optimiser')
def optimiser_of_another_student(room, batch): return ward(room), batch, {'optimizer': torch.optim.SGD(copy.deepcopy(room.student).parameters(), lr=.1)}

@plant('not to be trained', 'warning')
def optimiser_of_everything(room, batch): d = ward(room); d.prepare(batch); return d, batch, {'optimizer': torch.optim.SGD(d.parameters(), lr=.1)}


# a second set, made when the checks were done, to fool them

@plant('changed by one step')
def teacher_follows_the_student(room, batch):
    d = ward(room, logits(PixelWise())); w = d.teacher.head.classifier.weight
    d.student.register_forward_hook(lambda *_: w.data.mul_(.999) and None); return d, batch, {}

@plant('two looks')
def teacher_remembers(room, batch):
    class Memo(Through):
        def forward(self, x):
            if not hasattr(self, 'kept'): self.kept = super().forward(x)
            return self.kept
    return ward(room, logits(PixelWise()), teacher=Memo(copy.deepcopy(room.teacher))), batch, {}

class Elsewhere(Distiller):
    "Asks the teacher about other images."
    def their(self, batch): return super().their({**batch, 'image': batch['image'].roll(1, 0)})

@plant('of other images of this batch')
def teacher_is_asked_elsewhere(room, batch): return ward(room, kind=Elsewhere), batch, {}

@plant('another augmentation or another teacher')
def cache_of_probabilities(room, batch): return with_stored(room, batch, lambda v: v.softmax(1))

@plant('another augmentation or another teacher')
def cache_written_in_training_mode(room, batch):
    d, batch, o = with_stored(room, batch, lambda v: v, logits(PixelWise()))
    wrong = copy.deepcopy(room.teacher).train()(batch['image'])['out'].detach()
    batch['teacher'] = {'logits': wrong}; return d, batch, o

@plant('of other images of this batch')
def cache_with_two_exchanged(room, batch): return with_stored(room, batch, lambda v: v[[0, 2, 1, 3]])

@plant('another order of classes')
def three_in_a_circle(room, batch): return behind(room, lambda z: z[:, [2, 0, 1, 3, 4, 5, 6, 7]]), batch, {}

class Dents(nn.Module):
    "Overwrites the map it was given, behind autograd's back."
    any_channels = True
    def forward(self, s, t): loss = PairWise()(s.clone(), t); s.data.mul_(1.1); return loss

@plant('plain training')
def loss_overwrites_its_input(room, batch): return ward(room, feature(Dents(), 1.)), batch, {}

class Silent:
    "A task whose loss carries no gradient."
    def __init__(self, task): self.task = task
    def __getattr__(self, name): return getattr(self.task, name)
    def loss(self, *args): return self.task.loss(*args).detach()

@plant('labels are as good as off')
def task_detached(room, batch): d = ward(room); d.task = Silent(room.task); return d, batch, {}

class Greedy(Distiller):
    "Trains whatever is there."
    def trainable(self): return list(self.parameters())

@plant('the optimiser will move the teacher')
def everything_is_trained(room, batch): return ward(room, kind=Greedy), batch, {}

class Doubled(Distiller):
    "Counts its terms twice."
    def forward(self, batch, *args):
        parts = super().forward(batch, *args); return {**parts, 'loss': parts['loss'] + .3 * parts['pixel_wise']}

@plant('weighted sum')
def a_term_counts_twice(room, batch): return ward(room, kind=Doubled), batch, {}

@plant('little more than chance')
def labels_of_one_class(room, batch): batch['mask'].fill_(3); return ward(room), batch, {}

@plant('little more than chance')
def teacher_without_its_head(room, batch):
    torch.manual_seed(0)
    d = ward(room); nn.init.normal_(d.teacher.head.classifier.weight, std=.01); nn.init.zeros_(d.teacher.head.classifier.bias); return d, batch, {}

@plant('in training mode')
def dropout_of_the_teacher_is_on(room, batch):
    d = ward(room); d.teacher.head.dropout.train(); return d, batch, {}

@plant('as good as off')
def one_term_drowns_another(room, batch): return ward(room, [*logits(PixelWise(), .1), *feature(LocalAffinity(), 10.)]), batch, {}

@pytest.mark.parametrize('name', FAULTS)
def test_planted(room, batch, name):
    make, expected, severity = FAULTS[name]
    d, batch, options = make(room, batch)
    ill(d, batch, expected, severity=severity, **options)


def test_what_it_cannot_see(room, batch):
    "Two classes that this teacher hardly ever finds, exchanged: nothing to be measured."
    d = behind(room, lambda z: z[:, [0, 1, 2, 3, 4, 5, 7, 6]])
    assert diagnose(d, batch).ok


def test_nothing_changes_in_the_middle_of_a_run(room, batch):
    "Gradients, kept maps, unprepared adapters, modes, generators."
    d = ward(room, [*usual(), *METHODS['holistic, scores'](), *METHODS['knowledge adaptation']()])
    for prepared in (False, True):
        if prepared: d.prepare(batch, data=[batch]); d(batch)['loss'].backward(); assert d._seen
        d.student.backbone.stem[1].eval()
        before = fingerprint(d, batch)
        diagnose(d, batch)
        assert_untouched(before, fingerprint(d, batch))


def test_few_passes(room, batch):
    d, passes = ward(room, [*usual(), *METHODS['holistic, scores']()]), {'student': 0, 'teacher': 0}
    for name in passes: getattr(d, name).register_forward_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))
    start = time.process_time()
    diagnose(d, batch)
    assert time.process_time() - start < 20 and max(passes.values()) <= 20, passes


def test_the_same_is_said_twice(room, batch):
    d = ward(room)
    assert str(diagnose(d, batch)) == str(diagnose(d, batch))


def test_a_task_that_counts_wrongly_is_warned_of(room, batch):
    class Counts(type(room.task)):
        def count(self, batch): return torch.tensor(float(len(batch['image'])))
    d = ward(room)
    d.task = Counts(8)
    d.student.head.classifier.bias.data[1] = 5.                       # easy labels, and few of them, in the second half
    batch['mask'][2:] = 255
    batch['mask'][2, :4] = 1
    assert not any('task.count' in f.means for f in diagnose(ward(room, student=d.student), batch).warnings)
    assert any('task.count' in f.means for f in diagnose(d, batch).warnings)


def test_a_loss_across_images_is_noted(room, batch):
    notes = diagnose(ward(room, METHODS['global and local']()), batch).findings
    assert any('spans the batch' in f.means and f.severity == 'note' for f in notes)


def test_bad_input(room, batch):
    with pytest.raises(TypeError, match='expected a Distiller, got a SegmentationNet'): diagnose(room.student, batch)
    with pytest.raises(ValueError, match='images .B,C,H,W. under'): diagnose(ward(room), {'mask': batch['mask']})
    with pytest.raises(ValueError, match='above 0'): diagnose(ward(room), batch, claimed={'miou': -1})
    with pytest.raises(ValueError, match='does not measure'): diagnose(ward(room), batch, claimed={'mIoU': .7})


def test_a_finding_reads_as_lines_and_as_a_table(room, batch):
    diagnosis = diagnose(ward(room, []), batch)
    assert not diagnosis.ok and diagnosis.verdict.startswith('Not as it should be: faults: 1')
    assert 'remedy: give' in str(diagnosis) and '| fault | terms |' in diagnosis._repr_markdown_()
    assert all(isinstance(f, Finding) and f.severity in ('fault', 'warning', 'note') for f in diagnosis.findings)


# --- detection and depth: what they are made of

COLOURS = torch.tensor([[1.5, -1, -1], [-1, 1.5, -.6], [-.8, -.8, 1.6]])[:, :, None, None]
LEVEL = 'net.backbone.levels.'


def coloured(seed, size=(64, 64)):
    "Boxes of three colours, their classes, on noise."
    g = torch.Generator().manual_seed(seed)
    image, boxes, labels = .4 * torch.randn(3, *size, generator=g), [], []
    for _ in range(6):
        w, h, c = (int(torch.randint(*ends, (1,), generator=g)) for ends in ((8, 25), (8, 25), (0, 3)))
        x, y = (int(torch.randint(side - k + 1, (1,), generator=g)) for side, k in ((size[1], w), (size[0], h)))
        if any(x < b[2] and b[0] < x + w and y < b[3] and b[1] < y + h for b in boxes): continue
        image[:, y:y + h, x:x + w] += COLOURS[c]
        boxes.append([x, y, x + w, y + h]); labels.append(c)
    return {'image': image, 'boxes': torch.tensor(boxes).float(), 'labels': torch.tensor(labels)}


def body(a, b, c):
    return Stages(OrderedDict(down4=nn.Sequential(*(nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((3, a), (a, b)))),
                              down8=nn.Sequential(nn.Conv2d(b, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU())))


DETECTORS = {'fcos': partial(fcos, num_classes=3, extra=None, convs=1),
             'retinanet': partial(retinanet, num_classes=3, extra=None, convs=1, norm=True, ratios=(1.,)),
             'ssd': partial(ssd, num_classes=3, extra=(32,))}
WIDTHS = {'teacher': (16, 24, 32), 'student': (8, 12, 16)}


def detector(kind, who):
    channels = {} if kind == 'ssd' else {'channels': WIDTHS[who][2]}
    return DETECTORS[kind](body(*WIDTHS[who]), **channels)


def built(make, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args)


@pytest.fixture(scope='module')
def found_boxes():
    "Three kinds of detectors: task, data, teacher trained for ten seconds, fresh student, student after a few steps."
    task, data, rooms = Detection(3), [coloured(i) for i in range(48)], {}
    for kind in DETECTORS:
        teacher, fresh = built(detector, kind, 'teacher'), built(detector, kind, 'student')
        train_supervised(teacher, task, data, budget=Budget(steps=60 if kind == 'ssd' else 120, batch_size=8, lr=.01, optimizer='adamw', clip=5.), progress=False)
        later = copy.deepcopy(fresh)
        train_supervised(later, task, data, budget=Budget(steps=10, batch_size=8, lr=.01, optimizer='adamw'), progress=False)
        rooms[kind] = SimpleNamespace(task=task, data=data, teacher=teacher, students=(fresh, later))
    return rooms


@pytest.fixture(scope='module')
def depths():
    "Depth as a number, and in bins."
    data, rooms = Augmented(InMemory(Scenes(16, first_seed=TRAIN_SEED, keys=('image', 'depth'), size=(48, 96))), eval_transform(mean=SCENES_MEAN, std=SCENES_STD)), {}
    for kind, bins in (('regressor', None), ('bins', 12)):
        task = Depth(nearest=1.5, farthest=80., bins=bins)
        teacher, fresh = built(tiny_depth_teacher, task.num_classes), built(tiny_depth_student, task.num_classes)
        train_supervised(teacher, task, data, budget=Budget(steps=40, batch_size=4, lr=.005, optimizer='adamw'), progress=False)
        later = copy.deepcopy(fresh)
        train_supervised(later, task, data, budget=Budget(steps=8, batch_size=4, lr=.005, optimizer='adamw'), progress=False)
        rooms[kind] = SimpleNamespace(task=task, data=data, teacher=teacher, students=(fresh, later))
    return rooms


def of(room, *indices): return collate([room.data[i] for i in indices])
def levels(loss, weight=1., each=(0, 1)): return [Term(loss, f'{LEVEL}{i}', weight, name=f'level{i}') for i in each]


def told(room, terms, *, student=None, teacher=None, task=None, kind=Distiller):
    "A distiller with networks of its own."
    return kind(student or copy.deepcopy(room.students[0]), teacher or copy.deepcopy(room.teacher), task or room.task, terms)


# --- their healthy runs

ON_BOXES = {
    'pixel-wise': lambda: logits(PixelWise(), 5.), 'channel-wise, every level': lambda: levels(ChannelWise(), 1.),
    'pair-wise': lambda: levels(PairWise(), 1., (1,)), 'attention': lambda: levels(AttentionTransfer(), 100.),
    'local': lambda: levels(LocalAffinity(kind='cosine'), 1.), 'two terms': lambda: [*logits(PixelWise(temperature=2.), 1.), *levels(ChannelWise(), 1.)]}
ON_DEPTH = {
    'channel-wise': lambda: feature(ChannelWise(), 1.), 'pair-wise': lambda: feature(PairWise(), 1.), 'attention': lambda: feature(AttentionTransfer(), 100.),
    'affinity': lambda: feature(Affinity(), 1.), 'local': lambda: feature(LocalAffinity(kind='cosine'), 1.),
    'holistic': lambda: [*feature(PairWise(), 1.), *logits(Holistic(Critic(1, width=4)), .5)]}
ON_BINS = {**ON_DEPTH, 'pixel-wise': lambda: logits(PixelWise(), 1.), 'intra-class': lambda: feature(IntraClassVariation(12), 10.),
           'holistic': lambda: logits(Holistic(Critic(12, width=4)), .3)}


@pytest.mark.parametrize('later', [0, 1])
@pytest.mark.parametrize('kind, name', [(k, n) for k in DETECTORS for n in ON_BOXES])
def test_healthy_detectors(found_boxes, kind, name, later):
    room, i = found_boxes[kind], list(ON_BOXES).index(name)
    terms = ON_BOXES[name]()
    d = told(room, terms, student=copy.deepcopy(room.students[later]))
    batch = of(room, *((5 * i + 11 * later + k) % 48 for k in range(2 + i % 4)))
    if i % 2: d.prepare(batch)
    shares = healthy(d, batch).shares
    assert set(shares) == {'task', *(t.name for t in terms)} and math.isclose(sum(shares.values()), 1)


@pytest.mark.parametrize('later', [0, 1])
@pytest.mark.parametrize('kind, name', [*(('regressor', n) for n in ON_DEPTH), *(('bins', n) for n in ON_BINS)])
def test_healthy_depth(depths, kind, name, later):
    room, methods = depths[kind], ON_DEPTH if kind == 'regressor' else ON_BINS
    i = list(methods).index(name)
    d, batch = told(room, methods[name](), student=copy.deepcopy(room.students[later])), of(room, *((3 * i + 7 * later + k) % 16 for k in range(1 + i % 4)))
    if i % 2: d.prepare(batch)
    healthy(d, batch)


@pytest.mark.parametrize('kind', ['fcos', 'retinanet', 'ssd'])
def test_healthy_claims_for_boxes(found_boxes, kind):
    room = found_boxes[kind]
    whole = evaluate(room.teacher, room.task, room.data)
    for i in range(0, 48, 12): healthy(told(room, logits(PixelWise(), 5.)), of(room, *range(i, i + 6)), claimed={k: whole[k] for k in ('map', 'map50')})


@pytest.mark.parametrize('kind', ['regressor', 'bins'])
def test_healthy_claims_for_depth(depths, kind):
    room = depths[kind]
    whole = evaluate(room.teacher, room.task, room.data)
    for i in range(0, 16, 4): healthy(told(room, feature(ChannelWise(), 1.)), of(room, *range(i, i + 4)), claimed=whole)


def test_healthy_depth_marked_in_other_ways(depths):
    "Half of it unknown, by 0 or by NaN."
    room = depths['regressor']
    batch = of(room, 0, 1)
    for mark in (0., math.nan):
        batch['depth'][:, :24] = mark
        healthy(told(room, feature(ChannelWise(), 1.)), batch)


@pytest.mark.parametrize('kind', ['fcos', 'regressor'])
def test_healthy_cached_answers(found_boxes, depths, kind):
    room = {**found_boxes, **depths}[kind]
    d, batch = told(room, [*logits(PixelWise(), 5.), *levels(ChannelWise())] if kind == 'fcos' else feature(ChannelWise(), 1.)), of(room, 0, 1, 2)
    d.prepare(batch)
    batch['teacher'] = {k: v.half() for k, v in d.their(batch).items()}
    assert sum(f.means == 'stored, and its own' for f in healthy(d, batch).findings) == len(d.terms)


def test_two_stages_run(found_boxes):
    "Faster R-CNN draws proposals at random, and looks steady nevertheless; its teacher here knows nothing, which is said."
    room = found_boxes['fcos']
    make = partial(faster_rcnn, num_classes=3, hidden=16, box_batch_size_per_image=32)
    student, teacher = (built(lambda w=w: make(body(*WIDTHS[w]), channels=16)) for w in ('student', 'teacher'))
    diagnosis = diagnose(told(room, [*logits(PixelWise(), 1e3), *levels(ChannelWise())], student=student, teacher=teacher), of(room, 0, 1, 2, 3))
    assert len(diagnosis.faults + diagnosis.warnings) == 1 and 'true boxes' in (diagnosis.faults + diagnosis.warnings)[0].what, str(diagnosis)


def test_a_fifth_task_gets_the_checks_that_need_no_truth(depths):
    class Brightness:
        "Something per pixel that this page has never heard of."
        name, metric, higher_is_better = 'brightness', 'error', False
        def logits(self, output): return output['out']
        def loss(self, output, batch): return (output['out'].mean((2, 3)) - batch['image'].mean((1, 2, 3))[:, None]).square().mean()
        def labels(self, batch): raise ValueError('there are none')
        num_classes = 1
    room = depths['regressor']
    batch = {'image': of(room, 0, 1)['image']}
    healthy(told(room, feature(ChannelWise(), 1.), task=Brightness()), batch)
    d = told(room, feature(ChannelWise(), 0.), task=Brightness())
    ill(d, batch, 'switched off')


# --- their planted faults

def plant_for(shelf, expected, severity='fault'):
    "Mark a function (room, batch) -> (distiller, batch, options) as a fault of a task."
    return lambda f: shelf.update({f.__name__: (f, expected, severity)})
BOXED, MEASURED = {}, {}
def at_boxes(*args): return plant_for(BOXED, *args)
def at_depth(*args): return plant_for(MEASURED, *args)
def usual_boxes(room, **kwargs): return told(room, [*logits(PixelWise(), 5.), *levels(ChannelWise())], **kwargs)
def usual_depth(room, **kwargs): return told(room, feature(ChannelWise(), 1.), **kwargs)
def changed_depth(room, change):
    return told(room, [Term(ChannelWise(), (FEATURE, 'net.' + FEATURE), 1.)], teacher=Through(copy.deepcopy(room.teacher), behind=change))


def moved(batch, change):
    "Every true box changed, fillers left alone."
    own = batch['labels'] >= 0
    batch['boxes'][own] = change(batch['boxes'][own])
    return batch


@at_boxes('boxes without area')
def sides_for_corners(room, batch): return usual_boxes(room), moved(batch, lambda b: box_convert(b, 'xyxy', 'xywh')), {}

@at_boxes('boxes without area')
def corners_exchanged(room, batch): return usual_boxes(room), moved(batch, lambda b: b[:, [2, 3, 0, 1]]), {}

@at_boxes('fillers carry')
def filled_with_class_0(room, batch): batch['labels'][batch['labels'] < 0] = 0; return usual_boxes(room), batch, {}

@at_boxes('in 0..1, not in pixels')
def normalised(room, batch): return usual_boxes(room), moved(batch, lambda b: b / 64), {}

@at_boxes('centre outside')
def of_the_picture_before_it_was_resized(room, batch): return usual_boxes(room), moved(batch, lambda b: 4 * b), {}

@at_boxes('doubling the boxes')
def of_a_smaller_picture(room, batch): return usual_boxes(room), moved(batch, lambda b: b / 2), {}

@at_boxes('(y1, x1, y2, x2)')
def rows_first(room, batch): return usual_boxes(room), moved(batch, lambda b: b[:, [1, 0, 3, 2]]), {}

@at_boxes('(x, y, width, height)')
def sides_that_look_like_corners(room, batch):
    "One thing in the upper left of each picture: it has an area either way."
    image, g = .4 * torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    boxes = torch.cat([torch.randint(8, 13, (16, 1, 2), generator=g), torch.randint(18, 25, (16, 1, 2), generator=g)], 2)
    for i, (x, y, w, h) in enumerate(boxes[:, 0].tolist()): image[i, :, y:y + h, x:x + w] += COLOURS[i % 3]
    return usual_boxes(room), {'image': image, 'boxes': boxes.float(), 'labels': torch.arange(16)[:, None] % 3}, {}

@at_boxes('count from 0')
def labels_from_one(room, batch): batch['labels'][batch['labels'] >= 0] += 1; return usual_boxes(room), batch, {}

@at_boxes('neither a class nor -1')
def unlabelled_is_255(room, batch): batch['labels'][0, 0] = 255; return usual_boxes(room), batch, {}

@at_boxes('neither a class nor -1')
def another_filler(room, batch): batch['labels'][0, 0] = -100; return usual_boxes(room), batch, {}

@at_boxes('mirrored')
def image_mirrored_alone(room, batch): batch['image'] = batch['image'].flip(-1); return usual_boxes(room), batch, {}

@at_boxes('upside down')
def image_turned_alone(room, batch): batch['image'] = batch['image'].flip(-2); return usual_boxes(room), batch, {}

@at_boxes('another order of the images')
def boxes_shuffled(room, batch): return usual_boxes(room), {**batch, 'image': batch['image'].roll(1, 0)}, {}

@at_boxes('another order of classes')
def classes_in_a_circle(room, batch): own = batch['labels'] >= 0; batch['labels'][own] = (batch['labels'][own] + 1) % 3; return usual_boxes(room), batch, {}

@at_boxes('another order of classes')
def two_classes_exchanged(room, batch): own = batch['labels'] >= 0; batch['labels'][own] = torch.tensor([1, 0, 2])[batch['labels'][own]]; return usual_boxes(room), batch, {}

@at_boxes('reversing the channels')
def blue_first(room, batch): batch['image'] = batch['image'].flip(1); return usual_boxes(room), batch, {}

@at_boxes('gained by bringing')
def colours_in_0_to_1(room, batch):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    batch['image'] = batch['image'] * std + mean; return usual_boxes(room), batch, {}

@at_boxes('little more than chance')
def detector_never_loaded(room, batch): return usual_boxes(room, teacher=torch.manual_seed(1) and fcos(body(16, 24, 32), num_classes=3, channels=32, extra=None, convs=1)), batch, {}

@at_boxes('little more than chance')
def box_branch_never_loaded(room, batch):
    d = usual_boxes(room)
    for m in d.teacher.net.head.regression_head.modules():
        if isinstance(m, nn.Conv2d): nn.init.normal_(m.weight, std=.01)
    return d, batch, {}

@at_boxes('in training mode')
def detector_in_training_mode(room, batch): d = usual_boxes(room); d.teacher.train(); return d, batch, {}

@at_boxes('two looks')
def scores_with_dropout(room, batch):
    d = usual_boxes(room); d.teacher.net.head.classification_head.cls_logits.register_forward_hook(lambda m, x, z: F.dropout(z, .1)); return d, batch, {}

@at_boxes('claimed')
def claims_more_boxes(room, batch): return usual_boxes(room), batch, {'claimed': {'map75': 5.}}

@at_boxes('as good as off')
def boxes_with_the_weight_of_a_mean(room, batch): return told(room, logits(PixelWise(), 1e-4)), batch, {}

@at_boxes('of other images of this batch')
def stored_in_another_order(room, batch):
    d = usual_boxes(room); d.prepare(batch); batch['teacher'] = {k: v.roll(1, 0) for k, v in d.their(batch).items()}; return d, batch, {}

@at_boxes('only background', 'warning')
def no_boxes_at_all(room, batch): batch['labels'].fill_(-1); return usual_boxes(room), batch, {}

@at_boxes('such as a level of the pyramid')
def pairs_of_anchors(room, batch): return told(room, logits(PairWise(), 1.)), batch, {}

@at_boxes('has no class map')
def classes_of_pixels(room, batch): return told(room, levels(IntraClassVariation(3), each=(0,))), batch, {}

@at_boxes('tap one that runs once')
def a_layer_of_the_head(room, batch): return told(room, [Term(ChannelWise(), 'net.head.classification_head.cls_logits', 1.)]), batch, {}

@at_boxes('weighted sum')
def weights_forgotten_in_a_detector(room, batch): return usual_boxes(room, kind=Unweighted), batch, {}

@at_boxes('plain training')
def detector_runs_twice(room, batch): return usual_boxes(room, kind=Twice), batch, {}

@at_boxes('want a gradient')
def head_of_the_teacher_wants(room, batch): d = usual_boxes(room); d.teacher.net.head.requires_grad_(True); return d, batch, {}

@at_boxes('student that is frozen')
def detector_frozen(room, batch): d = usual_boxes(room); d.student.requires_grad_(False); return d, batch, {}

@at_boxes('adapters missing')
def adapters_of_levels_not_listed(room, batch): d = usual_boxes(room, kind=Forgetful); d.prepare(batch); return d, batch, {}

@at_boxes('the same network')
def detector_taught_by_itself(room, batch): return usual_boxes(room, student=copy.deepcopy(room.teacher)), batch, {}

@at_boxes('detached')
def level_detached(room, batch):
    d = usual_boxes(room); d.student.net.backbone.levels[1].register_forward_hook(lambda m, x, y: y.detach()); return d, batch, {}

@at_boxes('all are one number')
def dead_level(room, batch):
    d = usual_boxes(room); d.teacher.net.backbone.levels[0].register_forward_hook(lambda m, x, y: 0 * y); return d, batch, {}

@at_boxes('overwritten')
def boxes_scaled_in_place(room, batch):
    class InPlace(type(room.task)):
        def loss(self, output, batch): batch['boxes'].mul_(.99); return super().loss(output, batch)
    return usual_boxes(room, task=InPlace(3)), batch, {}

@at_boxes('NaN')
def nowhere(room, batch): batch['boxes'][0, 0, 0] = math.nan; return usual_boxes(room), batch, {}


@pytest.mark.parametrize('name', BOXED)
def test_planted_among_boxes(found_boxes, name):
    make, expected, severity = BOXED[name]
    room = found_boxes['fcos']
    d, batch, options = make(room, of(room, *range(12)))
    diagnosis = ill(d, batch, expected, severity=severity, **options)
    assert severity == 'fault' or diagnosis.ok


@at_depth('outside 1.5..80 m')
def millimetres(room, batch): batch['depth'] *= 1000; return usual_depth(room), batch, {}

@at_depth('outside 1.5..80 m')
def kilometres(room, batch): batch['depth'] /= 1000; return usual_depth(room), batch, {}

@at_depth("dividing the teacher's depth by 0.")
def feet(room, batch): batch['depth'] *= 3.28; return usual_depth(room), batch, {}

@at_depth('as inverse depth')
def disparity(room, batch): batch['depth'] = (100 / batch['depth']).where(batch['depth'] > 0, 0); return usual_depth(room), batch, {}

@at_depth('one depth for all')
def head_gives_a_constant(room, batch): d = usual_depth(room); nn.init.zeros_(d.teacher.head.classifier.weight); return d, batch, {}

@at_depth('one depth for all')
def head_never_loaded(room, batch): torch.manual_seed(0); d = usual_depth(room); nn.init.normal_(d.teacher.head.classifier.weight, std=1e-3); return d, batch, {}

@at_depth('little more than chance')
def depth_never_loaded(room, batch): torch.manual_seed(1); return usual_depth(room, teacher=tiny_depth_teacher(room.task.num_classes)), batch, {}

@at_depth('statistics in BatchNorm')
def depth_buffers_never_loaded(room, batch):
    d = usual_depth(room)
    for m in d.teacher.modules():
        if isinstance(m, nn.BatchNorm2d): m.reset_running_stats()
    return d, batch, {}

@at_depth('upside down')
def depth_upside_down(room, batch): batch['depth'] = batch['depth'].flip(-2); return usual_depth(room), batch, {}

@at_depth('another order of the images')
def depth_shuffled(room, batch): batch['depth'] = batch['depth'].roll(1, 0); return usual_depth(room), batch, {}

@at_depth('gained by bringing')
def image_in_0_to_1(room, batch):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SCENES_MEAN, SCENES_STD))
    batch['image'] = batch['image'] * std + mean; return usual_depth(room), batch, {}

@at_depth('pixels of known depth')
def nothing_known(room, batch): batch['depth'].zero_(); return usual_depth(room), batch, {}

@at_depth('claimed')
def claims_a_small_error(room, batch): return usual_depth(room), batch, {'claimed': .05}

@at_depth('claimed')
def claims_many_near_ones(room, batch): return usual_depth(room), batch, {'claimed': {'delta1': 2.}}

@at_depth('claimed')
def claims_few_metres(room, batch): return usual_depth(room), batch, {'claimed': {'rmse': 1.}}

@at_depth('in training mode')
def depth_in_training_mode(room, batch): d = usual_depth(room); d.teacher.head.up[0][1].train(); return d, batch, {}

@at_depth('as good as off')
def depth_term_is_off(room, batch): return told(room, feature(ChannelWise(), 1e-5)), batch, {}

@at_depth('weighted sum')
def weights_forgotten_in_depth(room, batch): return told(room, feature(ChannelWise(), 3.), kind=Unweighted), batch, {}

@at_depth('plain training')
def depth_runs_twice(room, batch): return usual_depth(room, kind=Twice), batch, {}

@at_depth('adapters missing')
def adapters_of_depth_not_listed(room, batch): d = usual_depth(room, kind=Forgetful); d.prepare(batch); return d, batch, {}

@at_depth('task.count', 'warning')
def counts_images_not_pixels(room, batch):
    class Counts(Depth):
        def count(self, batch): return torch.tensor(float(len(batch['image'])))
    batch['depth'][2:, 4:], batch['depth'][2:, :4] = 0, 75.
    d = usual_depth(room, task=Counts(nearest=1.5, farthest=80., bins=room.task.bins))
    d.student.head.classifier.bias.data[-1] += 6                      # few pixels in the second half, and easy ones
    return d, batch, {}

@at_depth('another augmentation or another teacher')
def stored_before_the_crop(room, batch):
    d = usual_depth(room); d.prepare(batch); batch['teacher'] = {k: v.roll(2, 3) for k, v in d.their(batch).items()}; return d, batch, {}


@pytest.mark.parametrize('kind', ['regressor', 'bins'])
@pytest.mark.parametrize('name', MEASURED)
def test_planted_in_depth(depths, name, kind):
    make, expected, severity = MEASURED[name]
    room = depths[kind]
    d, batch, options = make(room, of(room, *range(4)))
    ill(d, batch, expected, severity=severity, **options)


@pytest.mark.parametrize('change, expected', [
    (lambda z: z + math.log(1000), "dividing the teacher's depth by"), (lambda z: z.exp(), 'as metres, not as their logarithm'), (lambda z: 4 - z, 'as inverse depth'),
    (lambda z: z / math.log(10) - 10, "dividing the teacher's depth by")])
def test_a_regressor_that_speaks_other_units(depths, change, expected):
    room = depths['regressor']
    ill(changed_depth(room, change), of(room, 0, 1, 2, 3), expected)


def test_bins_from_far_to_near(depths):
    room = depths['bins']
    ill(changed_depth(room, lambda z: z.flip(1)), of(room, 0, 1, 2, 3), 'as inverse depth')


def test_one_channel_is_not_enough_for_a_softmax(depths):
    ill(told(depths['regressor'], logits(PixelWise(), 1.)), of(depths['regressor'], 0, 1), 'give the task bins')
    ill(told(depths['regressor'], feature(IntraClassVariation(12), 1.)), of(depths['regressor'], 0, 1), 'has no classes')


def test_bins_of_another_number(depths):
    ill(usual_depth(depths['bins'], task=Depth(nearest=1.5, farthest=80., bins=10)), of(depths['bins'], 0, 1), 'expected a map (B, 10, h, w)')


def test_bins_of_another_range(depths):
    "The teacher's bins are metres of a smaller world."
    ill(usual_depth(depths['bins'], task=Depth(nearest=.5, farthest=20., bins=12)), of(depths['bins'], 0, 1, 2, 3), "dividing the teacher's depth by")


def test_claims_that_a_batch_cannot_answer(found_boxes, depths):
    room = found_boxes['fcos']
    empty = of(room, 0, 1)
    empty['labels'].fill_(-1)
    assert diagnose(usual_boxes(room), empty, claimed=.5).ok
    with pytest.raises(ValueError, match='does not measure'): diagnose(usual_boxes(room), of(room, 0, 1), claimed={'miou': .5})
    with pytest.raises(ValueError, match='does not measure'): diagnose(usual_depth(depths['regressor']), of(depths['regressor'], 0, 1), claimed={'abs': .5})
