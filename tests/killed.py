"""A run of 16 steps with a critic, killed by itself with SIGKILL at one moment: `python killed.py FOLDER MOMENT N`.

MOMENT: 'never'; 'between' the student's n-th step and the critic's; 'writing', half of the n-th checkpoint on the disk; 'renaming', the n-th one written but not in place;
'reading', while the n-th sample is read. Then nothing more is said: a killed process says nothing."""
import os, signal, sys

import torch

from kdnotes import networks
from kdnotes.data.datasets import Augmented, InMemory, eval_transform
from kdnotes.data.scenes import CLASSES, Scenes
from kdnotes.distiller import Distiller, Term
from kdnotes.loop import Budget, fit
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.losses.holistic import Critic, Holistic
from kdnotes.tasks import Segmentation


def dies_at(n):
    "A function that kills this process at its n-th call."
    count = iter(range(1, n + 1))
    def tick():
        if next(count, None) == n: os.kill(os.getpid(), signal.SIGKILL)
    return tick


class Torn:
    "A file of which only the first half arrives."
    def __init__(self, file, tick): self.file, self.tick = file, tick
    def write(self, data):
        half = len(data) // 2
        self.file.write(data[:half]); self.file.flush(); self.tick()
        return self.file.write(data[half:]) + half
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)


if __name__ == '__main__':
    folder, moment, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    tick, data = dies_at(n), Augmented(InMemory(Scenes(16)), eval_transform())
    torch.manual_seed(3)
    teacher, student = networks.tiny_teacher(len(CLASSES)), networks.tiny_student(len(CLASSES))
    critic = Holistic(Critic(len(CLASSES), width=8), lr=1e-3)
    if moment == 'between':
        update = critic.update
        critic.update = lambda *maps: (tick(), update(*maps))[1]
    if moment == 'renaming':
        replace = os.replace
        os.replace = lambda *paths: (tick(), replace(*paths))[1]
    if moment == 'writing':
        import builtins
        real = open
        builtins.open = lambda path, mode='r', *a, **k: Torn(real(path, mode, *a, **k), tick) if str(path).endswith('.part') else real(path, mode, *a, **k)
    if moment == 'reading':
        transform = data.transform
        data.transform = lambda sample: (tick(), transform(sample))[1]
    terms = [Term(critic, 'logits', .01), Term(ChannelWise(), 'head.bottleneck', 1.)]
    distiller = Distiller(student, teacher, Segmentation(len(CLASSES)), terms)
    fit(distiller, data, budget=Budget(steps=16, batch_size=4, lr=.05), out=folder, resume=True, save_every=3, progress=False)
    networks.atomic_write(folder + '/state.pt', lambda f: torch.save(distiller.state(), f))
