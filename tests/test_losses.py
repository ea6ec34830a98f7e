"""The three losses made of the softmax KL: public values and gradients, and the contract every loss keeps."""
import copy, inspect, json, math, pickle, subprocess, sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdnotes.checks import same, small_maps

LOSSES = {'SoftTargets': 'soft_targets', 'PixelWise': 'pixel_wise', 'ChannelWise': 'channel_wise'}
DEFAULTS = {'SoftTargets': 4.0, 'PixelWise': 1.0, 'ChannelWise': 4.0}
GOLDEN = json.loads((Path(__file__).parent / 'golden.json').read_text(encoding='utf-8'))


def make(name, **kwargs):
    return getattr(import_module(f'kdnotes.losses.{LOSSES[name]}'), name)(**kwargs)


def shape_of(name, B=2, C=3, H=4, W=5): return (B, C) if name == 'SoftTargets' else (B, C, H, W)


def pair(name, *, dtype=torch.float64, **sizes):
    return tuple(x.to(dtype) for x in small_maps(shape=shape_of(name, **sizes)))


def value_and_grad(loss, student, teacher):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


every_loss = pytest.mark.parametrize('name', LOSSES)


# ---- golden values: what public code computes ---------------------------------------------------------

def drawn(case):
    "Student and teacher of a golden case, float64, by the recipe in golden.json."
    seed, shape_s, *rest = GOLDEN['inputs'][case]['spec']
    shape_t, scale = (rest[0], rest[1]) if len(rest) > 1 else (shape_s, rest[0])
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(scale * rng.standard_normal(shape)) for shape in (shape_s, shape_t))


def entropy(teacher, dim, T):
    "Sum over the slices of T^2 times the entropy of the softened teacher: what a cross-entropy leaves in."
    log_p = (teacher / T).log_softmax(dim)
    return -T**2 * (log_p.exp() * log_p).sum()


# convention -> (our loss, their gradient / ours, their value less that multiple of ours); x is the teacher
CONVENTIONS = {
    'kd.kl_batchmean_T2':   ('SoftTargets', lambda x, T, w: 1, None),
    'kd.kl_batchmean':      ('SoftTargets', lambda x, T, w: 1 / T**2, None),
    'pi.kl_pixmean_T2':     ('PixelWise',   lambda x, T, w: 1, None),
    'pi.kl_elemmean':       ('PixelWise',   lambda x, T, w: 1 / (x.shape[1] * T**2), None),
    'pi.kl_elemmean_T2':    ('PixelWise',   lambda x, T, w: 1 / x.shape[1], None),
    'pi.kl_batchmean_T2':   ('PixelWise',   lambda x, T, w: x.shape[2] * x.shape[3], None),
    'pi.ce_sum_over_hw':    ('PixelWise',   lambda x, T, w: x.shape[0],
                             lambda x, T, w: entropy(x, 1, T) / (x.shape[2] * x.shape[3])),
    'cwd.kl_T2_nc':         ('ChannelWise', lambda x, T, w: w, None),
    'cwd.ce_T2_nc':         ('ChannelWise', lambda x, T, w: w,
                             lambda x, T, w: w * entropy(x.flatten(2), 2, T) / (x.shape[0] * x.shape[1])),
}
ENTRIES = [e for e in GOLDEN['entries'] if e['loss'] in ('kd', 'pixel', 'cwd')]        # the others: test_feature_losses.py
CONVERTIBLE = [e for e in ENTRIES if e['convention'] in CONVENTIONS]
NO_WEIGHT = [e for e in ENTRIES if e['convention'] not in CONVENTIONS]


def enlarge(x): return F.interpolate(x, scale_factor=8, mode='bilinear', align_corners=True)


def title(entry):
    params = ','.join(f'{k}={v:g}' for k, v in entry['params'].items())
    project = entry['source']['repository'].split('/')[-1]
    return '-'.join((entry['loss'], entry['case'], params, project, str(entry['convention'])))


def agrees(value, grad, expected, rtol):
    "Value and gradient against a golden record; what cancels is compared on the scale of its gradient."
    same(value.double(), expected['value'], rtol=rtol)
    record, grad = expected['grad'], grad.double()
    assert list(grad.shape) == record['shape']
    same(grad.norm(), record['l2'], rtol=rtol)
    assert abs(grad.sum().item() - record['sum']) <= rtol * record['l2']
    first8 = torch.tensor(record['first8'], dtype=torch.float64)
    assert (grad.flatten()[:8] - first8).abs().max() <= rtol * first8.abs().max()


@pytest.fixture(scope='module', autouse=True)
def counted_aloud(request):
    yield
    plugin = request.config.pluginmanager.get_plugin
    with plugin('capturemanager').global_and_fixture_disabled():
        print(f'\ngolden: {len(ENTRIES)} entries; {len(CONVERTIBLE)} compared through a weight; '
              f'{len(NO_WEIGHT)} have no weight (SKD cvpr_19) and were reproduced by enlarging')


def test_golden_file_is_complete():
    counts = {loss: sum(e['loss'] == loss for e in ENTRIES) for loss in ('kd', 'pixel', 'cwd')}
    assert counts == {'kd': 21, 'pixel': 28, 'cwd': 22} and sum(counts.values()) == len(ENTRIES)
    assert len(CONVERTIBLE) == 69 and len(NO_WEIGHT) == 2
    assert all('cvpr_19' in e['source']['repository'] for e in NO_WEIGHT)
    assert {e['convention'] for e in CONVERTIBLE} == set(CONVENTIONS) <= set(GOLDEN['conventions'])
    for entry in ENTRIES:
        assert entry['source']['repository'] and entry['source']['file']
        assert entry['source']['commit'] or entry['source']['repository'].startswith('pip ')


@pytest.mark.parametrize('case', ['small', 'mid', 'cls_small'])
def test_golden_inputs(case):
    record = GOLDEN['inputs'][case]
    for name, x in zip('st', drawn(case)):
        assert abs(x.sum().item() - record[f'{name}_sum']) <= 1e-12 * x.abs().sum().item()
        if first4 := record.get(f'{name}_first4'): assert x.flatten()[:4].tolist() == first4
        if f'{name}_l2' in record: same(x.norm(), record[f'{name}_l2'], rtol=1e-13)


@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize('entry', CONVERTIBLE, ids=title)
def test_golden_through_a_weight(entry, precision):
    dtype, rtol = {'f64': (torch.float64, 1e-9), 'f32': (torch.float32, 1e-5)}[precision]
    student, teacher = (x.to(dtype) for x in drawn(entry['case']))
    T, w = entry['params'].get('T', 1.), entry['params'].get('w', 1.)
    name, weight, left_in = CONVENTIONS[entry['convention']]
    value, grad = value_and_grad(make(name, temperature=T), student, teacher)
    factor, constant = weight(teacher, T, w), left_in(teacher.double(), T, w) if left_in else 0.
    agrees(factor * value.double() + constant, factor * grad, entry[precision], rtol)


@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize('entry', NO_WEIGHT, ids=title)
def test_golden_without_a_weight(entry, precision):
    dtype, rtol = {'f64': (torch.float64, 1e-9), 'f32': (torch.float32, 1e-5)}[precision]
    student, teacher = (x.to(dtype) for x in drawn(entry['case']))
    enlarged = lambda a, b: make('PixelWise')(enlarge(a), enlarge(b)) / a.shape[1]
    value, grad = value_and_grad(enlarged, student, teacher)
    agrees(value, grad, entry[precision], rtol)
    ours = value_and_grad(make('PixelWise'), student, teacher)[1]
    assert F.cosine_similarity(grad.flatten(), ours.flatten(), dim=0) < .99      # so no weight can convert it


# ---- the contract -------------------------------------------------------------------------------------

@every_loss
def test_signature(name):
    loss = make(name)
    assert isinstance(loss, torch.nn.Module) and loss.temperature == DEFAULTS[name]
    settings = inspect.signature(type(loss)).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in settings if p.default is not p.empty)
    assert list(inspect.signature(loss.forward).parameters) == ['student', 'teacher']
    with pytest.raises(TypeError): type(loss)(4.)


@every_loss
def test_repr_names_the_temperature(name): assert 'temperature=3' in repr(make(name, temperature=3.))


@every_loss
@pytest.mark.parametrize('temperature', [0., -1., math.inf, math.nan])
def test_temperature_is_positive_and_finite(name, temperature):
    with pytest.raises(ValueError, match='temperature'): make(name, temperature=temperature)


def misfits():
    for name in LOSSES:
        good = shape_of(name)
        for d, size in enumerate(good): yield name, good, good[:d] + (size + 1,) + good[d + 1:]    # one size
        yield name, good, good[1:]                                     # a dimension is missing on one side
        yield name, good[1:], good[1:]                                 # and on both
        yield name, (*good, 2), (*good, 2)                             # one too many
        yield name, (0, *good[1:]), (0, *good[1:])                     # an empty batch
    yield 'SoftTargets', (2, 3, 4, 5), (2, 3, 4, 5)
    yield 'PixelWise', (2, 3), (2, 3)
    yield 'ChannelWise', (2, 3), (2, 3)


@pytest.mark.parametrize('name, student, teacher', list(misfits()), ids=str)
def test_misfits_name_both_shapes(name, student, teacher):
    with pytest.raises(ValueError) as raised: make(name)(torch.zeros(student), torch.zeros(teacher))
    assert str(student) in str(raised.value) and str(teacher) in str(raised.value)
    assert 'student' in str(raised.value) and 'teacher' in str(raised.value)


@every_loss
def test_integers_are_refused(name):
    shape = shape_of(name)
    integers = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match='floating') as raised: make(name)(integers, integers)
    assert str(shape) in str(raised.value)


@every_loss
def test_result_is_a_number(name):
    for dtype in (torch.float32, torch.float64):
        value = make(name)(*pair(name, dtype=dtype))
        assert value.shape == () and value.dtype == dtype and value > 0


@every_loss
@pytest.mark.parametrize('temperature', [.5, 1., 4.])
def test_gradcheck(name, temperature):
    student, teacher = pair(name)
    loss = make(name, temperature=temperature)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_(), atol=1e-7)


@every_loss
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('teacher_too', [True, False])
def test_half_precision(name, dtype, teacher_too):
    student, teacher = pair(name, dtype=dtype)
    if not teacher_too: teacher = teacher.float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value, grad = value_and_grad(make(name), student, teacher)
    assert value.dtype == torch.float32 and grad.dtype == dtype and grad.isfinite().all() and grad.any()
    exact, exact_grad = value_and_grad(make(name), student.double(), teacher.double())
    same(value.double(), exact, rtol=1e-5)
    assert (grad.double() - exact_grad).abs().max() < 1e-2 * exact_grad.abs().max()


@every_loss
def test_autocast_changes_nothing(name):
    student, teacher = pair(name, dtype=torch.float32)
    plain, plain_grad = value_and_grad(make(name), student, teacher)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value, grad = value_and_grad(make(name), student, teacher)
    same(value, plain, rtol=0); same(grad, plain_grad, rtol=0)


@every_loss
def test_teacher_learns_nothing(name):
    student, teacher = (x.requires_grad_() for x in pair(name))
    make(name)(student, teacher).backward()
    assert teacher.grad is None and student.grad.any()


@every_loss
def test_inputs_are_left_alone(name):
    student, teacher = pair(name)
    before = student.clone(), teacher.clone()
    for T in (1., 3.): value_and_grad(make(name, temperature=T), student, teacher)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@every_loss
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_equal_inputs_give_zero(name, dtype):
    student, _ = pair(name, dtype=dtype)
    value, grad = value_and_grad(make(name), student, student)
    assert value == 0 and not grad.any()


@every_loss
def test_slice_of_length_one_gives_zero(name):
    sizes = dict(H=1, W=1) if name == 'ChannelWise' else dict(C=1)
    value, grad = value_and_grad(make(name), *pair(name, **sizes))
    assert value == 0 and grad.shape == shape_of(name, **sizes) and not grad.any()


@every_loss
def test_batch_of_one_and_mean_over_the_batch(name):
    student, teacher = pair(name, B=3)
    one_by_one = torch.stack([make(name)(student[i:i + 1], teacher[i:i + 1]) for i in range(3)])
    same(make(name)(student, teacher), one_by_one.mean(), rtol=1e-12)


@every_loss
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_extreme_scores_stay_finite(name, dtype):
    student, teacher = (x.sign().mul(1e4).to(dtype) for x in pair(name))
    flat = torch.zeros_like(student)
    for s, t in ((student, teacher), (student, -student), (student, flat), (flat, student)):
        value, grad = value_and_grad(make(name), s, t)
        assert value.isfinite() and value >= 0 and grad.isfinite().all()


@every_loss
def test_never_negative_near_agreement(name):
    student, noise = pair(name, dtype=torch.float32, B=16, H=16, W=16)
    for size in (1e-2, 1e-4, 1e-6, 1e-7):
        value, _ = value_and_grad(make(name), student + size * noise, student)
        exact, _ = value_and_grad(make(name), (student + size * noise).double(), student.double())
        assert value >= 0
        same(value.double(), exact, rtol=1e-4)


def layouts(x):
    "The same values in other memory layouts."
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([x, x + 1], -1)[..., 0]                          # every second number in memory
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
        yield x.transpose(2, 3).contiguous().transpose(2, 3)


@every_loss
def test_memory_layout_does_not_matter(name):
    student, teacher = pair(name)
    value, grad = value_and_grad(make(name), student, teacher)
    for s, t in zip(layouts(student), layouts(teacher)):
        assert not s.is_contiguous()
        for a, b in ((s, teacher), (student, t), (s, t)):
            other, other_grad = value_and_grad(make(name), a, b)
            same(other, value, rtol=1e-13)
            assert (other_grad - grad).abs().max() <= 1e-13 * grad.abs().max()


@every_loss
def test_broadcast_teacher(name):
    student, teacher = pair(name)
    expanded = teacher[:1].expand_as(teacher)                      # one teacher's answer for all, stride 0
    same(make(name)(student, expanded), make(name)(student, expanded.clone()), rtol=1e-13)


@every_loss
def test_module_manners(name):
    loss = make(name, temperature=3.)
    assert not loss.state_dict() and not list(loss.parameters())
    student, teacher = pair(name)
    copies = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    for twin in (*copies, loss.to('cpu'), loss.double(), loss.eval(), loss.train()):
        assert twin.temperature == 3.
        same(twin(student, teacher), loss(student, teacher), rtol=0)


@every_loss
def test_scaled_and_added_like_any_term(name):
    student, teacher = pair(name)
    _, grad = value_and_grad(make(name), student, teacher)
    _, scaled = value_and_grad(lambda s, t: 3 * make(name)(s, t) + make(name)(s, t), student, teacher)
    same(scaled, 4 * grad, rtol=1e-9)


def test_pixel_wise_is_soft_targets_per_pixel():
    student, teacher = pair('PixelWise')
    rows = lambda x: x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    soft_targets = make('SoftTargets', temperature=3.)
    value = make('PixelWise', temperature=3.)(student, teacher)
    same(value, soft_targets(rows(student), rows(teacher)), rtol=1e-12)


def test_channel_wise_is_soft_targets_per_channel():
    student, teacher = pair('ChannelWise')
    rows = lambda x: x.reshape(-1, x.shape[2] * x.shape[3])
    soft_targets = make('SoftTargets', temperature=3.)
    value = make('ChannelWise', temperature=3.)(student, teacher)
    same(value, soft_targets(rows(student), rows(teacher)), rtol=1e-12)


# ---- what an import costs -----------------------------------------------------------------------------

def imported_by(statement):
    code = f'{statement}; import sys; print(*sorted(m.partition(".")[0] for m in sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@every_loss
def test_a_loss_imports_torch_and_nothing_else_of_weight(name):
    modules = imported_by(f'from kdnotes.losses.{LOSSES[name]} import {name}')
    assert 'torch' in modules
    heavy = {'torchvision', 'timm', 'torchmetrics', 'accelerate', 'matplotlib', 'scipy', 'ipywidgets',
             'IPython', 'fastcore', 'nbdev', 'PIL'}
    assert not modules & heavy


def test_the_package_alone_imports_no_torch(): assert 'torch' not in imported_by('import kdnotes')
