"""One step of every method, in float64: `python parity.py OUT.pt ACCUMULATION`, alone or under torchrun. What moved by how much is saved.

Frozen, so that the split of a batch is all that can differ: BatchNorm's statistics; the spectral norm's vectors (one step changes them after the fact);
the mixing of the gradient penalty, which is keyed by the picture."""
import os, sys

import torch
from torch import nn

from kdnotes.data.scenes import CLASSES
from kdnotes.distiller import Distiller, Term
from kdnotes.loop import Budget, fit
from kdnotes.losses import holistic
from kdnotes.losses.attention_transfer import AttentionTransfer
from kdnotes.losses.channel_wise import ChannelWise
from kdnotes.losses.global_local import GlobalLocal
from kdnotes.losses.holistic import Critic, Holistic
from kdnotes.losses.intra_class_variation import IntraClassVariation
from kdnotes.losses.knowledge_adaptation import KnowledgeAdaptation
from kdnotes.losses.local_affinity import LocalAffinity
from kdnotes.losses.pair_wise import PairWise
from kdnotes.losses.pixel_wise import PixelWise
from kdnotes.networks import tiny_student, tiny_teacher
from kdnotes.tasks import Segmentation

FEATURE, K = 'head.bottleneck', len(CLASSES)
METHODS = {
    'none':                   lambda: [],
    'pixel_wise':             lambda: [Term(PixelWise(), 'logits', 10.)],
    'channel_wise':           lambda: [Term(ChannelWise(), 'logits', 3.)],
    'channel_wise_adapted':   lambda: [Term(ChannelWise(), FEATURE, 50.)],
    'pair_wise':              lambda: [Term(PairWise(), FEATURE, 10.)],
    'local_affinity':         lambda: [Term(LocalAffinity(kind='cosine'), FEATURE, 10.)],
    'attention_transfer':     lambda: [Term(AttentionTransfer(), FEATURE, 1e4)],
    'intra_class_variation':  lambda: [Term(IntraClassVariation(K), FEATURE, 50.)],
    'knowledge_adaptation':   lambda: [Term(KnowledgeAdaptation(32, 48, strides=(1, 1, 1), steps=4), FEATURE, 1.)],
    'holistic':               lambda: [Term(Holistic(Critic(K, width=8, norm=None), optimizer='sgd', lr=.1), 'logits', .1)],
    'global_local':           lambda: [Term(GlobalLocal(alpha=.1, beta=10.), FEATURE, 1.)],
    'structured':             lambda: [Term(PixelWise(), 'logits', 10.), Term(PairWise(), FEATURE, 10.),
                                       Term(Holistic(Critic(K, width=8, norm=None), optimizer='sgd', lr=.1), 'logits', .1)],
}


def frozen(module):
    "BatchNorm layers that stay in eval mode, with statistics and factors that are not those of the start."
    for i, m in enumerate(m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        gen = torch.Generator().manual_seed(i)
        m.running_mean.copy_(.1 * torch.randn(m.num_features, generator=gen)); m.running_var.copy_(.5 + torch.rand(m.num_features, generator=gen))
        m.eval(); m.train = lambda mode=True, m=m: m
    return module


def keyed_by_picture(penalty):
    def same_mix(critic, student, teacher, image=None, mix=None):
        return penalty(critic, student, teacher, image, mix=(10 * image.sum((1, 2, 3)).abs() % 1).view(-1, 1, 1, 1))
    return same_mix


def samples(n=8, size=(32, 48)):
    "Pictures of noise with labels, the later ones with ever fewer labelled pixels."
    gen = torch.Generator().manual_seed(0)
    made = []
    for i in range(n):
        mask = torch.randint(0, K, size, generator=gen)
        made.append({'image': torch.randn(3, *size, generator=gen, dtype=torch.float64), 'mask': mask.where(torch.rand(size, generator=gen) < .6 ** i, 255)})
    return made


def one_step(method, accumulation):
    "What a step of size 1 moves: name -> difference, of the student, the adapters and the losses' own parts."
    torch.manual_seed(0)
    teacher, student = frozen(tiny_teacher(K)).double(), frozen(tiny_student(K)).double()
    distiller = Distiller(student, teacher, Segmentation(K), METHODS[method]()).double()
    distiller.losses.apply(lambda m: frozen(m) if isinstance(m, nn.modules.batchnorm._BatchNorm) else None)
    data = samples()
    distiller.prepare({k: v[None] for k, v in data[0].items()}, data=[{k: torch.stack([s[k] for s in data]) for k in data[0]}])
    distiller.double()
    before = {k: v.clone() for k, v in distiller.state().items() if v.is_floating_point()}
    budget = Budget(steps=1, batch_size=8, lr=1., momentum=0., weight_decay=0., power=0., accumulation=accumulation)
    history = fit(distiller, data, budget=budget, progress=False)
    moved = {k: (v - before[k]) for k, v in distiller.state().items() if k in before}
    return {'moved': {k: v for k, v in moved.items() if v.any()}, 'loss': history.steps[0]['loss']}


if __name__ == '__main__':
    torch.set_num_threads(1)
    holistic.gradient_penalty = keyed_by_picture(holistic.gradient_penalty)
    out, accumulation = sys.argv[1], int(sys.argv[2])
    found = {method: one_step(method, accumulation) for method in METHODS}
    if int(os.environ.get('RANK', 0)) == 0: torch.save({'world': int(os.environ.get('WORLD_SIZE', 1)), 'found': found}, out)
