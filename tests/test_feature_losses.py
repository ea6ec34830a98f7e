"""The losses on features, the critic's and GLD's: public values and gradients, slow references, and the contract every loss keeps."""
import copy, json, math, pickle, subprocess, sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import reference_losses as reference
from kdnotes.checks import same, saved_bytes, small_maps
from kdnotes.losses.conventions import CONVENTIONS, convert_weight

GOLDEN = json.loads((Path(__file__).parent / 'golden.json').read_text(encoding='utf-8'))
ENTRIES = [e for e in GOLDEN['entries'] if e['loss'] not in ('kd', 'pixel', 'cwd')]
SOURCES = {'irfanICMLL/structure_knowledge_distillation': 'skd', 'irfanICMLL/structure_knowledge_distillation (branch cvpr_19)': 'skd_cvpr19',
           'winycg/CIRKD': 'cirkd', 'YukangWang/IFVD': 'ifvd', 'irfanICMLL/TorchDistiller': 'cwd', 'open-mmlab/mmrazor': 'mmrazor',
           'pip torchdistill 1.1.5': 'torchdistill', 'AberHu/Knowledge-Distillation-Zoo': 'zoo', 'szagoruyko/attention-transfer': 'at',
           'HobbitLong/RepDistiller': 'repdistiller', 'megvii-research/mdistiller': 'mdistiller', 'pppppM/mmsegmentation-distiller': 'mmseg_distiller'}


def loss_of(module, name, *args, **kwargs): return getattr(import_module(f'kdnotes.losses.{module}'), name)(*args, **kwargs)


def value_and_grad(loss, student, teacher):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


def labels_for(s, size=(9, 11), classes=4, seed=0):
    "Labels of another resolution than the features, with ignored pixels and one class that never occurs."
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, size=(len(s), *size))
    y[y == 2] = 3
    y[rng.random(y.shape) < .2] = 255
    return torch.from_numpy(y)


def with_labels(loss, size=(9, 11)):
    def two(s, t): return loss(s, t, labels_for(s, size))
    two.module = loss
    return two


# name -> (loss of two maps, its slow reference)
MAPS = {
    'pair_wise':       (lambda: loss_of('pair_wise', 'PairWise'), lambda s, t: reference.pair_wise(s, t)),
    'pair_wise max':   (lambda: loss_of('pair_wise', 'PairWise', pool='max'), lambda s, t: reference.pair_wise(s, t, pool='max')),
    'pair_wise 1x1':   (lambda: loss_of('pair_wise', 'PairWise', granularity=(1, 1)), lambda s, t: reference.pair_wise(s, t, (1, 1))),
    'pair_wise 3x2':   (lambda: loss_of('pair_wise', 'PairWise', granularity=(3, 2)), lambda s, t: reference.pair_wise(s, t, (3, 2))),
    'pair_wise 9':     (lambda: loss_of('pair_wise', 'PairWise', granularity=(1, 1), connection_range=9), lambda s, t: reference.pair_wise(s, t, (1, 1), reach=1)),
    'pair_wise 25':    (lambda: loss_of('pair_wise', 'PairWise', connection_range=25), lambda s, t: reference.pair_wise(s, t, reach=2)),
    'local distance':  (lambda: loss_of('local_affinity', 'LocalAffinity'), lambda s, t: reference.local_affinity(s, t, 'distance')),
    'local cosine':    (lambda: loss_of('local_affinity', 'LocalAffinity', kind='cosine'), lambda s, t: reference.local_affinity(s, t, 'cosine')),
    'attention':       (lambda: loss_of('attention_transfer', 'AttentionTransfer'), lambda s, t: reference.attention_transfer(s, t)),
    'attention p=3':   (lambda: loss_of('attention_transfer', 'AttentionTransfer', p=3), lambda s, t: reference.attention_transfer(s, t, 3)),
    'ifvd':            (lambda: with_labels(loss_of('intra_class_variation', 'IntraClassVariation', 4)),
                        lambda s, t: reference.intra_class_variation(s, t, labels_for(s).numpy(), 4)),
    'adaptation':      (lambda: loss_of('knowledge_adaptation', 'Adaptation'), lambda s, t: reference.adaptation(s, t)),
    'adaptation 2 2':  (lambda: loss_of('knowledge_adaptation', 'Adaptation', p=2, q=2), lambda s, t: reference.adaptation(s, t, 2, 2)),
    'adaptation 1 1':  (lambda: loss_of('knowledge_adaptation', 'Adaptation', p=1, q=1), lambda s, t: reference.adaptation(s, t, 1, 1)),
    'affinity':        (lambda: loss_of('knowledge_adaptation', 'Affinity'), lambda s, t: reference.affinity(s, t)),
    'affinity squared': (lambda: loss_of('knowledge_adaptation', 'Affinity', squared=True), lambda s, t: reference.affinity(s, t, True)),
}
ROWS = {
    'normalized logits': (lambda: loss_of('global_local', 'NormalizedLogits'), reference.normalized_logits),
    'dense relation':    (lambda: loss_of('global_local', 'DenseRelation'), reference.dense_relation),
}
ALL = {**MAPS, **ROWS}
EQUAL_CHANNELS = ('adaptation', 'adaptation 2 2', 'adaptation 1 1')
every_map = pytest.mark.parametrize('name', MAPS)
every_loss = pytest.mark.parametrize('name', ALL)


def make(name): return ALL[name][0]()
def module_of(loss): return getattr(loss, 'module', loss)
def shape_of(name, B=2, C=3, H=4, W=5): return (B * H, C + 2) if name in ROWS else (B, C, H, W)


def pair(name, *, dtype=torch.float64, scale=2., seed=0, **sizes):
    return tuple(x.to(dtype) for x in small_maps(shape=shape_of(name, **sizes), scale=scale, seed=seed))


# ---- golden values: what public code computes ---------------------------------------------------------

def drawn(case, dtype=torch.float64):
    seed, shape_s, shape_t, scale, kind = GOLDEN['inputs'][case]['spec']
    rng = np.random.default_rng(seed)
    s, t = (scale * rng.standard_normal(shape) for shape in (shape_s, shape_t))
    if kind == 'zero': s[0, :, 2, 3] = 0; t[1, :, 4, 1] = 0
    return torch.from_numpy(s).to(dtype), torch.from_numpy(t).to(dtype)


def agrees(value, grad, expected, rtol=1e-7, grad_rtol=1e-5):
    "Value within 1e-7, gradient (norm, sum, first eight entries) within 1e-5."
    same(value.double(), float(expected['value']), rtol=rtol)
    if grad is None: return
    record, grad = expected['grad'], grad.double()
    assert list(grad.shape) == record['shape']
    same(grad.norm(), record['l2'], rtol=grad_rtol)
    assert abs(grad.sum().item() - record['sum']) <= grad_rtol * max(record['l2'], grad.abs().sum().item())
    first8 = torch.tensor(record['first8'], dtype=torch.float64)
    assert (grad.flatten()[:8] - first8).abs().max() <= grad_rtol * max(first8.abs().max(), grad.abs().max())


def house(convention, params, case):
    "The house's loss of two maps for a convention of the golden file, or None."
    window, pool = (params.get('kh'), params.get('kw')), params.get('pool')
    return {'pa.mse': lambda: loss_of('pair_wise', 'PairWise', granularity=window, pool=pool),
            'local.cos_interior': lambda: loss_of('local_affinity', 'LocalAffinity', kind='cosine'),
            'local.l2_interior': lambda: loss_of('local_affinity', 'LocalAffinity'),
            'at.code': lambda: loss_of('attention_transfer', 'AttentionTransfer', p=params.get('p', 2)),
            'ka.adapt': lambda: loss_of('knowledge_adaptation', 'Adaptation', p=params['p'], q=params['q']),
            'ka.aff_rows_mean': lambda: loss_of('knowledge_adaptation', 'Affinity'),
            'ka.aff_mse': lambda: loss_of('knowledge_adaptation', 'Affinity', squared=True)}.get(convention, lambda: None)()


def title(row): return '-'.join([str(row.get('convention')), row['case'], *(f'{k}={v}' for k, v in row['params'].items()),
                                 *([row['source']['repository'].split('/')[-1], row['source']['file'].split(':')[-1]] if 'source' in row else [])])


REFERENCES = [r for r in GOLDEN['reference'] if r['case'] in ('small', 'mid', 'zero') and r['convention'] in (
    'pa.mse', 'local.cos_interior', 'local.l2_interior', 'at.code', 'ka.adapt', 'ka.aff_rows_mean', 'ka.aff_mse')]


def test_how_many_references(): assert len(REFERENCES) == 15 + 6 + 6 + 4 + 6


@pytest.mark.parametrize('row', REFERENCES, ids=title)
def test_reference_rows(row):
    s, t = drawn(row['case'])
    value, grad = value_and_grad(house(row['convention'], row['params'], row['case']), s, t)
    agrees(value, grad if 'grad' in row else None, row)
    assert grad.isfinite().all() and grad.any()


def pooling_of(entry):
    "Window and pool of a public pair-wise loss on maps of this size."
    H, W = drawn(entry['case'])[0].shape[2:]
    ctor = entry['source']['constructor']
    if 'scale' in ctor:
        scale = float(ctor.split('=')[1].split(',')[0])
        return {'kh': max(1, int(H * scale)), 'kw': max(1, int(W * scale)), 'pool': 'max'}
    return {'kh': 2, 'kw': 2, 'pool': 'max'} if 'CIRKD' in entry['source']['repository'] else {'kh': 1, 'kw': 1, 'pool': 'avg'}


PROPORTIONAL = [e for e in ENTRIES if e['convention'] in ('pa.mse', 'at.code', 'local.cos_interior', 'local.l2_interior')]


@pytest.mark.parametrize('entry', PROPORTIONAL, ids=title)
def test_public_values(entry):
    s, t = drawn(entry['case'])
    params = pooling_of(entry) if entry['convention'] == 'pa.mse' else entry['params']
    value, grad = value_and_grad(house(entry['convention'], params, entry['case']), s, t)
    assert value.isfinite() and grad.isfinite().all()
    if entry['f64']['value'] == 'nan':                               # theirs on a zero vector: 0/0
        assert entry['case'] == 'zero' and 'cvpr_19' in entry['source']['repository']
        return
    detached = entry['source']['file'].endswith('sim_dis_compute')   # the norm detached, and 1e-8 added to it
    leaks = entry['case'] == 'zero' and 'CIRKD' in entry['source']['repository'] and entry['convention'] == 'pa.mse'
    agrees(value, None if detached or leaks else grad, entry['f64'], rtol=1e-7)
    if detached and entry['case'] != 'zero': assert abs(grad.norm() / entry['f64']['grad']['l2'] - 1) > .1


def golden_labels(name, case):
    spec, K = GOLDEN['labels'][name], 19 if case == 'mid' else 4
    rng = np.random.default_rng(GOLDEN['inputs'][case]['spec'][0] + 1000)
    y = rng.integers(0, K, size=(GOLDEN['inputs'][case]['spec'][1][0], *spec['size']))
    y[y == spec['absent']] = (spec['absent'] + 1) % K
    y[rng.random(y.shape) < spec['ignore']] = 255
    if spec.get('all255'): y[0] = 255
    return torch.from_numpy(y)


IFVD = [r for r in [*GOLDEN['reference'], *ENTRIES] if (r['convention'] or '').startswith('ifvd')]


@pytest.mark.parametrize('row', IFVD, ids=title)
def test_intra_class_variation_rows(row):
    s, t = drawn(row['case'])
    labels = golden_labels(row['params']['labels'], row['case'])
    loss = loss_of('intra_class_variation', 'IntraClassVariation', row['params']['K'])
    value, grad = value_and_grad(lambda a, b: loss(a, b, labels), s, t)
    if row['convention'] == 'ifvd.valid':                             # the same sum over the labelled pixels only
        small = labels[:, torch.arange(s.shape[2]) * labels.shape[1] // s.shape[2]][:, :, torch.arange(s.shape[3]) * labels.shape[2] // s.shape[3]]
        factor = small.numel() / (small != 255).sum()
        value, grad = value * factor, grad * factor
    if 'source' not in row: agrees(value, grad if 'grad' in row else None, row)
    elif row['case'] != 'zero': agrees(value, grad, row['f64'])
    else: same(value + 1 / 84, row['f64']['value'], rtol=1e-7)        # theirs: a zero vector on an ignored pixel leaks 1/(B H W)


def test_global_local_total():
    entry, = (e for e in ENTRIES if e['loss'] == 'gld_total')
    seed, B, C_s, C_t, side, divisions, K = GOLDEN['inputs']['gld_small']['spec']
    rng = np.random.default_rng(seed)
    fs, ft = (np.maximum(rng.standard_normal((B, c, side, side)), 0) for c in (C_s, C_t))
    layers = []
    for c in (C_s, C_t):
        layers.append(torch.nn.Linear(c, K).double())
        layers[-1].weight.data = torch.from_numpy(rng.standard_normal((K, c))); layers[-1].bias.data = torch.from_numpy(.1 * rng.standard_normal(K))
    y = torch.from_numpy(rng.integers(0, K, size=B))
    assert y.tolist() == GOLDEN['inputs']['gld_small']['y'] and abs(fs.sum() - GOLDEN['inputs']['gld_small']['fs_sum']) < 1e-9
    gld = loss_of('global_local', 'GlobalLocal', divisions=divisions)
    distilled, _ = value_and_grad(lambda a, b: gld(a, b, *layers), torch.from_numpy(fs), torch.from_numpy(ft))
    same(distilled, entry['f64']['distill'], rtol=1e-9)
    total = lambda a, b: .3 * torch.nn.functional.cross_entropy(layers[0](a.mean((2, 3))), y) + gld(a, b, *layers)
    agrees(*value_and_grad(total, torch.from_numpy(fs), torch.from_numpy(ft)), entry['f64'])


class GoldenCritic(torch.nn.Module):
    "The tiny critic of the golden rows: two convolutions, drawn in this order."
    def __init__(self, C, seed, hidden):
        super().__init__()
        rng = np.random.default_rng(seed)
        for name, shape, scale in (('w1', (hidden, C, 3, 3), .3), ('b1', (hidden,), .1), ('w2', (1, hidden, 3, 3), .3), ('b2', (1,), .1)):
            setattr(self, name, torch.nn.Parameter(torch.from_numpy(scale * rng.standard_normal(shape))))

    def forward(self, x, image=None):
        hidden = torch.nn.functional.leaky_relu(torch.nn.functional.conv2d(x, self.w1, self.b1, stride=2, padding=1), .1)
        return torch.nn.functional.conv2d(hidden, self.w2, self.b2)


CRITIC = [r for r in [*GOLDEN['reference'], *ENTRIES] if (r['convention'] or '').startswith('ho.')]


def test_how_many_critic_rows(): assert len(CRITIC) == 7 + 32


@pytest.mark.parametrize('row', CRITIC, ids=title)
def test_critic_rows(row):
    from kdnotes.losses.holistic import critic_loss, generator_loss, gradient_penalty
    s, t = drawn(row['case'])
    critic = GoldenCritic(row['params']['critic_C'], row['params']['critic_seed'], row['params']['hidden'])
    expected = row['f64'] if 'source' in row else row
    if row['convention'] == 'ho.gp':
        mix = torch.from_numpy(np.random.default_rng(601).random((len(s), 1, 1, 1)))
        value = row['params']['lam'] * gradient_penalty(critic, s, t, mix=mix)
        same(value, expected['value'], rtol=1e-9)
        if 'grad_w1' in expected: agrees(value, torch.autograd.grad(value, critic.w1)[0], {'value': expected['value'], 'grad': expected['grad_w1']})
        return
    if row['convention'] == 'ho.adv_g': 
        value, grad = value_and_grad(lambda a, b: generator_loss(critic, a), s, t)
        return agrees(value, grad if 'grad' in expected else None, expected)
    kind = 'hinge' if 'hinge' in row['convention'] else 'wasserstein'
    same(critic_loss(critic, s, t, kind=kind), expected['value'], rtol=1e-9)      # their gradient is the student's; our maps are detached


# ---- weights between conventions ----------------------------------------------------------------------

MODULES = {'kd': 'soft_targets', 'pixel': 'pixel_wise', 'cwd': 'channel_wise', 'pairwise': 'pair_wise', 'local': 'local_affinity', 'at': 'attention_transfer',
           'ifvd': 'intra_class_variation', 'ka_adapt': 'knowledge_adaptation', 'ka_affinity': 'knowledge_adaptation', 'holistic_g': 'holistic'}
FACTORS = {'kd.kl_batchmean_T2': lambda B, C, H, W, T: 1, 'kd.kl_batchmean': lambda B, C, H, W, T: 1 / T**2, 'pi.kl_pixmean_T2': lambda B, C, H, W, T: 1,
           'pi.kl_elemmean': lambda B, C, H, W, T: 1 / (C * T**2), 'pi.kl_batchmean_T2': lambda B, C, H, W, T: H * W, 'pi.ce_sum_over_hw': lambda B, C, H, W, T: B,
           'cwd.kl_T2_nc': lambda B, C, H, W, T: 1, 'cwd.ce_T2_nc': lambda B, C, H, W, T: 1, 'pa.mse': lambda B, C, H, W, T: 1, 'at.code': lambda B, C, H, W, T: 1, 'local.cos_interior': lambda B, C, H, W, T: 1,
           'local.l2_interior': lambda B, C, H, W, T: 1, 'ifvd.all': lambda B, C, H, W, T: 1, 'ho.adv_g': lambda B, C, H, W, T: 1}
OTHER = ('at.paper', 'at.zoo', 'ka.kta_torchdistill', 'ka.aff_torchdistill', None)
NOT_THE_DEFAULT = ("tau=1.0, reduction='mean'", "tau=4.0, reduction='mean'", "norm_type='spatial'", 'alpha=1e-300', "mode='paper'")        # options of a source other than the one its name stands for


def test_every_golden_convention_converts_or_is_refused():
    counts = {'converted': 0, 'refused': 0}
    for e in GOLDEN['entries']:
        source = SOURCES.get(e['source']['repository'])
        if e['loss'] not in MODULES or source is None or any(o in e['source']['constructor'] for o in NOT_THE_DEFAULT): continue
        shape = tuple(GOLDEN['inputs'][e['case']]['spec'][1])
        module, T = MODULES[e['loss']], e['params'].get('T', 1.)
        if source not in CONVENTIONS[module]: continue
        kw = dict(shape=shape, temperature=T)
        if e['convention'] in OTHER:
            with pytest.raises(ValueError, match='different functions') as refused: convert_weight(2., module, source, 'kdnotes', **kw)
            for s in (source, 'kdnotes'): assert CONVENTIONS[module][s].formula in str(refused.value)
            counts['refused'] += 1
        elif not (module == 'pair_wise' and source == 'skd_cvpr19'):
            sizes = (*shape, 1, 1)[:4]
            same(convert_weight(2., module, source, 'kdnotes', **kw), 2. * FACTORS[e['convention']](*sizes, T))
            counts['converted'] += 1
    assert counts == {'converted': 123, 'refused': 14}, counts


# ---- slow references on shapes that golden values do not have -----------------------------------------

CASES = {'odd': dict(B=3, C=4, H=5, W=7), 'large scores': dict(scale=20.), 'huge scores': dict(scale=200.), 'one image': dict(B=1), 'thin': dict(H=3, W=1), 'many channels': dict(C=23, H=3, W=4),
         'near': dict(near=1e-3), 'very near': dict(near=1e-6), 'equal': dict(near=0.), 'one pixel': dict(H=1, W=1), 'one channel': dict(C=1)}


@every_loss
@pytest.mark.parametrize('case', CASES)
def test_slow_reference(name, case):
    settings = dict(CASES[case])
    near = settings.pop('near', None)
    s, t = pair(name, seed=3, **settings)
    if near is not None: t = s + near * t
    if name in EQUAL_CHANNELS and case == 'one channel': s, t = s + .1, t + .1
    if case == 'one pixel' and name in ROWS: s, t = s[:1], t[:1]
    value, grad = value_and_grad(make(name), s, t)
    expected = ALL[name][1](s.numpy(), t.numpy())
    assert grad.isfinite().all() and value >= 0
    if near == 0.: assert value == 0 and not grad.any()
    elif near == 1e-6: assert abs(value.item() - expected) <= 1e-5 * expected + 1e-16
    else: assert abs(value.item() - expected) <= 1e-9 * expected + 1e-18, (value.item(), expected)


@pytest.mark.parametrize('name', [n for n in MAPS if n not in EQUAL_CHANNELS])
@pytest.mark.parametrize('channels', [(3, 5), (7, 2), (1, 4)])
def test_channels_may_differ(name, channels):
    s, t = pair(name, C=channels[0])[0], pair(name, C=channels[1])[1]
    value, grad = value_and_grad(make(name), s, t)
    same(value, ALL[name][1](s.numpy(), t.numpy()), rtol=1e-9)
    assert grad.shape == s.shape and grad.isfinite().all()
    assert getattr(module_of(make(name)), 'any_channels', False)


# ---- the contract -------------------------------------------------------------------------------------

@every_loss
def test_misfits_name_both_shapes(name):
    good = shape_of(name)
    for d, size in enumerate(good):
        if d == 1: continue                                            # channels: may differ, or refused below
        other = good[:d] + (size + 1,) + good[d + 1:]
        with pytest.raises(ValueError) as raised: make(name)(torch.zeros(good), torch.zeros(other))
        assert str(good) in str(raised.value) and str(other) in str(raised.value)
    for wrong in (good[1:], (*good, 2), (0, *good[1:])):
        with pytest.raises(ValueError) as raised: module_of(make(name))(torch.zeros(wrong), torch.zeros(wrong), *((labels_for(torch.zeros(good)),) if name == 'ifvd' else ()))
        assert str(wrong) in str(raised.value)
    if name in EQUAL_CHANNELS:
        with pytest.raises(ValueError, match=r'\(2, 3, 4, 5\).*\(2, 4, 4, 5\)'): make(name)(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 4, 5))


@every_loss
def test_integers_are_refused(name):
    x = torch.zeros(shape_of(name), dtype=torch.int64)
    with pytest.raises(ValueError, match='floating'): make(name)(x, x)


@every_loss
def test_result_is_a_number(name):
    for dtype in (torch.float32, torch.float64):
        value = make(name)(*pair(name, dtype=dtype))
        assert value.shape == () and value.dtype == dtype and value > 0


@every_loss
def test_gradcheck(name):
    student, teacher = pair(name)
    loss = make(name)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_(), atol=1e-6, rtol=1e-4)


@every_loss
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    student, teacher = pair(name, dtype=dtype, scale=1.)
    with torch.autocast('cpu', dtype=torch.bfloat16): value, grad = value_and_grad(make(name), student, teacher)
    assert value.dtype == torch.float32 and grad.dtype == dtype and grad.isfinite().all() and grad.any()
    exact, exact_grad = value_and_grad(make(name), student.double(), teacher.double())
    same(value.double(), exact, rtol=1e-4)
    assert (grad.double() - exact_grad).abs().max() < 2e-2 * exact_grad.abs().max()


@every_loss
def test_autocast_changes_nothing(name):
    student, teacher = pair(name, dtype=torch.float32)
    plain, plain_grad = value_and_grad(make(name), student, teacher)
    with torch.autocast('cpu', dtype=torch.bfloat16): value, grad = value_and_grad(make(name), student, teacher)
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
    value_and_grad(make(name), student, teacher)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@every_loss
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_equal_inputs_give_zero(name, dtype):
    student, _ = pair(name, dtype=dtype)
    value, grad = value_and_grad(make(name), student, student)
    assert value == 0 and not grad.any()


@every_map
def test_one_pixel_gives_zero(name):
    if name.startswith('adaptation'): return                           # a position is a vector of channels here, not a slice of length one
    value, grad = value_and_grad(make(name), *pair(name, H=1, W=1))
    assert value == 0 and not grad.any()


def test_rows_of_length_one_give_zero():
    value, grad = value_and_grad(make('normalized logits'), *small_maps(shape=(4, 1)))
    assert value == 0 and not grad.any()
    value, grad = value_and_grad(make('dense relation'), *small_maps(shape=(1, 4)))
    assert value == 0 and not grad.any()


@every_map
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_zero_and_constant_vectors_are_finite(name, dtype):
    student, teacher = pair(name, dtype=dtype, H=5, W=6)
    student[0, :, 1, 2] = 0; teacher[1, :, 3, 1] = 0; student[1] = 0
    for s, t in ((student, teacher), (torch.zeros_like(student), teacher), (student, torch.zeros_like(teacher)), (torch.full_like(student, .1), torch.full_like(teacher, -3.))):
        value, grad = value_and_grad(make(name), s, t)
        assert value.isfinite() and grad.isfinite().all() and grad.abs().max() < 1e6


@every_loss
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_values_stay_finite(name, dtype):
    student, teacher = (x.sign().mul(1e4).to(dtype) for x in pair(name))
    flat = torch.zeros_like(student)
    for s, t in ((student, teacher), (student, -student), (student, flat), (flat, student)):
        value, grad = value_and_grad(make(name), s, t)
        assert value.isfinite() and value >= 0
        if not (name == 'local distance' and dtype is torch.float16): assert grad.isfinite().all()     # its gradient grows with the cube: beyond float16


@every_loss
def test_never_negative_near_agreement(name):
    student, noise = pair(name, dtype=torch.float32, B=3, H=8, W=8)
    for size in (1e-2, 1e-4, 1e-6):
        t = student + size * noise
        value, _ = value_and_grad(make(name), t, student)
        exact, _ = value_and_grad(make(name), t.double(), student.double())
        assert value >= 0
        assert abs(value.double() - exact) <= {1e-2: 1e-3, 1e-4: 2e-2, 1e-6: .5}[size] * exact


@every_map
def test_mean_over_the_batch(name):
    if name == 'ifvd': return                                          # its labels are drawn per call here
    student, teacher = pair(name, B=3)
    one_by_one = torch.stack([make(name)(student[i:i + 1], teacher[i:i + 1]) for i in range(3)])
    same(make(name)(student, teacher), one_by_one.mean(), rtol=1e-12)


@every_map
def test_memory_layout_does_not_matter(name):
    student, teacher = pair(name)
    value, grad = value_and_grad(make(name), student, teacher)
    for layout in (lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), lambda x: torch.stack([x, x + 1], -1)[..., 0]):
        other, other_grad = value_and_grad(make(name), layout(student), layout(teacher))
        same(other, value, rtol=1e-12)
        assert (other_grad - grad).abs().max() <= 1e-12 * grad.abs().max()
    same(make(name)(student, teacher[:1].expand_as(teacher)), make(name)(student, teacher[:1].expand_as(teacher).clone()), rtol=1e-12)


@every_loss
def test_module_manners(name):
    loss = module_of(make(name))
    assert isinstance(loss, torch.nn.Module) and not loss.state_dict() and not list(loss.parameters())
    args = (*pair(name), *((labels_for(pair(name)[0]),) if name == 'ifvd' else ()))
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss).double(), copy.deepcopy(loss).eval()):
        assert repr(twin) == repr(loss)
        same(twin(*args), loss(*args), rtol=0)


@every_loss
def test_scaled_and_added_like_any_term(name):
    student, teacher = pair(name)
    _, grad = value_and_grad(make(name), student, teacher)
    _, scaled = value_and_grad(lambda s, t: 3 * make(name)(s, t) + make(name)(s, t), student, teacher)
    assert (scaled - 4 * grad).abs().max() <= 1e-12 * grad.abs().max()


# ---- what is kept for the backward pass ---------------------------------------------------------------

def cosines(x):
    x = torch.nn.functional.normalize(x.flatten(2), dim=1)
    return x.mT @ x


def test_pair_wise_keeps_little():
    s, t = torch.randn(2, 1, 128, 96, 96, generator=torch.Generator().manual_seed(0))
    ours = saved_bytes(loss_of('pair_wise', 'PairWise', granularity=(1, 1)), s, t)
    n = 96 * 96
    assert 0 < ours <= n * n * 4 / 20                                  # a single n x n matrix, and the textbook form keeps several


def test_affinity_keeps_little():
    s, t = torch.randn(2, 2, 64, 60, 60, generator=torch.Generator().manual_seed(0))
    textbook = saved_bytes(lambda a, b: (cosines(a) - cosines(b)).norm(dim=2).mean(), s, t)
    assert 0 < saved_bytes(loss_of('knowledge_adaptation', 'Affinity'), s, t) <= textbook / 50


# ---- what an import costs -----------------------------------------------------------------------------

PUBLIC = {'relations': 'unit nodes affinity squared_distances all_pairs_gap window_gap', 'pair_wise': 'PairWise', 'local_affinity': 'LocalAffinity', 'attention_transfer': 'AttentionTransfer',
          'intra_class_variation': 'IntraClassVariation', 'knowledge_adaptation': 'Adaptation Affinity AutoEncoder FeatureAdapter KnowledgeAdaptation reconstruction_loss',
          'holistic': 'Critic Holistic generator_loss critic_loss gradient_penalty', 'global_local': 'NormalizedLogits DenseRelation GlobalLocal local_logits', 'conventions': 'convert_weight CONVENTIONS'}


def test_public_names_import_torch_and_nothing_else_of_weight():
    statement = '; '.join(f'from kdnotes.losses.{module} import {names.replace(" ", ", ")}' for module, names in PUBLIC.items())
    code = f'{statement}; import sys; print(*sorted(m.partition(".")[0] for m in sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    heavy = {'torchvision', 'timm', 'torchmetrics', 'accelerate', 'matplotlib', 'scipy', 'ipywidgets', 'IPython', 'fastcore', 'nbdev', 'PIL'}
    assert not set(done.stdout.split()) & heavy
