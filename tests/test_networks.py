"Networks: shapes for every backbone and head, counting without a trace, weights files, and what is refused."
import copy, math, pickle

import pytest, timm, torch
from torch import nn
from torchvision.models.segmentation import deeplabv3_resnet101

from kdnotes import networks
from kdnotes.networks import (ESP, ASPPHead, FCNHead, PSPHead, Residual, SegmentationNet, Stages, cifar_resnet, count, deeplabv3,
                              espnetc, fcn, load_weights, pspnet, save_weights, tiny_student, tiny_teacher)

BACKBONES = 'resnet18', 'resnet50', 'resnet101', 'mobilenetv2_100', 'xception41'


def state(net): return {k: v.clone() for k, v in net.state_dict().items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('build', [pspnet, deeplabv3])
@pytest.mark.parametrize('backbone', BACKBONES)
def test_forward_backward(backbone, build):
    net = build(backbone, num_classes=5)
    scores = net(torch.randn(2, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in scores.items()} == {'out': (2, 5, 8, 12), 'aux': (2, 5, 8, 12)}
    (scores['out'].square().mean() + scores['aux'].square().mean()).backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert net.head.classifier.weight.grad.any() and net.aux.classifier.weight.grad.any()
    assert list(net.eval()(torch.randn(1, 3, 64, 96))) == ['out']


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (95, 161)])
@pytest.mark.parametrize('build, stride', [
    (lambda: pspnet('resnet18', num_classes=4), 8),
    (lambda: deeplabv3('resnet18', num_classes=4, output_stride=16), 16),
    (lambda: pspnet('mobilenetv2_100', num_classes=4, output_stride=32), 32),
    (lambda: fcn('mobilenetv2_100', num_classes=4), 16),
    (lambda: espnetc(4), 8),
    (lambda: tiny_student(4), 4),
    (lambda: tiny_teacher(4), 4)])
def test_any_size(build, stride, size):
    net = build()
    expected = tuple(math.ceil(n / stride) for n in size)
    with torch.no_grad():
        assert net.eval()(torch.randn(1, 3, *size))['out'].shape == (1, 4, *expected)
        assert net.train()(torch.randn(2, 3, *size))['out'].shape == (2, 4, *expected)


def test_the_papers_sizes():
    for name, params, gmac in (('resnet101', 70.43, 574.9), ('resnet18', 13.07, 125.8)):
        with torch.device('meta'): net = pspnet(name, num_classes=19)
        net.backbone.maxpool.ceil_mode = True              # as in the official code: a last map of 65 x 129
        cost = count(net, (512, 1024), training=True)
        assert cost.params / 1e6 == pytest.approx(params, rel=2e-4)
        assert cost.flops / 2e9 == pytest.approx(gmac, rel=3e-4)


def test_deeplab_costs_what_torchvisions_does():
    with torch.device('meta'):
        ours = deeplabv3('resnet101', num_classes=21)
        theirs = deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    assert count(ours, (128, 256), training=True) == count(theirs, (128, 256), training=True)


def test_psp_feature_widths_and_names():
    with torch.device('meta'): nets = [pspnet(n, num_classes=19) for n in ('resnet101', 'resnet18')]
    assert [n.head.bottleneck[0].out_channels for n in nets] == [512, 128]
    for net in (*nets, tiny_student(8), tiny_teacher(8), espnetc(8), fcn('resnet18', num_classes=8)):
        for path in ('backbone', 'head', 'head.bottleneck', 'head.classifier'): net.get_submodule(path)
    with torch.device('meta'): assert pspnet('resnet18', num_classes=3, channels=40).head.bottleneck[0].out_channels == 40


def test_bottleneck_is_what_the_classifier_reads():
    for net in (tiny_student(3).eval(), deeplabv3('mobilenetv2_100', num_classes=3).eval()):
        kept = []
        handle = net.get_submodule('head.bottleneck').register_forward_hook(lambda m, i, o: kept.append(o))
        with torch.no_grad(): out = net(torch.randn(2, 3, 64, 64))['out']
        handle.remove()
        assert len(kept) == 1 and torch.equal(net.head.classifier(kept[0]), out)
        assert kept[0].min() == 0


@pytest.mark.parametrize('build', [lambda: pspnet('resnet18', num_classes=3), lambda: deeplabv3('xception41', num_classes=3),
                                   lambda: tiny_student(3), lambda: tiny_teacher(3), lambda: espnetc(3), lambda: cifar_resnet(20, 3)])
def test_same_seed_same_network(build):
    nets = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        nets.append(state(build()))
    assert equal(nets[0], nets[1]) and not equal(nets[0], nets[2])


def test_tiny_pair():
    student, teacher = tiny_student(8), tiny_teacher(8)
    assert 20_000 < count(student, (96, 192)).params < 25_000
    assert 200_000 < count(teacher, (96, 192)).params < 400_000
    image = torch.randn(2, 3, 96, 192)
    assert student(image)['out'].shape == teacher(image)['out'].shape == (2, 8, 24, 48)
    assert student.head.bottleneck[0].out_channels != teacher.head.bottleneck[0].out_channels


# ESPNet-C and the networks of CIFAR

def test_esp_module_by_hand():
    module = ESP(10, 10).eval()
    x = torch.randn(2, 10, 12, 17)
    small = module.reduce(x)
    d1, d2, d4, d8, d16 = (branch(small) for branch in module.spread)
    by_hand = module.finish(x + torch.cat([d1, d2, d2 + d4, d2 + d4 + d8, d2 + d4 + d8 + d16], 1))
    assert torch.allclose(module(x), by_hand, atol=1e-6) and [b.dilation for b in module.spread] == [(d, d) for d in (1, 2, 4, 8, 16)]
    assert ESP(3, 12, stride=2)(torch.randn(2, 3, 9, 10)).shape == (2, 12, 5, 5)             # 12 = 4 + 2 + 2 + 2 + 2
    assert ESP(12, 14)(torch.randn(2, 12, 9, 10)).shape == (2, 14, 9, 10)                    # other channels: no shortcut


def test_espnetc_is_small_and_trains():
    net = espnetc(11)
    assert 340_000 < count(net, (360, 480)).params < 355_000
    assert net.get_classifier() is net.head.classifier and net.get_classifier().in_channels == 256
    out = net(torch.randn(2, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in out.items()} == {'out': (2, 11, 8, 12)}
    out['out'].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize('depth, params', [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_cifar_resnets(depth, params):
    net = cifar_resnet(depth, 10)
    assert sum(p.numel() for p in net.parameters()) == params
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) + 1 == depth                 # and the linear layer
    logits = net(torch.randn(2, 3, 32, 32))
    logits.square().mean().backward()
    assert logits.shape == (2, 10) and all(p.grad is not None for p in net.parameters())


def test_cifar_resnet_reads_its_last_map():
    net, image = cifar_resnet(20, 7).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        last = net.features(image)
        assert last.shape == (3, 64, 8, 8) and torch.allclose(net.get_classifier()(last.mean((2, 3))), net(image), atol=1e-6)
        assert net(torch.randn(1, 3, 37, 50)).shape == (1, 7)


@pytest.mark.parametrize('depth, params', [(20, 272_474), (110, 1_730_714)])
def test_shortcuts_with_weights(depth, params):
    net = cifar_resnet(depth, 10, learned_shortcuts=True)
    assert sum(p.numel() for p in net.parameters()) == params
    learned = [name for name, m in net.named_modules() if name.endswith('beside')]
    assert learned == ['features.stage2.0.beside', 'features.stage3.0.beside']               # only where a stage begins
    block = Residual(6, in_channels=4, stride=2, learned=True).eval()
    nn.init.zeros_(block.second[1].weight)
    x = torch.randn(2, 4, 8, 10)
    conv, norm = block.beside
    assert (conv.kernel_size, conv.stride, conv.bias) == ((1, 1), (2, 2), None)
    assert torch.equal(block(x), norm(conv(x)).relu()) and block(x).any()


def test_a_shortcut_without_weights():
    block = Residual(6, in_channels=4, stride=2).eval()
    nn.init.zeros_(block.second[1].weight)                                                   # nothing but the shortcut is left
    x = torch.randn(2, 4, 8, 10).abs()
    out = block(x)
    assert torch.equal(out[:, :4], x[:, :, ::2, ::2]) and not out[:, 4:].any() and out.shape == (2, 6, 4, 5)


# counting

def test_count_by_hand():
    assert count(nn.Conv2d(3, 8, 3, padding=1, stride=2), (10, 20)) == (8 * 27 + 8, 2 * 5 * 10 * 8 * 27)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
    assert count(net, (9, 9), channels=4) == (30, 2 * 4 * 6)
    assert count(nn.ReLU(), (9, 9)) == (0, 0)
    shared = nn.Conv2d(3, 3, 1, bias=False)
    assert count(nn.Sequential(shared, shared), (4, 4)) == (9, 2 * 2 * 16 * 9)             # used twice, owned once
    with pytest.raises(ValueError, match=r'\(H, W\)'): count(shared, (3, 4, 4))


@pytest.mark.parametrize('build', [lambda: pspnet('resnet18', num_classes=3), lambda: deeplabv3('xception41', num_classes=3),
                                   lambda: tiny_teacher(3)])
def test_count_leaves_no_trace(build):
    net = build().train()
    net.head.eval(); net.head.classifier.weight.requires_grad_(False)
    net(torch.randn(2, 3, 64, 64))['out'].square().mean().backward()
    seen = []
    handle = net.head.bottleneck.register_forward_hook(lambda m, i, o: seen.append(o))
    before, modes, random = state(net), {k: m.training for k, m in net.named_modules()}, torch.get_rng_state()
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in net.named_parameters()}
    hooks = {k: dict(m._forward_hooks) for k, m in net.named_modules()}
    first = count(net, (64, 96), training=True)
    assert first == count(net, (64, 96), training=True) and count(net, (64, 96)).flops <= first.flops
    assert equal(before, net.state_dict()) and torch.equal(random, torch.get_rng_state()) and not seen
    assert modes == {k: m.training for k, m in net.named_modules()}
    assert hooks == {k: dict(m._forward_hooks) for k, m in net.named_modules()}
    for k, p in net.named_parameters():
        assert (p.grad is None) == (grads[k] is None) and (p.grad is None or torch.equal(p.grad, grads[k]))
    assert not net.head.classifier.weight.requires_grad and all(p.device.type == 'cpu' for p in net.parameters())
    handle.remove()


class Spectator:
    "Keeps what it saw, like a tap; the graph it holds cannot be deep-copied."
    def __init__(self): self.seen = []
    def look(self, module, inputs, output): self.seen.append(output)


def test_count_with_a_tap_that_holds_a_graph():
    net, tap = tiny_student(3), Spectator()
    net.head.bottleneck.register_forward_hook(tap.look)
    net(torch.randn(2, 3, 32, 32))
    assert count(net, (32, 32)) == count(tiny_student(3), (32, 32)) and len(tap.seen) == 1


class NeedsValues(nn.Module):
    "Its work depends on the values: impossible on the meta device."
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 4, 1)
    def forward(self, x): return self.conv(x).flatten()[torch.zeros(5).nonzero().flatten()] if (x == 0).all().item() else None


def test_count_of_a_network_that_needs_values():
    net, before = NeedsValues(), torch.get_rng_state()
    assert count(net, (8, 8)) == (16, 2 * 64 * 12) and torch.equal(before, torch.get_rng_state())


def test_count_other_dtypes_and_wrappers():
    cost = count(tiny_student(3), (32, 32))
    assert count(tiny_student(3).double(), (32, 32)) == count(tiny_student(3).bfloat16(), (32, 32)) == cost
    assert count(torch.compile(tiny_student(3)), (32, 32)) == cost
    assert count(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), (8, 8)).params == 112


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_count_on_a_gpu():
    net = tiny_teacher(3).cuda()
    assert count(net, (64, 64)) == count(tiny_teacher(3), (64, 64)) and next(net.parameters()).is_cuda


# what is refused

def test_batch_of_one_in_training():
    for net in (tiny_teacher(3), pspnet('resnet18', num_classes=3), deeplabv3('resnet18', num_classes=3)):
        with pytest.raises(ValueError, match='drop_last'): net.train()(torch.randn(1, 3, 64, 64))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()
        assert net(torch.randn(1, 3, 64, 64))['out'].shape[0] == 1
    assert tiny_student(3)(torch.randn(1, 3, 64, 64))['out'].shape[0] == 1
    assert PSPHead(4, 8, 3, bins=(2, 3))(torch.randn(1, 4, 8, 8)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize('call, message', [
    (lambda: pspnet('resnet18x', num_classes=3), "'resnet18x' is no network of timm"),
    (lambda: pspnet('resnet18', num_classes=3, output_stride=4), '8, 16 or 32, got 4'),
    (lambda: pspnet('resnet18', num_classes=0), 'at least 1, got 0'),
    (lambda: pspnet('resnet18', num_classes=3, stem='wide'), "got 'wide'"),
    (lambda: pspnet('mobilenetv2_100', num_classes=3, stem='deep'), 'only a plain ResNet'),
    (lambda: pspnet('resnet18', num_classes=3, pretrained=True), "choose stem='plain'"),
    (lambda: cifar_resnet(18, 10), 'depth is 6n.2 .*got 18'),
    (lambda: cifar_resnet(2, 10), 'got 2'),
    (lambda: cifar_resnet(20, 0), 'at least 1, got 0'),
    (lambda: espnetc(0), 'at least 1, got 0'),
    (lambda: ESP(4, 4), '5 channels or more, got 4'),
    (lambda: tiny_student(3)(torch.zeros(3, 32, 32)), r'got \(3, 32, 32\)'),
    (lambda: tiny_student(3)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), 'torch.uint8')])
def test_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


# ImageNet weights

@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    return constants


def test_pretrained_offline_says_what_to_do(empty_cache, monkeypatch):
    monkeypatch.setattr(empty_cache, 'HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='resnet18.*HF_HOME.*model.safetensors.*weights='):
        pspnet('resnet18', num_classes=3, stem='plain', pretrained=True)


def test_pretrained_without_a_network_fails_at_once(empty_cache, monkeypatch):
    monkeypatch.setattr(empty_cache, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(empty_cache, 'ENDPOINT', 'http://127.0.0.1:9')                       # nobody listens there
    def never(*args, **kwargs): raise AssertionError('timm would have started its retries')
    monkeypatch.setattr(networks.timm, 'create_model', never)
    with pytest.raises(RuntimeError, match='could not be loaded') as caught:
        deeplabv3('resnet101', num_classes=3, stem='deep', pretrained=True)
    assert not isinstance(caught.value.__cause__, AssertionError)


def test_pretrained_from_a_file(tmp_path):
    whole = timm.create_model('resnet18', pretrained=False)
    path = save_weights(whole, tmp_path / 'model.safetensors')
    net = pspnet('resnet18', num_classes=3, stem='plain', pretrained=path)
    own = net.backbone.state_dict()
    assert equal(own, {k: v for k, v in whole.state_dict().items() if k in own}) and 'layer4.1.conv2.weight' in own
    with pytest.raises(FileNotFoundError, match='nowhere.safetensors'):
        pspnet('resnet18', num_classes=3, stem='plain', pretrained=tmp_path / 'nowhere.safetensors')
    with pytest.raises(RuntimeError, match='could not be loaded'):
        pspnet('resnet50', num_classes=3, stem='plain', pretrained=path)


# weights files

def test_safetensors_round_trip(tmp_path):
    net = pspnet('mobilenetv2_100', num_classes=3)
    net(torch.randn(2, 3, 64, 64))                                                           # moves the BatchNorm statistics
    path = save_weights(net, tmp_path / 'new' / 'net.safetensors')
    assert [p.name for p in path.parent.iterdir()] == ['net.safetensors']
    again = load_weights(pspnet('mobilenetv2_100', num_classes=3), path)
    assert equal(state(net), again.state_dict())
    again = pspnet('mobilenetv2_100', num_classes=3, weights=path, pretrained=True)          # no download
    assert equal(state(net), again.state_dict())
    assert path.stat().st_mode & 0o777 == (tmp_path / 'new').stat().st_mode & 0o666


def test_save_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = save_weights(tiny_student(3), tmp_path / 'net.safetensors')
    before = path.read_bytes()
    def broken(*args): raise OSError('disk full')
    monkeypatch.setattr(networks.os, 'fsync', broken)
    with pytest.raises(OSError, match='disk full'): save_weights(tiny_student(4), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['net.safetensors']
    monkeypatch.undo()
    save_weights(tiny_student(4), path)
    load_weights(tiny_student(4), path)
    with pytest.raises(ValueError, match='net.pt'): save_weights(tiny_student(3), tmp_path / 'net.pt')


def test_shared_tensors_are_saved(tmp_path):
    conv = nn.Conv2d(3, 3, 1)
    net, other = nn.Sequential(conv, conv), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    assert equal(load_weights(other, save_weights(net, tmp_path / 'a.safetensors')).state_dict(), state(net))


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'epoch': 3}, lambda s: {'model': s}])
def test_torch_files(tmp_path, wrap):
    net = tiny_student(3)
    torch.save(wrap(net.state_dict()), tmp_path / 'net.pth')
    assert equal(load_weights(tiny_student(3), tmp_path / 'net.pth').state_dict(), state(net))


def test_strict_and_untouched(tmp_path):
    net, good = tiny_student(3), state(tiny_student(3))
    before = state(net)
    cases = {'1 missing: head.classifier.bias': {k: v for k, v in good.items() if k != 'head.classifier.bias'},
             '1 unexpected: extra': {**good, 'extra': torch.zeros(1)},
             r'1 of another shape: head.classifier.bias \(2,\) instead of \(3,\)': {**good, 'head.classifier.bias': torch.zeros(2)},
             'missing: .*, ...; .*unexpected: module.backbone': {f'module.{k}': v for k, v in good.items()}}
    for message, bad in cases.items():
        torch.save(bad, tmp_path / 'bad.pt')
        with pytest.raises(ValueError, match=message): load_weights(net, tmp_path / 'bad.pt')
        assert equal(before, net.state_dict())
    with pytest.raises(FileNotFoundError, match='none.safetensors'): load_weights(net, tmp_path / 'none.safetensors')


class Trap:
    def __init__(self, target): self.target = target
    def __reduce__(self): return type(self.target).touch, (self.target,)


@pytest.mark.parametrize('zipped', [True, False])
def test_malicious_file_is_refused(tmp_path, zipped):
    path, target = tmp_path / 'gift.pt', tmp_path / 'sprung'
    torch.save({'w': Trap(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match='may contain code'): load_weights(tiny_student(3), path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()                                                                   # the trap was real


@pytest.mark.parametrize('name', ['net.safetensors', 'net.pt'])
@pytest.mark.parametrize('content', [b'', b'not weights at all', bytes(range(256)) * 8, pickle.dumps({'a': 1}, 2), pickle.dumps([1, 2], 2)],
                         ids=['empty', 'text', 'bytes', 'dict', 'list'])
def test_rubbish_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name): load_weights(tiny_student(3), path)


@pytest.mark.parametrize('name', ['net.safetensors', 'net.pt'])
def test_truncated_files_are_named(tmp_path, name):
    path, net = tmp_path / name, tiny_student(3)
    if name.endswith('pt'): torch.save(net.state_dict(), path)
    else: save_weights(net, path)
    whole = path.read_bytes()
    for part in (1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        with pytest.raises(ValueError, match=name): load_weights(net, path)


def test_a_network_of_ones_own():
    body = Stages(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1))
    net = SegmentationNet(body, ASPPHead(12, 16, 5, rates=(2, 4)), aux=FCNHead(8, 4, 5))
    scores = net(torch.randn(2, 3, 32, 32))
    assert scores['out'].shape == (2, 5, 8, 8) and scores['aux'].shape == (2, 5, 16, 16)
    again = copy.deepcopy(net).eval()
    assert list(again(torch.randn(1, 3, 32, 32))) == ['out']
