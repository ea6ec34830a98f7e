"""The doctor: planted faults are found, healthy runs are left alone, nothing is changed."""
import copy, math, random, time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from kdnotes.distiller import Distiller, Term
from kdnotes.doctor import Finding, diagnose
from kdnotes.loop import Budget, fit, train_supervised
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
from kdnotes.networks import tiny_student, tiny_teacher
from kdnotes.recipes import SCENES_MEAN, SCENES_STD, lesson
from kdnotes.tasks import Classification

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
