"""The teacher cache where it hurts: killed writers, several processes, damaged files, other teachers, a whole run."""
import copy, json, os, pickle, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import default_collate

from kdnotes.data.datasets import Augmented, Batches, eval_transform, train_loader, train_transform
from kdnotes.data.scenes import THINGS, Scenes
from kdnotes.distiller import Distiller, Term
from kdnotes.loop import Budget, fit, keyed
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.losses.pair_wise import PairWise
from kdnotes.losses.pixel_wise import PixelWise
from kdnotes.networks import (retinanet, tiny_depth_student, tiny_depth_teacher, tiny_detector_student, tiny_detector_teacher, tiny_student,
                              tiny_teacher)
from kdnotes.tasks import Depth, Detection, Segmentation
from kdnotes.teacher_cache import (TOLERANCE, TeacherCache, cached_gap, fingerprint, image_key, plan_cache, run_draws,
                                   teacher_outputs, write_cache)

BUDGET = Budget(steps=6, batch_size=4, lr=.05)
TASK = Segmentation(8)


def net(build=tiny_teacher, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(8).eval()


def data(crop=(32, 48)):
    return Augmented(Scenes(8, size=(48, 64)), train_transform(crop=crop, scale=(.8, 1.4)))


def answers(cache): return {key: {p: x.numpy().tobytes() for p, x in cache.read(key).items()} for key in cache}


@pytest.fixture(scope='module')
def teacher(): return net()


@pytest.fixture(scope='module')
def written(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp('cache')
    return write_cache(folder, teacher, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET, progress=False)


# --- what is stored is what the teacher says

def test_every_batch_of_the_run_is_covered_and_within_half_precision(teacher, written):
    train = written.dataset(data())
    for seen, live in zip(train_loader(keyed(train, 0), 4, steps=6), train_loader(keyed(data(), 0), 4, steps=6), strict=True):
        assert set(seen) == {*live, 'teacher'} and all(torch.equal(seen[k], live[k]) for k in live)
        said = teacher_outputs(teacher, TASK, ('logits', 'head.bottleneck'), live['image'])
        for place, z in said.items():
            c = seen['teacher'][place]
            assert c.dtype == torch.float16 and c.shape == z.shape
            # half a unit in the last place, and what another batch of the same images rounds differently
            assert ((c.double() - z.double()).abs() <= 2.**-11 * z.double().abs() + 2.**-25 + 1e-5 * z.abs().max()).all()
        assert max(cached_gap(seen, teacher, TASK).values()) <= 2.**-11 + 1e-5 < TOLERANCE


def test_the_run_is_covered_exactly(written):
    pairs = {pair for batch in Batches(8, 4, steps=6, seed=0) for pair in batch}
    assert len(written) == len(run_draws(data(), budget=BUDGET)) == len(pairs | {(0, 0)})


def test_the_same_entries_serve_micro_batches_and_ranks(written):
    train = written.dataset(data())
    for kw in (dict(batch_size=2, steps=12), dict(batch_size=4, steps=6, rank=1, world=2)):
        size = kw.pop('batch_size')
        assert all('teacher' in batch for batch in train_loader(keyed(train, 0), size, seed=0, **kw))


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_write_and_read_the_same_bytes(teacher, written, tmp_path, workers):
    other = write_cache(tmp_path, teacher, data(), TASK, ['head.bottleneck', 'logits'], budget=BUDGET, workers=workers, progress=False)
    assert answers(other) == answers(written)
    train = other.dataset(data(), places='logits')
    alone, shared = (list(train_loader(keyed(train, 0), 4, steps=3, workers=w)) for w in (0, workers))
    for a, b in zip(alone, shared, strict=True):
        assert set(b['teacher']) == {'logits'} and torch.equal(a['teacher']['logits'], b['teacher']['logits'])


def test_a_cache_travels_without_its_tensors(written):
    sent = pickle.dumps(written)
    assert len(sent) < written.bytes / 4 and answers(pickle.loads(sent)) == answers(written)


def test_an_entry_read_is_a_copy(written):
    key = next(iter(written))
    written.read(key)['logits'].zero_()
    assert written.read(key)['logits'].any()


def test_images_of_several_sizes_in_one_cache(teacher, tmp_path):
    sizes = [(48, 64), (64, 48), (48, 64), (64, 64), (64, 48)]
    samples = [{'image': torch.randn(3, *s, generator=torch.Generator().manual_seed(i)), 'mask': torch.zeros(s).long()} for i, s in enumerate(sizes)]
    cache = write_cache(tmp_path, teacher, samples, TASK, epochs=1, progress=False)
    train = cache.dataset(samples)
    assert len(cache) == 5 and len(cache.files) == 3
    for i, s in enumerate(samples):
        z = teacher_outputs(teacher, TASK, ('logits',), s['image'][None])['logits'][0]
        assert (train[i]['teacher']['logits'].float() - z).abs().max() <= TOLERANCE * z.abs().max()


def test_keys_with_zero_bytes_are_found(teacher, tmp_path):
    """numpy's byte strings drop zeros at the end: no key may be taken for another because of it."""
    import kdnotes.teacher_cache as module
    keys = [bytes(16), bytes(15) + b'\1', b'\1' + bytes(15), b'\1' + bytes(14) + b'\1', b'\xff' * 16, b'\xff' * 15 + b'\0']
    begun = module._begin(tmp_path, teacher, ('logits',), torch.float16)
    module._write_shard(begun, keys, {'logits': torch.arange(6.).half()[:, None]})
    cache = TeacherCache(tmp_path, teacher)
    assert sorted(cache) == sorted(keys) and len(cache) == 6
    assert [cache.read(key)['logits'].item() for key in keys] == [0, 1, 2, 3, 4, 5]
    assert bytes(14) + b'\1\0' not in cache and b'\1' * 16 not in cache


def test_the_key_sees_dtype_shape_and_every_bit():
    x = torch.randn(3, 4, 6)
    flipped = x.clone(); flipped.view(torch.int32)[2, 3, 5] ^= 1
    assert image_key(x) == image_key(x.clone()) == image_key(x.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert len({image_key(o) for o in (x, flipped, x.view(3, 6, 4), x.double(), x.view(torch.int32), x.flip(-1))}) == 6


# --- a run

class Mute(nn.Module):
    """The teacher's code, which may be run once (by `prepare`) and then raises."""
    def __init__(self, net): super().__init__(); self.net, self.left = net, 1
    def forward(self, image):
        self.left -= 1
        if self.left < 0: raise AssertionError('the live teacher was run')
        return self.net(image)


def run(train, teacher, terms=None, **kw):
    student = net(tiny_student, seed=3)
    terms = terms or [Term(PixelWise(temperature=4.), 'logits', 1.), Term(ChannelWise(), ('head.bottleneck', 'net.head.bottleneck'), 1., name='features')]
    fit(Distiller(student, teacher, TASK, terms), train, budget=BUDGET, progress=False, **kw)
    return torch.cat([v.flatten().double() for v in student.state_dict().values()])


def test_a_whole_run_without_the_live_teacher(teacher, tmp_path):
    wrapped = Mute(teacher); wrapped.left = 10**9
    cache = write_cache(tmp_path, wrapped, data(), TASK, ['logits', 'net.head.bottleneck'], budget=BUDGET, seeds=2, progress=False)
    live = run(data(), wrapped, seed=2)
    cached = []
    for _ in range(2):
        mute = Mute(teacher)
        cached.append(run(cache.dataset(data()), mute, seed=2))
        assert mute.left == 0
    start = torch.cat([v.flatten().double() for v in net(tiny_student, seed=3).state_dict().values()])
    assert torch.equal(*cached)
    assert 0 < (cached[0] - live).norm() < .02 * (live - start).norm()


def test_another_seed_of_the_run_is_refused_and_can_be_added(teacher, tmp_path):
    cache = write_cache(tmp_path, teacher, data(), TASK, budget=BUDGET, progress=False)
    terms = [Term(PixelWise(), 'logits', 1.)]
    with pytest.raises(ValueError, match='with seed 1 is not in'): run(cache.dataset(data()), teacher, terms, seed=1)
    more = write_cache(tmp_path, teacher, data(), TASK, budget=BUDGET, seeds=(0, 1), progress=False)
    assert set(cache) < set(more)
    run(more.dataset(data()), teacher, terms, seed=1)


def test_a_copy_with_another_seed_leaves_the_first_alone(written):
    train = written.dataset(data())
    other = copy.copy(train); other.seed = 9
    assert (train.seed, other.seed) == (0, 9) and torch.equal(train[0, 0]['image'], data()[0, 0]['image'])
    with pytest.raises(ValueError, match='sample 0 in epoch 0 with seed 9'): other[0, 0]
    with pytest.raises(IndexError): train[0, 8]


def test_the_callers_generator_and_the_teachers_modes_are_left_alone(tmp_path):
    net_ = net().train()
    net_.head.eval()
    modes, state = [m.training for m in net_.modules()], torch.get_rng_state()
    before = fingerprint(net_)
    cache = write_cache(tmp_path, net_, data(), TASK, budget=BUDGET, progress=False)
    cache.dataset(data())[0, 0]
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in net_.modules()] == modes
    assert fingerprint(net_) == before and all(p.requires_grad and p.grad is None for p in net_.parameters())


# --- boxes and depths, which move with the picture

LEVEL, SMALL = 'net.backbone.levels.', Budget(steps=6, batch_size=4, lr=.002, optimizer='adamw')
def wide_retinanet(): return retinanet('resnet18', num_classes=3, channels=16, convs=1, ratios=(1.,))
BOXES_AND_DEPTHS = {
    'boxes, fcos': (Detection(3), ('boxes', 'labels'), lambda: tiny_detector_student(3), lambda: tiny_detector_teacher(3),
                    [('logits', PixelWise()), *((f'{LEVEL}{i}', ChannelWise()) for i in range(3))]),
    'boxes, retinanet': (Detection(3), ('boxes', 'labels'), wide_retinanet, wide_retinanet,
                         [('logits', PixelWise()), (LEVEL + '0', PairWise()), (LEVEL + '4', ChannelWise())]),
    'depth': (Depth(nearest=1.5, farthest=80.), ('depth',), tiny_depth_student, tiny_depth_teacher, [('head.bottleneck', ChannelWise())]),
    'depth in bins': (Depth(nearest=1.5, farthest=80., bins=12), ('depth',), lambda: tiny_depth_student(12), lambda: tiny_depth_teacher(12),
                      [('logits', PixelWise()), ('head.bottleneck', PairWise())])}


def seeded(make, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


@pytest.mark.parametrize('kind', BOXES_AND_DEPTHS)
def test_cached_and_live_students_agree_on_what_moves_with_the_picture(kind, tmp_path):
    task, keys, student, teacher, terms = BOXES_AND_DEPTHS[kind]
    assert len(THINGS) == 3
    train = Augmented(Scenes(8, size=(48, 96), keys=('image', *keys)), train_transform(crop=(32, 64), scale=(.8, 1.4)))
    taught, places = seeded(teacher, 0), [place for place, _ in terms]
    cache = write_cache(tmp_path, taught, train, task, places, budget=SMALL, seeds=2, progress=False)
    seen = []
    for a, b in zip(train_loader(keyed(cache.dataset(train), 2), 4, steps=6, seed=2), train_loader(keyed(train, 2), 4, steps=6, seed=2), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ('image', *keys)) and set(a['teacher']) == set(places)
        assert max(cached_gap(a, taught, task).values()) <= TOLERANCE
        seen += [tuple(a[k].shape) for k in keys[:1]]
    if 'boxes' in keys: assert len({shape[1] for shape in seen}) > 1                    # another number of fillers in every batch
    states = []
    for data in (train, cache.dataset(train), cache.dataset(train)):
        net = seeded(student, 3)
        start = torch.cat([v.flatten().double() for v in net.state_dict().values()])
        mute = copy.deepcopy(taught)
        if data is not train: mute.register_forward_pre_hook(silent_after(1))            # `prepare` looks at the shapes once
        fit(Distiller(net, mute, task, [Term(loss, place, 1., name=f'term{i}') for i, (place, loss) in enumerate(terms)]), data, budget=SMALL, seed=2, progress=False)
        states.append(torch.cat([v.flatten().double() for v in net.state_dict().values()]))
    live, *cached = states
    assert torch.equal(*cached) and 0 < (cached[0] - live).norm() < .05 * (live - start).norm()


def silent_after(n):
    left = [n]
    def hook(*_):
        left[0] -= 1
        if left[0] < 0: raise AssertionError('the live teacher was run')
    return hook


# --- killed, shared, damaged

SCRIPT = '''
import sys, time, torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from test_teacher_cache import BUDGET, TASK, data, net
from kdnotes.teacher_cache import write_cache
teacher, rank, world, pause = net(), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
teacher.register_forward_hook(lambda *_: time.sleep(pause))
print('ready', flush=True)
write_cache(sys.argv[1], teacher, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET, batch_size=2, shard_bytes=1, rank=rank, world=world, progress=False)
'''


def writer(folder, rank=0, world=1, pause=0.):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', SCRIPT, str(folder), str(Path(__file__).parent), str(rank), str(world), str(pause)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def whole(folder, teacher):
    return answers(write_cache(folder, teacher, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET, batch_size=2, progress=False))


@pytest.mark.parametrize('shards', [pytest.param(1, marks=pytest.mark.soak), 4])
def test_kill_9_leaves_a_usable_cache_and_the_next_call_goes_on_to_the_same_bytes(teacher, tmp_path, shards):
    process = writer(tmp_path, pause=.05)
    process.stdout.readline()
    while process.poll() is None and len(list(tmp_path.glob('*.safetensors'))) < shards: time.sleep(.002)
    process.send_signal(signal.SIGKILL); process.communicate()
    assert process.returncode == -signal.SIGKILL, 'it was over before the kill'
    half = TeacherCache(tmp_path, teacher)                                   # whole as far as it goes
    assert shards <= len(half) / 2 < 12 and len(half) % 2 == 0
    kept, full = answers(half), whole(tmp_path, teacher)
    assert kept.items() <= full.items() and full == whole(tmp_path / 'clean', teacher)


@pytest.mark.soak
def test_kill_9_at_twenty_random_moments(teacher, tmp_path):
    rng, clean, killed = np.random.default_rng(0), whole(tmp_path / 'clean', teacher), 0
    for i in range(20):
        folder = tmp_path / str(i)
        process = writer(folder, pause=.03)
        process.stdout.readline()
        time.sleep(rng.uniform(0, .8)); process.send_signal(signal.SIGKILL); process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if (folder / 'index.json').exists(): assert answers(TeacherCache(folder, teacher)).items() <= clean.items()
        assert whole(folder, teacher) == clean
    assert killed >= 15


def test_two_processes_share_the_work_in_one_folder(teacher, written, tmp_path):
    process = writer(tmp_path, 1, 2, pause=.05)                                # the other one is this
    process.stdout.readline()
    write_cache(tmp_path, teacher, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET, batch_size=2, shard_bytes=1, rank=0, world=2, progress=False)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    cache = TeacherCache(tmp_path, teacher)
    assert set(cache) == set(written)
    for key in cache:
        for p, x in cache.read(key).items():
            y = written.read(key)[p]
            assert (x.float() - y.float()).abs().max() <= TOLERANCE * y.float().abs().max()


def test_a_second_call_writes_nothing(teacher, written):
    before = {f: f.stat().st_mtime_ns for f in written.folder.iterdir()}
    again = write_cache(written.folder, teacher, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET, progress=False)
    assert {f: f.stat().st_mtime_ns for f in written.folder.iterdir()} == before and len(again) == len(written)


@pytest.fixture
def copied(written, tmp_path):
    for file in written.folder.iterdir(): (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def reads_wrongly(folder, teacher, written):
    """Does any entry of the cache come back, and differ from what was written?"""
    sound = answers(written)
    try: cache = TeacherCache(folder, teacher)
    except ValueError: return False
    for key in cache:
        try: found = {p: x.numpy().tobytes() for p, x in cache.read(key).items()}
        except ValueError: continue
        if found != sound.get(key) and key in sound: return True
    return False


def test_a_flipped_bit_anywhere_is_never_read_as_an_answer(teacher, written, copied):
    [file] = copied.glob('*.safetensors')
    sound = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*range(0, 200, 7), *rng.integers(0, len(sound), 40)]:
        broken = bytearray(sound); broken[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        assert not reads_wrongly(copied, teacher, written), at


@pytest.mark.parametrize('length', [0, 4, 100, -1])
def test_a_cut_file_is_named(teacher, copied, length):
    [file] = copied.glob('*.safetensors')
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=f'{file.name} is damaged.*call write_cache again'): TeacherCache(copied, teacher)


def test_deleting_the_damaged_file_heals_the_cache(teacher, written, copied):
    [file] = copied.glob('*.safetensors')
    file.unlink()
    assert len(TeacherCache(copied, teacher)) == 0
    assert answers(write_cache(copied, teacher, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET, progress=False)) == answers(written)


def test_swapped_answers_are_noticed(teacher, written, copied):
    [file] = copied.glob('*.safetensors')
    with safetensors.safe_open(file, 'pt') as f: head = f.metadata()
    shard = safetensors.torch.load_file(file)
    shard['logits'] = shard['logits'].roll(1, 0)
    file.write_bytes(safetensors.torch.save(shard, head))
    cache = TeacherCache(copied, teacher)
    for key in cache:
        with pytest.raises(ValueError, match='checksum'): cache.read(key)


def test_foreign_files_are_refused(teacher, copied):
    for tensors in ({'x': torch.zeros(3)}, {'.keys': torch.zeros(2, 16, dtype=torch.uint8), '.sums': torch.zeros(2, 2).long(), 'logits': torch.zeros(()).half(), 'head.bottleneck': torch.zeros(2).half()}):
        (copied / 'foreign.safetensors').write_bytes(safetensors.torch.save(tensors))
        with pytest.raises(ValueError, match='no shard of this cache'): TeacherCache(copied, teacher)


@pytest.mark.parametrize('text', ['', 'nonsense', '[]', '{}', '{"format": 1, "teacher": 3, "places": [], "dtype": "float16", "torch": ""}',
                                  '{"format": 1, "teacher": {}, "places": ["logits"], "dtype": "float16", "torch": ""}', '{"format": 99}'])
def test_a_broken_index_is_refused(teacher, copied, text):
    (copied / 'index.json').write_text(text)
    with pytest.raises(ValueError, match='not the index of a teacher cache'): TeacherCache(copied, teacher)


# --- stale

class Scaled(nn.Module):
    def __init__(self, net, factor): super().__init__(); self.net, self.factor = net, factor
    def forward(self, x): return {'out': self.factor * self.net(x)['out']}


def moved(net): net.head.classifier.bias.data[0] += 1e-6
def seen_in_training(net): net.train()(torch.randn(2, 3, 32, 48))
def dilated(net): net.backbone.wide1.first[0].dilation = net.backbone.wide1.first[0].padding = (2, 2)
def halved(net): net.half()


@pytest.mark.parametrize('change, named', [(moved, 'head.classifier.bias'), (seen_in_training, 'running_mean'), (dilated, 'set up differently'),
                                           (halved, 'tensors differ')])
def test_another_teacher_is_refused_and_the_difference_named(teacher, written, change, named):
    other = copy.deepcopy(teacher); change(other)
    with pytest.raises(ValueError, match=named): TeacherCache(written.folder, other)


def test_nothing_is_added_to_another_teachers_cache(teacher, written):
    other, before = copy.deepcopy(teacher), sorted(written.folder.iterdir())
    moved(other)
    with pytest.raises(ValueError, match='another teacher'):
        write_cache(written.folder, other, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET, seeds=(0, 1), progress=False)
    assert sorted(written.folder.iterdir()) == before


def test_the_same_teacher_elsewhere_is_welcome(teacher, written):
    for same in (copy.deepcopy(teacher), copy.deepcopy(teacher).train(), copy.deepcopy(teacher).to(memory_format=torch.channels_last),
                 copy.deepcopy(teacher).requires_grad_(False), torch.compile(copy.deepcopy(teacher), backend='eager')):
        assert len(TeacherCache(written.folder, same)) == len(written)


@pytest.mark.parametrize('first, then', [(0, (0, 1)), (0, 3), (2, 3)])
def test_changed_code_under_the_same_bytes_is_noticed_before_writing(teacher, tmp_path, first, then):
    write_cache(tmp_path, Scaled(teacher, 1.), data(), TASK, budget=BUDGET, seeds=first, progress=False)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match='its code was changed'): write_cache(tmp_path, Scaled(teacher, 1.01), data(), TASK, budget=BUDGET, seeds=then, progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_another_teachers_shard_is_refused_wherever_it_came_from(teacher, copied):
    other = copy.deepcopy(teacher); moved(other)
    foreign = write_cache(copied / 'other', other, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET, seeds=1, progress=False)
    [file] = foreign.files
    (copied / file.name).write_bytes(file.read_bytes())                        # two folders thrown together
    with pytest.raises(ValueError, match=f'{file.name} holds the answers of another teacher'): TeacherCache(copied, teacher)
    (copied / file.name).unlink(); (copied / 'index.json').unlink()             # the index lost, and begun anew by another teacher
    with pytest.raises(ValueError, match='holds the answers of another teacher'): write_cache(copied, other, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET, progress=False)


def test_two_teachers_that_begin_one_folder_at_once_do_not_mix(teacher, tmp_path, monkeypatch):
    """The second index lands after the first writer has opened its own: the worst moment there is."""
    import kdnotes.teacher_cache as module
    other = copy.deepcopy(teacher); moved(other)
    right, theirs = module._begin, write_cache(tmp_path / 'theirs', other, data(), TASK, budget=BUDGET, progress=False)
    def late(folder, *args):
        cache = right(folder, *args)
        (folder / 'index.json').write_bytes((theirs.folder / 'index.json').read_bytes())
        return cache
    monkeypatch.setattr(module, '_begin', late)
    write_cache(tmp_path / 'both', teacher, data(), TASK, budget=BUDGET, progress=False)
    for one in (teacher, other):
        with pytest.raises(ValueError, match='another teacher'): TeacherCache(tmp_path / 'both', one)


# --- the plan, and what does not fit

def test_the_plan_is_what_is_written(teacher, written):
    plan = plan_cache(written.folder / 'not there', teacher, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET)
    assert plan.entries == plan.draws == len(written) and plan.stored == 0
    assert 0 < written.bytes - plan.bytes < 2000 and not (written.folder / 'not there').exists()
    again = plan_cache(written.folder, teacher, data(), TASK, ['logits', 'head.bottleneck'], budget=BUDGET)
    assert again.stored == again.entries == 24 and 'of which 259kB are there' in str(again)


def test_entries_of_another_seed_are_not_counted_as_there(teacher, tmp_path, monkeypatch):
    write_cache(tmp_path, teacher, data(), TASK, budget=BUDGET, progress=False)
    more, other = (plan_cache(tmp_path, teacher, data(), TASK, budget=BUDGET, seeds=s) for s in ((0, 1), 1))
    assert (more.draws, other.draws) == (48, 25) and .3 < more.stored / 48 < .7 and other.stored <= 2
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=other.bytes // 2))
    with pytest.raises(OSError, match='does not fit'): plan_cache(tmp_path, teacher, data(), TASK, budget=BUDGET, seeds=1)


def test_deterministic_samples_are_planned_and_stored_once(teacher, tmp_path):
    still = Augmented(Scenes(8, size=(48, 64)), eval_transform())
    plan = plan_cache(tmp_path, teacher, still, TASK, budget=BUDGET, seeds=(0, 1))
    assert plan.entries == 8 < plan.draws == 48
    assert len(write_cache(tmp_path, teacher, still, TASK, budget=BUDGET, seeds=(0, 1), progress=False)) == 8
    ready = [still[i] for i in range(8)]                                       # a plain list: every epoch the same
    assert len(run_draws(ready, budget=BUDGET, seeds=(0, 1))) == 8


def test_a_full_disk_is_refused_before_anything_is_written(teacher, tmp_path, monkeypatch):
    need = plan_cache(tmp_path, teacher, data(), TASK, budget=BUDGET).bytes
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=free))
        folder = tmp_path / str(fits)
        if fits: assert len(write_cache(folder, teacher, data(), TASK, budget=BUDGET, progress=False)) == 24
        else:
            with pytest.raises(OSError, match='does not fit'): write_cache(folder, teacher, data(), TASK, budget=BUDGET, progress=False)
            assert not folder.exists()
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=0))        # all is there: no room is needed
    write_cache(tmp_path / 'True', teacher, data(), TASK, budget=BUDGET, progress=False)


def test_the_sentence_comes_before_the_writing(teacher, tmp_path, capsys):
    write_cache(tmp_path, teacher, data(), TASK, budget=BUDGET)
    assert '24 draws, about 24 different images of 1,560 bytes (logits 8x8x12, float16): 37.4kB, of which 0.00B are there' in capsys.readouterr().out


@pytest.mark.parametrize('factor, why', [(1e9, 'does not fit torch.float16'), (1e-9, 'does not fit torch.float16'), (float('nan'), 'NaN or infinity'), (float('inf'), 'NaN or infinity')])
def test_values_that_half_precision_cannot_hold(teacher, tmp_path, factor, why):
    loud = Scaled(teacher, factor)
    with pytest.raises(ValueError, match=why): write_cache(tmp_path / 'half', loud, data(), TASK, budget=BUDGET, progress=False)
    assert len(TeacherCache(tmp_path / 'half', loud)) == 0
    if np.isfinite(factor):
        cache = write_cache(tmp_path / 'full', loud, data(), TASK, budget=BUDGET, dtype=torch.float32, progress=False)
        batch = default_collate([cache.dataset(data())[0, i] for i in range(4)])
        assert batch['teacher']['logits'].dtype == torch.float32 and cached_gap(batch, loud, TASK)['logits'] < 1e-5


def test_places_must_be_float_tensors_with_a_row_per_image(teacher, tmp_path):
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.net, self.row, self.whole = net(), nn.Identity(), nn.Identity()
        def forward(self, x): self.row(x.mean((0, 2, 3))); self.whole(x.long()); return self.net(x)
    for place, why in (('row', r'gives \(3,\)'), ('whole', 'torch.int64'), ('net.backbone', 'gives a list, not a tensor'), ('net.neck', 'no module')):
        with pytest.raises(ValueError, match=why): plan_cache(tmp_path, Odd(), data(), TASK, place, budget=BUDGET)


@pytest.mark.parametrize('wrong, why', [(dict(budget=None), 'either budget or epochs'), (dict(epochs=2), 'either budget or epochs'), (dict(budget=None, epochs=0), 'epochs must be 1'),
                                        (dict(seeds=()), 'nothing to store'), (dict(rank=2, world=2), '0 <= rank < world'), (dict(batch_size=0), 'batch_size'),
                                        (dict(dtype=torch.bfloat16), 'dtype is'), (dict(places=[]), 'no places')])
def test_wrong_settings_write_nothing(teacher, tmp_path, wrong, why):
    with pytest.raises(ValueError, match=why): write_cache(tmp_path / 'c', teacher, data(), TASK, **{'budget': BUDGET, 'progress': False, **wrong})
    assert not (tmp_path / 'c').exists()


def test_another_cache_in_the_folder_is_refused(teacher, written):
    kw = dict(budget=BUDGET, progress=False)
    with pytest.raises(ValueError, match='places were'): write_cache(written.folder, teacher, data(), TASK, 'logits', **kw)
    with pytest.raises(ValueError, match='dtype were float16'): write_cache(written.folder, teacher, data(), TASK, ['logits', 'head.bottleneck'], dtype=torch.float32, **kw)
    with pytest.raises(ValueError, match='does not hold'): written.dataset(data(), places='backbone.stem')


# --- for the doctor

def test_the_gap_tells_a_misplaced_answer(teacher, written):
    batch = default_collate([written.dataset(data())[0, i] for i in range(4)])
    moved_on = {**batch, 'teacher': {p: x.roll(1, 0) for p, x in batch['teacher'].items()}}
    assert set(cached_gap(batch, teacher, TASK)) == {'logits', 'head.bottleneck'}
    assert min(cached_gap(moved_on, teacher, TASK).values()) > .1
    assert cached_gap({**batch, 'image': batch['image'].flip(-1)}, teacher, TASK)['logits'] > .1
    with pytest.raises(ValueError, match=r'brings \(4, 8, 8, 11\)'): cached_gap({**batch, 'teacher': {'logits': batch['teacher']['logits'][..., 1:]}}, teacher, TASK)
    with pytest.raises(ValueError, match='brings no answers'): cached_gap({'image': batch['image']}, teacher, TASK)


def test_the_index_holds_plain_words_only(written):
    about = json.loads((written.folder / 'index.json').read_text())
    assert about['places'] == ['head.bottleneck', 'logits'] and about['dtype'] == 'float16' and about['teacher']['class'] == 'SegmentationNet'
