"""The engine: one step is one step however it is split, a dead process loses nothing, adapters are trained and kept, processes are counted."""
import copy, functools, json, os, random, signal, subprocess, sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kdnotes.data.scenes import CLASSES
from kdnotes.distiller import Distiller, Term
from kdnotes.loop import Budget, _Interrupt, fit, processes_here, train_supervised
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.losses.holistic import Critic, Holistic, health
from kdnotes.losses.knowledge_adaptation import KnowledgeAdaptation
from kdnotes.losses.pixel_wise import PixelWise
from kdnotes import recipes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import parity                                                          # noqa: E402

ENV = {**{k: v for k, v in os.environ.items() if k != 'ACCELERATE_USE_CPU'}, 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1', 'CUDA_VISIBLE_DEVICES': ''}
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node']


@functools.cache
def taught(): return recipes.lesson()

def lesson(): return copy.deepcopy(taught())                          # its teacher is trained once


def run(*command, **kw):
    done = subprocess.run([*map(str, command)], env={**ENV, **kw.pop('env', {})}, capture_output=True, text=True, timeout=600, **kw)
    return done


# One step, split in several ways.

@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    folder, script = tmp_path_factory.mktemp('parity'), HERE / 'parity.py'
    commands = {'1 process': [sys.executable, script, folder / '1 process', 1], '2 micro-batches': [sys.executable, script, folder / '2 micro-batches', 2],
                '4 micro-batches': [sys.executable, script, folder / '4 micro-batches', 4], '2 processes': [*TORCHRUN, 2, script, folder / '2 processes', 1]}
    for command in commands.values():
        done = run(*command)
        assert done.returncode == 0, done.stderr[-3000:]
    found = {name: torch.load(folder / name, weights_only=True) for name in commands}
    assert [v['world'] for v in found.values()] == [1, 1, 1, 2]
    return {name: v['found'] for name, v in found.items()}


def relative(one, other):
    "The norm of the difference of two steps over the norm of the first; worst tensor."
    assert set(one) == set(other)
    return max(float((other[k] - v).norm() / v.norm()) for k, v in one.items())


@pytest.mark.parametrize('split', ['2 micro-batches', '4 micro-batches', '2 processes'])
@pytest.mark.parametrize('method', list(parity.METHODS))
def test_a_step_is_the_same_however_it_is_split(steps, method, split):
    whole, parts = steps['1 process'][method], steps[split][method]
    assert len(whole['moved']) >= 17                                   # every parameter of the student takes part
    if method == 'global_local' and split != '2 processes':            # pairs inside a micro-batch: another function, as its docstring says
        assert relative(whole['moved'], parts['moved']) > .01
        return
    assert relative(whole['moved'], parts['moved']) < 1e-6
    assert abs(whole['loss'] - parts['loss']) < 1e-6 * abs(whole['loss'])


# Killed and resumed.

def state_after(folder): return torch.load(folder / 'state.pt', weights_only=True)

def killed_then_resumed(folder, moment, n):
    done = run(sys.executable, HERE / 'killed.py', folder, moment, n)
    assert done.returncode == -9, (moment, n, done.returncode, done.stderr[-2000:])
    assert not (folder / 'state.pt').exists()
    done = run(sys.executable, HERE / 'killed.py', folder, 'never', 0)
    assert done.returncode == 0, done.stderr[-2000:]
    return state_after(folder)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    assert run(sys.executable, HERE / 'killed.py', folder, 'never', 0).returncode == 0
    return state_after(folder)


def equal(one, other): return set(one) == set(other) and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize('moment, n', [('between', 5), ('writing', 2)])
def test_killed_at_the_worst_moment_it_resumes_to_the_same_bits(tmp_path, whole_run, moment, n):
    assert equal(killed_then_resumed(tmp_path, moment, n), whole_run)


@pytest.mark.soak
def test_twenty_kills(tmp_path, whole_run, ledger):
    draw = random.Random(0)
    moments = [(moment, draw.randint(1, last)) for moment, last, times in
               (('between', 16, 6), ('writing', 5, 5), ('renaming', 5, 4), ('reading', 64, 5)) for _ in range(times)]
    same = [equal(killed_then_resumed(tmp_path / str(i), moment, n), whole_run) for i, (moment, n) in enumerate(moments)]
    ledger('kills', {'kills': len(moments), 'resumed to equal bits': sum(same), 'moments': [f'{m} {n}' for m, n in moments]})
    assert all(same) and len(same) == 20


def test_a_resumed_run_does_not_fit_its_auto_encoder_again(tmp_path):
    calls = []
    class Counts(KnowledgeAdaptation):
        def prepare(self, teacher, data): calls.append('prepare'); KnowledgeAdaptation.prepare(self, teacher, data)
    def go(steps):
        room = lesson()
        loss = Counts(32, 48, resize=True, steps=2)
        fit(Distiller(room.student, room.teacher, room.task, [Term(loss, 'head.bottleneck', .1)]), room.data, budget=Budget(steps=4, batch_size=4, lr=.05),
            out=tmp_path, resume=True, save_every=1, progress=False, **steps)
        return loss
    first, second = go({}), go({})
    assert calls == ['prepare'] and second.fitted and equal(first.encoder.state_dict(), second.encoder.state_dict())


def test_a_checkpoint_that_is_in_the_way_is_named_before_anything_is_prepared(tmp_path):
    room, loss = lesson(), KnowledgeAdaptation(32, 48, resize=True, steps=2)
    train_supervised(room.student, room.task, room.data, budget=Budget(steps=1, batch_size=4), out=tmp_path, progress=False)
    distiller = Distiller(room.student, room.teacher, room.task, [Term(loss, 'head.bottleneck', .1)])
    with pytest.raises(FileExistsError): fit(distiller, room.data, budget=Budget(steps=1, batch_size=4), out=tmp_path, progress=False)
    with pytest.raises(ValueError, match='method was'):
        fit(distiller, room.data, budget=Budget(steps=1, batch_size=4), out=tmp_path, resume=True, progress=False)
    assert not distiller.prepared and not loss.fitted


def test_a_run_is_recognised_though_its_loss_is_a_function():
    make = lambda: Distiller(nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), None, [Term(lambda s, t: (s - t).square().mean(), 'logits', 1., name='f')])
    assert make().method() == make().method()


# Signals.

def test_the_second_ctrl_c_gets_through_and_a_second_sigterm_does_not():
    class Alone: num_processes = 1
    with _Interrupt(Alone) as interrupt:
        assert not interrupt.asked()
        os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT); signal.pause()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_while_the_last_scores_are_taken_is_not_swallowed(tmp_path):
    room = lesson()
    class Pressed(torch.utils.data.Dataset):
        def __len__(self): return 2
        def __getitem__(self, i): os.kill(os.getpid(), signal.SIGINT) if i == 1 else None; return room.data[i]
    def go(valid, resume): return train_supervised(room.student, room.task, room.data, valid, budget=Budget(steps=2, batch_size=4), out=tmp_path,
                                                   resume=resume, progress=False)
    with pytest.raises(KeyboardInterrupt, match='stopped after step 2 of 2, saved'): go(Pressed(), False)
    assert go(Pressed(), True).metrics                                 # the scores were kept: nothing is read, nobody presses


# Weight 0, adapters, what a step consists of.

def test_where_the_optimiser_leaves_a_step_out_the_critic_does_too(monkeypatch):
    from accelerate import Accelerator
    def moved(skipped):
        monkeypatch.setattr(Accelerator, 'optimizer_step_was_skipped', property(lambda self: skipped))
        loss = Holistic(Critic(len(CLASSES), width=8))
        before = {k: v.clone() for k, v in loss.critic.named_parameters()}
        room = lesson()
        distiller = Distiller(room.student, room.teacher, room.task, [Term(loss, 'logits', .1)])
        fit(distiller, room.data, budget=Budget(steps=2, batch_size=4), progress=False)
        assert not distiller._seen
        return not equal(before, dict(loss.critic.named_parameters()))
    assert [moved(False), moved(True)] == [True, False]



def test_weight_zero_on_every_term_is_plain_training_bit_for_bit():
    def weights(terms):
        room = lesson()
        fit(Distiller(room.student, room.teacher, room.task, terms), room.data, budget=Budget(steps=50, batch_size=4, lr=.05), progress=False)
        return room.student.state_dict()
    def off(method):
        terms = parity.METHODS[method]()
        for term in terms: term.weight = 0.
        return [Term(t.loss, t.at, 0., name=f'{method}_{i}') for i, t in enumerate(terms)]
    assert equal(weights([]), weights([t for method in parity.METHODS for t in off(method)]))


@pytest.mark.parametrize('adapter', ['auto', '1x1', '3x3'])
def test_an_adapter_is_in_optimiser_schedule_and_checkpoint(tmp_path, adapter):
    room = lesson()
    distiller = Distiller(room.student, room.teacher, room.task, [Term(ChannelWise(), 'head.bottleneck', 50., adapter=adapter)])
    history = fit(distiller, room.data, budget=Budget(steps=3, batch_size=4, lr=.05), out=tmp_path, progress=False)
    layer, side = distiller.adapters['channel_wise'], 3 if adapter == '3x3' else 1
    assert history.plan == [f'channel_wise: Conv2d{side}x{side} (32, 24, 48) -> (48, 24, 48)']
    saved = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    assert torch.equal(saved['distiller']['adapters.channel_wise.weight'], layer.weight)
    assert len(saved['optimizer']['param_groups']) == 1 and len(saved['optimizer']['state']) == len(distiller.trainable())
    start = Distiller(lesson().student, room.teacher, room.task, [Term(ChannelWise(), 'head.bottleneck', 50., adapter=adapter)])
    start.prepare({k: v[None] for k, v in room.data[0].items()})
    assert not torch.equal(start.adapters['channel_wise'].weight, layer.weight)      # it learned


@pytest.mark.parametrize('stride', [1, 4])
def test_strides_are_matched(stride):
    room = lesson()
    student = nn.Sequential(nn.Conv2d(3, 16, 3, stride, 1), nn.ReLU(), nn.Conv2d(16, len(CLASSES), 3, 2, 1))      # stride 2 or 8, the teacher's is 4
    distiller = Distiller(student, room.teacher, room.task, [Term(PixelWise(), 'logits', 1.), Term(ChannelWise(), ('0', 'head.bottleneck'), 1.)])
    history = fit(distiller, room.data, budget=Budget(steps=2, batch_size=4, lr=.01), progress=False)
    assert any(line == f'pixel_wise: map {(96 // (2 * stride), 192 // (2 * stride))} -> (24, 48)' for line in history.plan)
    assert student[0].weight.grad.any() and distiller.adapters['channel_wise'].weight.grad.any()


def test_maps_of_other_proportions_are_refused_naming_both_layers_and_shapes():
    room = lesson()
    student = nn.Sequential(nn.Conv2d(3, 8, 3, (2, 4), 1), nn.Conv2d(8, len(CLASSES), 1))
    with pytest.raises(ValueError, match=r"pixel_wise: student 'logits' \(1, 8, 48, 48\) and teacher 'logits' \(1, 8, 24, 48\) differ in map size, and in proportion"):
        fit(Distiller(student, room.teacher, room.task, [Term(PixelWise(), 'logits', 1.)]), room.data, budget=Budget(steps=1, batch_size=4), progress=False)


QUICK = ('channel_wise_adapted', 'holistic')                           # the others take half a minute each: `make soak`

@pytest.mark.parametrize('method', [m if m in QUICK else pytest.param(m, marks=pytest.mark.soak) for m in parity.METHODS if m != 'structured'])
def test_compiled_it_takes_the_same_step(method):
    def step(**kw):
        room = lesson()
        distiller = Distiller(room.student, room.teacher, room.task, [Term(t.loss, t.at, t.weight) for t in parity.METHODS[method]()])
        for loss in distiller.losses.values():
            if hasattr(loss, 'strides'): loss.stage_one['steps'] = 1
        fit(distiller, room.data, budget=Budget(steps=1, batch_size=4, lr=.05, **kw), progress=False)
        assert not any(m._forward_hooks for m in distiller.modules())
        return torch.cat([p.detach().flatten() for p in distiller.student.parameters()])
    torch._dynamo.reset()
    plain, compiled = step(), step(compile='aot_eager')
    assert (plain - compiled).abs().max() < 1e-4 * plain.abs().max()


# Processes and launchers.

def test_accelerate_launch_on_cpus_is_refused(tmp_path):
    script = tmp_path / 'job.py'
    script.write_text('from kdnotes.loop import Budget, train_supervised\nfrom kdnotes.recipes import lesson\nlesson()\n')
    done = run(sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', 2, script)
    assert done.returncode != 0 and 'has started one process, whatever its --num_processes says' in done.stderr


@pytest.mark.parametrize('name', ['FSDP', 'DEEPSPEED'])
def test_networks_split_over_processes_are_refused(monkeypatch, name):
    monkeypatch.setenv(f'ACCELERATE_USE_{name}', 'true')
    with pytest.raises(RuntimeError, match=f'asks for {name}'): processes_here()


def test_the_budget_decides_not_the_environment(monkeypatch):
    def weights():
        room = lesson()
        train_supervised(room.student, room.task, room.data, budget=Budget(steps=1, batch_size=4), progress=False)
        return room.student.state_dict()
    plain = weights()
    for name, value in (('GRADIENT_ACCUMULATION_STEPS', '4'), ('MIXED_PRECISION', 'bf16'), ('DYNAMO_BACKEND', 'eager')): monkeypatch.setenv(f'ACCELERATE_{name}', value)
    assert equal(plain, weights())


SEVERAL = '''
import json, os, signal, sys, torch
from torch import nn
from kdnotes.data.scenes import CLASSES
from kdnotes.distiller import Distiller, Term
from kdnotes.loop import Budget, fit
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.networks import tiny_student, tiny_teacher
from kdnotes.recipes import scenes_data
from kdnotes.tasks import Segmentation

torch.set_num_threads(1)
data = scenes_data(labelled=8, teacher=1, valid=4)
samples = [data.valid[i] for i in range(4)]

def run(out=None, idle=False, train=samples, terms=True, **kw):
    torch.manual_seed(0)
    student, teacher = tiny_student(len(CLASSES)), tiny_teacher(len(CLASSES))
    if idle: student.idle = nn.Conv2d(1, 1, 1)
    distiller = Distiller(student, teacher, Segmentation(len(CLASSES)), [Term(ChannelWise(), 'head.bottleneck', 1.)] if terms else [])
    history = fit(distiller, train, samples, budget=Budget(steps=4, batch_size=4, lr=.05, **kw), out=out, resume=out is not None, progress=False)
    buffers = torch.cat([b.flatten().double() for b in student.buffers()])
    return history, torch.cat([p.detach().flatten().double() for p in student.parameters()]), buffers

class Pressed(torch.utils.data.Dataset):
    "The second process is told twice to end while it reads for its second step."
    count = 0
    def __len__(self): return 4
    def __getitem__(self, i):
        Pressed.count += 1
        if os.environ['RANK'] == '1' and Pressed.count == 4: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]
        return samples[i]

if __name__ == '__main__':
    found = {}
    if len(sys.argv) > 2:                                          # alone: goes on with what two have begun
        found['steps'] = [row['step'] for row in run(out=sys.argv[1])[0].steps]
    else:
        try: run(idle=True)
        except RuntimeError as e: found['idle'] = str(e)
        history, plain, buffers = run()
        scored, compiled, _ = run(compile='aot_eager')
        found['compiled'] = float((compiled - plain).abs().max() / plain.abs().max())
        found['scores'] = [h.metrics[-1]['miou'] for h in (history, scored)]
        both = [torch.zeros_like(buffers) for _ in range(2)]
        torch.distributed.all_gather(both, buffers); found['buffers agree'] = torch.equal(*both)
        try: run(out=sys.argv[1], train=Pressed())
        except KeyboardInterrupt as e: found['stopped'] = str(e)
    if int(os.environ.get('RANK', 0)) == 0: print(json.dumps(found))
'''


def test_what_several_processes_do_differently(tmp_path):
    script, out = tmp_path / 'several.py', tmp_path / 'run'
    script.write_text(SEVERAL)
    done = run(*TORCHRUN, 2, script, out)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "take no part in any loss, such as 'student.idle.weight'" in found['idle']
    assert found['compiled'] < 1e-4 and abs(found['scores'][0] - found['scores'][1]) < .02
    assert found['buffers agree']                                      # BatchNorm's statistics, as they were scored
    assert found['stopped'] == 'stopped after step 2 of 4, saved'      # both, though one was told
    alone = run(sys.executable, script, out, 'alone')                  # another number of processes goes on
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert json.loads(alone.stdout.splitlines()[-1])['steps'] == [0, 1, 2, 3]


def test_two_processes_train_from_the_command_line_and_leave_one_result(tmp_path):
    program = Path(sys.executable).with_name('kdnotes_train')
    common = ['--recipe', 'scenes', '--max_steps', '2', '--out']
    done = run(*TORCHRUN, 2, '--no-python', program, *common, tmp_path / 'two')
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('pixel_wise, seed 0: miou') == 1          # said once, not twice
    assert run(program, *common, tmp_path / 'one').returncode == 0
    one, two = (json.loads((tmp_path / n / 'results.json').read_text())['runs'][0]['metrics']['miou'] for n in ('one', 'two'))
    assert abs(one - two) < .05                                        # BatchNorm's statistics are per process: near, not equal


def test_a_tracker_that_is_not_there_is_named():
    room = lesson()
    with pytest.raises(Exception, match='comet|tracker'):
        train_supervised(room.student, room.task, room.data, budget=Budget(steps=1, batch_size=4), tracker='comet_ml', progress=False)


def test_curves_for_tensorboard(tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed: its tracker was not tried')
    room = lesson()
    train_supervised(room.student, room.task, room.data, room.data, budget=Budget(steps=3, batch_size=4), out=tmp_path, tracker='tensorboard', progress=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    books = [EventAccumulator(str(file)).Reload() for file in tmp_path.rglob('events.out.tfevents.*')]
    (curves,) = [b for b in books if 'loss' in b.Tags()['scalars']]
    assert {'loss', 'task', 'lr', 'miou'} <= set(curves.Tags()['scalars']) and len(curves.Scalars('loss')) == 3


# Long runs.

@pytest.mark.soak
def test_five_hundred_adversarial_steps_on_five_seeds(ledger):
    from kdnotes.recipes import RECIPES
    from kdnotes.networks import load_weights, tiny_teacher
    recipe, rows = RECIPES['scenes'], []
    data = recipe.data(None)
    teacher = load_weights(tiny_teacher(len(CLASSES)), HERE.parent / 'data/ledger/scenes/teacher.safetensors')
    for seed in range(5):
        torch.manual_seed(seed)
        term = Term(Holistic(Critic(len(CLASSES), width=16, seed=seed)), 'logits', .001)
        distiller = Distiller(recipe.student(), teacher, recipe.task, [term])
        history = fit(distiller, data.train, budget=Budget(steps=500, batch_size=8, lr=.05), seed=seed, progress=False)
        assert all(torch.isfinite(torch.tensor(history.column(k))).all() for k in ('loss', 'holistic'))
        batch = {k: torch.stack([data.train[0, i][k] for i in range(8)]) for k in ('image', 'mask')}
        with torch.no_grad(): (_, ours), theirs = distiller.listen(distiller.student, batch['image'], 0), distiller.their(batch)
        rows.append({'seed': seed, **health(term.loss.critic, ours['logits'], theirs['logits'], batch['image'])})
    ledger('adversarial', {'steps': 500, 'weight': .001, 'critics': rows})
    assert [r['verdict'] for r in rows] == ['healthy'] * 5, rows
