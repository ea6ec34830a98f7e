"""The loop where it hurts: killed processes, real signals, two processes, mixed precision."""
import copy, functools, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from kdnotes.distiller import Distiller, Term
from kdnotes.loop import Budget, evaluate, fit, step_seed, train_supervised
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.networks import save_weights
from kdnotes import recipes

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1'}


@functools.cache
def taught(): return recipes.lesson()

def lesson(): return copy.deepcopy(taught())                          # its teacher is trained once

SCRIPT = '''
import sys, torch
from kdnotes.distiller import Distiller, Term
from kdnotes.loop import Budget, fit
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.data.datasets import Augmented, InMemory, eval_transform
from kdnotes.data.scenes import Scenes
from kdnotes.networks import save_weights, tiny_student, tiny_teacher
from kdnotes.tasks import Segmentation
torch.set_num_threads(1)
class Drops(torch.nn.Module):                                # dropout and an adapter, so that there is randomness and state beyond the student
    def __init__(self, net): super().__init__(); self.net, self.drop = net, torch.nn.Dropout(.2)
    def forward(self, x): return self.net(self.drop(x))
torch.manual_seed(3)
student = Drops(tiny_student(8))
distiller = Distiller(student, tiny_teacher(8), Segmentation(8), [Term(ChannelWise(), 'logits', 1.), Term(ChannelWise(), ('net.head.bottleneck', 'head.bottleneck'), 1., name='features')])
print('ready', flush=True)
fit(distiller, Augmented(InMemory(Scenes(16)), eval_transform()), budget=Budget(steps=int(sys.argv[2]), batch_size=4, lr=.05), out=sys.argv[1], resume=True, save_every=3, progress=False)
save_weights(student, sys.argv[1] + '/student.safetensors')
'''


def start(folder, steps=24):
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(folder), str(steps)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(folder):
    process = start(folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return (folder / 'student.safetensors').read_bytes()


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory): return finished(tmp_path_factory.mktemp('whole'))


def steps_done(folder):
    file = folder / 'checkpoint.pt'
    return torch.load(file, weights_only=True)['step'] if file.exists() else 0


def test_ctrl_c_in_another_process_resumes_to_the_same_bits(tmp_path, uninterrupted):
    process = start(tmp_path)
    process.stdout.readline()
    while steps_done(tmp_path) == 0 and process.poll() is None: time.sleep(.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and 'KeyboardInterrupt: stopped after step' in err
    assert 0 < steps_done(tmp_path) < 24
    assert finished(tmp_path) == uninterrupted


def test_kill_9_resumes_to_the_same_bits(tmp_path, uninterrupted):
    process = start(tmp_path)
    process.stdout.readline()
    while steps_done(tmp_path) < 6 and process.poll() is None: time.sleep(.01)
    process.kill(); process.communicate()
    assert 6 <= steps_done(tmp_path) < 24
    assert finished(tmp_path) == uninterrupted


def test_ctrl_c_reaches_the_workers_too(tmp_path):
    script = SCRIPT.replace('batch_size=4, lr=.05', 'batch_size=4, lr=.05, workers=2')
    process = subprocess.Popen([sys.executable, '-c', script, str(tmp_path), '400'], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process.stdout.readline()
    while steps_done(tmp_path) == 0 and process.poll() is None: time.sleep(.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert 'KeyboardInterrupt: stopped after step' in err and 'DataLoader worker' not in err and steps_done(tmp_path) > 0


@pytest.mark.soak
def test_kills_at_random_moments(tmp_path, uninterrupted):
    import random
    moments = random.Random(0)
    for _ in range(12):
        process = start(tmp_path)
        process.stdout.readline()
        time.sleep(moments.random() * 1.2)
        process.kill(); process.communicate()
        steps_done(tmp_path)                                  # whatever is there is whole
    assert finished(tmp_path) == uninterrupted


def test_a_torn_checkpoint_is_refused_not_used(tmp_path):
    room = lesson()
    budget = Budget(steps=4, batch_size=4, lr=.05)
    train_supervised(room.student, room.task, room.data, budget=budget, out=tmp_path, progress=False)
    whole = (tmp_path / 'checkpoint.pt').read_bytes()
    (tmp_path / 'checkpoint.pt').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match='checkpoint.pt is not a checkpoint'): train_supervised(room.student, room.task, room.data, budget=budget, out=tmp_path, resume=True, progress=False)


def test_a_checkpoint_cannot_execute_code(tmp_path):
    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path / 'exploded',))
    torch.save({'step': 1, 'bomb': Bomb()}, tmp_path / 'checkpoint.pt')
    room = lesson()
    with pytest.raises(ValueError, match='checkpoint.pt is not a checkpoint'):
        train_supervised(room.student, room.task, room.data, budget=Budget(steps=2, batch_size=4), out=tmp_path, resume=True, progress=False)
    assert not (tmp_path / 'exploded').exists()


TWO = '''
import sys, torch
from torch import nn
from kdnotes.data.scenes import CLASSES
from kdnotes.distiller import Distiller, Term
from kdnotes.loop import Budget, fit
from kdnotes.losses.pixel_wise import PixelWise
from kdnotes.networks import load_weights, tiny_teacher
from kdnotes.recipes import scenes_data
from kdnotes.tasks import Segmentation
import os
torch.set_num_threads(1)
teacher = load_weights(tiny_teacher(len(CLASSES)), sys.argv[2])                                             # trained before, by one process
data = scenes_data(labelled=1, teacher=1, valid=16).valid
samples = [{'image': s['image'], 'mask': s['mask'] % 255} for s in (data[i] for i in range(16))]       # all labelled: the mean over pixels is per process
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, len(CLASSES), 1))                     # no BatchNorm: its statistics are per process
distiller = Distiller(net, teacher, Segmentation(len(CLASSES)), [Term(PixelWise(), 'logits', 1.)])
history = fit(distiller, samples, samples, budget=Budget(steps=5, batch_size=8, lr=.05), progress=False)
if int(os.environ.get('RANK', 0)) == 0: torch.save({'net': net.state_dict(), 'miou': history.metrics[-1]['miou'], 'world': int(os.environ.get('WORLD_SIZE', 1))}, sys.argv[1])
'''


def test_two_processes_train_and_score_like_one(tmp_path):
    script = tmp_path / 'two.py'; script.write_text(TWO)
    save_weights(lesson().teacher, weights := tmp_path / 'teacher.safetensors')
    env = {**ENV, 'ACCELERATE_USE_CPU': 'true', 'CUDA_VISIBLE_DEVICES': ''}
    subprocess.run([sys.executable, str(script), str(tmp_path / 'one.pt'), str(weights)], env=env, check=True, timeout=300)
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script), str(tmp_path / 'two.pt'), str(weights)],
                   env=env, check=True, timeout=300, capture_output=True)
    one, two = (torch.load(tmp_path / f'{n}.pt', weights_only=True) for n in ('one', 'two'))
    assert (one['world'], two['world']) == (1, 2)
    for k in one['net']: torch.testing.assert_close(two['net'][k], one['net'][k], rtol=1e-4, atol=1e-6)
    assert abs(one['miou'] - two['miou']) < 1e-3


def test_the_teacher_of_a_whole_fit_is_byte_for_byte_what_it_was():
    room = lesson()
    before = {k: v.clone() for k, v in room.teacher.state_dict().items()}
    fit(Distiller(room.student, room.teacher, room.task, [Term(ChannelWise(), 'logits', 3.)]), room.data, budget=Budget(steps=5, batch_size=4, lr=.05), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in room.teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in room.teacher.parameters())


def test_scoring_leaves_mode_and_weights_alone():
    room = lesson()
    room.student.train(); before = {k: v.clone() for k, v in room.student.state_dict().items()}
    evaluate(room.student, room.task, room.data, batch_size=4)
    assert room.student.training and all(torch.equal(v, before[k]) for k, v in room.student.state_dict().items())


def test_the_global_generator_does_not_decide_anything():
    runs = []
    for seed in (1, 2):
        room = lesson()
        torch.manual_seed(seed)                               # somebody's own randomness before the call
        fit(Distiller(room.student, room.teacher, room.task, [Term(ChannelWise(), ('head.bottleneck', 'head.bottleneck'), 1.)]), room.data,
            budget=Budget(steps=3, batch_size=4, lr=.05), progress=False)
        runs.append(torch.cat([v.flatten().double() for v in room.student.state_dict().values()]))
    assert torch.equal(*runs)


def test_step_seeds_do_not_collide():
    assert len({step_seed(s, k, r) for s in range(4) for k in range(500) for r in range(2)}) == 4000


def test_bf16_and_clip_and_adamw_run():
    room = lesson()
    budget = Budget(steps=3, batch_size=4, lr=1e-3, precision='bf16', clip=1., optimizer='adamw', warmup=1)
    history = fit(Distiller(room.student, room.teacher, room.task, [Term(ChannelWise(), 'logits', 3.)]), room.data, budget=budget, progress=False)
    assert len(history.steps) == 3
    fit(Distiller(lesson().student, None, room.task, []), room.data, budget=Budget(steps=1, batch_size=4), progress=False)      # back to full precision


class Stop(Exception): pass


def living(name):
    "A term with parts of its own: a critic, an auto-encoder and adapters, the two classifiers, labels."
    from kdnotes.losses.global_local import GlobalLocal
    from kdnotes.losses.holistic import Critic, Holistic
    from kdnotes.losses.intra_class_variation import IntraClassVariation
    from kdnotes.losses.knowledge_adaptation import KnowledgeAdaptation
    feature = 'head.bottleneck'
    return {'holistic': lambda: Term(Holistic(Critic(8, width=8)), 'logits', .01),
            'knowledge_adaptation': lambda: Term(KnowledgeAdaptation(32, 48, resize=True, steps=2), feature, .1),
            'global_local': lambda: Term(GlobalLocal(beta=10.), feature, .1),
            'intra_class_variation': lambda: Term(IntraClassVariation(8), feature, 10.)}[name]()


@pytest.mark.parametrize('name', ['holistic', 'knowledge_adaptation', 'global_local', 'intra_class_variation'])
def test_a_loss_with_a_life_of_its_own_resumes_to_the_same_bits(name, tmp_path):
    def run(steps, out=None, resume=False, stop_at=None):
        room = lesson()
        distiller = Distiller(room.student, room.teacher, room.task, [living(name)])
        update = distiller.update
        if stop_at is not None:
            calls = iter(range(stop_at))
            def stopping():
                update()
                if next(calls, None) is None: raise Stop
            object.__setattr__(distiller, 'update', stopping)
        history = fit(distiller, room.data, budget=Budget(steps=steps, batch_size=4, lr=.05), out=out, resume=resume, save_every=2, progress=False)
        return distiller, history
    whole, history = run(6)
    with pytest.raises(Stop): run(6, tmp_path, stop_at=5)                       # dies in the sixth step; the last checkpoint is of step 4
    assert steps_done(tmp_path) == 4
    resumed, _ = run(6, tmp_path, resume=True)
    ours, theirs = resumed.state(), whole.state()
    assert set(ours) == set(theirs)
    for key, value in theirs.items(): assert torch.equal(ours[key], value), key
    assert history.column(name)[-1] != history.column(name)[0]
