"Networks: shapes for every backbone and head, counting without a trace, weights files, and what is refused."
import copy, math, pickle

import pytest, timm, torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import detection
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.ssd import SSD, ssd300_vgg16
from torchvision.models.segmentation import deeplabv3_resnet101
from torchvision.ops import MultiScaleRoIAlign, box_iou

from kdnotes import networks
from kdnotes.networks import (ESP, ASPPHead, Detector, FCNHead, PSPHead, Residual, SegmentationNet, Stages, cifar_resnet, count,
                              deeplabv3, deeplabv3plus, encoder_decoder, espnetc, faster_rcnn, fcn, fcos, load_weights, pspnet,
                              retinanet, save_weights, ssd, tiny_depth_student, tiny_depth_teacher, tiny_detector_student,
                              tiny_detector_teacher, tiny_student, tiny_teacher)
from kdnotes.taps import Taps

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


# decoders

DECODERS = {'deeplabv3plus': (lambda: deeplabv3plus('resnet18', num_classes=4, channels=32), 4),
            'deeplabv3plus at 8': (lambda: deeplabv3plus('mobilenetv2_100', num_classes=4, channels=32, output_stride=8), 4),
            'encoder_decoder': (lambda: encoder_decoder('resnet18', out_channels=4, channels=32), 4),
            'from stride 2': (lambda: encoder_decoder('mobilenetv2_100', out_channels=4, channels=16, strides=(2, 8, 32)), 2),
            'tiny_depth_student': (lambda: tiny_depth_student(4), 4),
            'tiny_depth_teacher': (lambda: tiny_depth_teacher(4), 4)}


@pytest.mark.parametrize('build, stride', DECODERS.values(), ids=DECODERS)
def test_decoders(build, stride):
    net = build()
    out = net(torch.randn(2, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in out.items()} == {'out': (2, 4, 64 // stride, 96 // stride)}
    out['out'].square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert net.get_classifier() is net.head.classifier
    seen = []
    handle = net.get_submodule('head.bottleneck').register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad(): out = net.eval()(torch.randn(1, 3, 97, 65))['out']
    handle.remove()
    assert out.shape == (1, 4, math.ceil(97 / stride), math.ceil(65 / stride)) and torch.equal(net.head.classifier(seen[0]), out)


def test_a_decoder_uses_every_map():
    net = tiny_depth_student().eval()
    maps = [m.detach().requires_grad_() for m in net.backbone(torch.randn(1, 3, 64, 64))]
    net.head(maps).sum().backward()
    assert all(m.grad.any() for m in maps)
    plus = deeplabv3plus('resnet18', num_classes=2, channels=16).eval()
    low, last = (m.detach().requires_grad_() for m in plus.backbone(torch.randn(1, 3, 64, 64)))
    plus.head([low, last]).sum().backward()
    assert low.shape[-1] == 16 and last.shape[-1] == 4 and low.grad.any() and last.grad.any()


def test_the_tiny_depth_pair_and_weights(tmp_path):
    sizes = [count(build(), (96, 192)).params for build in (tiny_depth_student, tiny_depth_teacher)]
    assert sizes[0] < 50_000 and 10 * sizes[0] < sizes[1] < 500_000
    net = tiny_depth_student(6)
    path = save_weights(net, tmp_path / 'net.safetensors')
    again = encoder_decoder(tiny_depth_student().backbone, out_channels=6, channels=24, weights=path)
    assert equal(state(net), again.state_dict())
    plus = deeplabv3plus('resnet18', num_classes=3, channels=16)
    path = save_weights(plus, tmp_path / 'plus.safetensors')
    assert equal(state(plus), deeplabv3plus('resnet18', num_classes=3, channels=16, weights=path, pretrained=True).state_dict())


@pytest.mark.parametrize('call, message', [
    (lambda: deeplabv3plus('resnet18x', num_classes=3), "'resnet18x' is no network of timm"),
    (lambda: deeplabv3plus('resnet18', num_classes=3, output_stride=4), '8, 16 or 32, got 4'),
    (lambda: deeplabv3plus('resnet18', num_classes=0), 'at least 1, got 0'),
    (lambda: deeplabv3plus('resnet18', num_classes=3, channels=8).train()(torch.randn(1, 3, 64, 64)), 'drop_last'),
    (lambda: encoder_decoder('resnet18', out_channels=0), 'at least 1, got 0'),
    (lambda: encoder_decoder('resnet18', out_channels=1, strides=(4, 64)), r'\[2, 4, 8, 16, 32\], not \(4, 64\)'),
    (lambda: encoder_decoder('resnet18', out_channels=1, strides=(4,)), 'two maps or more, got 1'),
    (lambda: encoder_decoder(tiny_depth_student().backbone, out_channels=1, pretrained=True), 'is a module'),
    (lambda: tiny_depth_student()(torch.zeros(3, 32, 32)), r'got \(3, 32, 32\)')])
def test_decoders_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


# detectors

def body(): return tiny_detector_student(2).net.backbone.body
def on_body(build, **options): return lambda **more: build(body(), num_classes=3, **options, **more)
DETECTORS = {'retinanet': on_body(retinanet, channels=16, extra=None, convs=1, score_thresh=0.),
             'retinanet, p6p7, norm': on_body(retinanet, channels=16, extra='p6p7', norm=True, convs=1, score_thresh=0.),
             'fcos': on_body(fcos, channels=16, extra=None, convs=1, score_thresh=0.),
             'fcos, pool': on_body(fcos, channels=16, extra='pool', convs=1, score_thresh=0.),
             'faster_rcnn': on_body(faster_rcnn, channels=16, hidden=32, box_score_thresh=0.),
             'ssd': on_body(ssd, extra=(16, 16), score_thresh=0.)}
every_detector = pytest.mark.parametrize('build', DETECTORS.values(), ids=DETECTORS)
SHIFT = {'SSD': 1, 'FasterRCNN': 1, 'RetinaNet': 0, 'FCOS': 0}      # torchvision's label of class 0


def scene():
    "Images of 64 x 96, the second one without things."
    g = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[8., 10, 40, 50], [50, 5, 62, 33], [70, 40, 95, 62]])
    none = torch.zeros(0, dtype=torch.int64)
    return torch.rand(2, 3, 64, 96, generator=g), [boxes, torch.zeros(0, 4)], [torch.tensor([0, 2, 1]), none]


class AsItIs(nn.Module):
    def forward(self, images, targets=None): return ImageList(torch.stack(images), [i.shape[1:] for i in images]), targets
    def postprocess(self, found, *sizes): return found


@every_detector
def test_losses_and_boxes_are_torchvisions(build):
    torch.manual_seed(0)
    detector, (images, boxes, labels) = build(), scene()
    shift = SHIFT[type(detector.net).__name__]
    net = copy.deepcopy(detector.net)
    net.transform = AsItIs()
    torch.manual_seed(1)
    expected = net.train()(list(images), [dict(boxes=b, labels=l + shift) for b, l in zip(boxes, labels)])
    torch.manual_seed(1)
    losses = detector.train()(images).losses(boxes, labels)
    assert losses.keys() == expected.keys()
    for key in losses: torch.testing.assert_close(losses[key], expected[key], rtol=1e-6, atol=0)
    with torch.no_grad(): expected = net.eval()(list(images))                      # both have seen one batch in training
    found = detector.eval()(images).detections()
    assert len(found) == 2 and all(len(f['boxes']) > 20 for f in found)
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours['labels'] + shift, theirs['labels']) and set(ours['labels'].tolist()) <= {0, 1, 2}
        for key in ('boxes', 'scores'): torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=0)


@every_detector
def test_gradients_reach_every_parameter(build):
    images, boxes, labels = scene()
    for b, l in ((boxes, labels), (boxes[1:] * 2, labels[1:] * 2)):                # the second time no image has a box
        detector = build()
        losses = detector(images).losses(b, l)
        assert all(x.ndim == 0 and x.isfinite() for x in losses.values())
        sum(losses.values()).backward()
        assert not [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    detector = build()
    sum(detector(images).losses(boxes, labels).values()).backward()
    assert not [name for name, p in detector.net.backbone.body.named_parameters() if not p.grad.any()]


@every_detector
def test_the_mode_changes_nothing_but_batchnorm(build):
    detector, (images, boxes, labels) = build(), scene()
    for m in detector.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 0.
    answers = []
    for mode in (True, False):
        detector.train(mode)
        for m in detector.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()
        answer = detector(images)
        torch.manual_seed(0)
        answers.append((answer.anchors, answer.logits(), *answer.losses(boxes, labels).values(), answer.per_level))
        answer.detections()
        roots = [m for m in detector.modules() if not isinstance(m, nn.BatchNorm2d)]
        assert all(m.training is mode for m in roots)
    *tensors, per_level = zip(*answers)
    assert per_level[0] == per_level[1] and sum(per_level[0]) == len(answers[0][0])
    found = [t for pair in tensors for t in pair]
    assert all(x.isfinite().all() for x in found)
    if not isinstance(detector.net, FasterRCNN):                                   # its training keeps other proposals
        for a, b in tensors: assert torch.equal(a, b)


@every_detector
def test_detections_need_no_gradient_and_no_boxes(build):
    detector = build().eval()
    where = detector.net.roi_heads if isinstance(detector.net, FasterRCNN) else detector.net
    found = detector(scene()[0]).detections()
    assert not any(t.requires_grad for f in found for t in f.values())
    assert all((f['scores'][:-1] >= f['scores'][1:]).all() for f in found)
    where.score_thresh = 1.
    for f in detector(scene()[0]).detections():
        assert {k: tuple(v.shape) for k, v in f.items()} == {'boxes': (0, 4), 'scores': (0,), 'labels': (0,)}
        assert f['labels'].dtype == torch.int64


@every_detector
def test_class_scores_as_pixels(build):
    detector = build().eval()
    answer = detector(scene()[0])
    z, N = answer.logits(), sum(answer.per_level)
    if isinstance(detector.net, FasterRCNN):
        assert z.shape == (2, 2, N, 1)
        objectness, deltas = detector.net.rpn.head(list(answer.levels.values()))
        flat, _ = concat_box_prediction_layers(objectness, deltas)                 # the order of torchvision's anchors
        present = flat.sigmoid().view(2, N, 1)
    elif isinstance(detector.net, SSD):
        assert z.shape == (2, 4, N, 1)
        assert torch.allclose(z.softmax(1)[..., 0].mT, answer.heads['cls_logits'].softmax(-1), atol=1e-6)
        return
    else:
        assert z.shape == (2, 2, N, 3)
        present = answer.heads['cls_logits'].sigmoid()
    assert torch.allclose(z.softmax(1)[:, 1], present, atol=1e-6) and not z[:, 0].any()
    z.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in detector.parameters())


@every_detector
def test_levels_can_be_tapped(build):
    detector = build()
    paths = {str(i): f'net.backbone.levels.{i}' for i in range(len(detector.net.backbone.levels))}
    with Taps(detector, {**paths, 'body': 'net.backbone.body'}) as taps:
        answer = detector(scene()[0])
        answer.losses(*scene()[1:]); answer.logits(); answer.detections()
        assert len(paths) == len(answer.levels)
        for name, level in zip(paths, answer.levels.values()): assert taps[name] is level        # once, not overwritten
        assert [m.shape[1:] for m in taps['body']] == [(24, 16, 24), (32, 8, 12), (48, 4, 6)]


@every_detector
def test_same_seed_weights_and_copies(build, tmp_path):
    torch.manual_seed(5); one = build()
    torch.manual_seed(5); two = build()
    assert equal(state(one), two.state_dict())
    one(scene()[0])                                                                # moves the BatchNorm statistics
    again = build(weights=save_weights(one, tmp_path / 'd.safetensors'))
    assert equal(state(one), again.state_dict())
    with torch.no_grad(): a, b, c = (d.eval()(scene()[0]).logits() for d in (one, again, copy.deepcopy(one)))
    assert torch.equal(a, b) and torch.equal(a, c)


@every_detector
def test_half_precision_is_left_for_losses_and_boxes(build):
    detector, (images, boxes, labels) = build().eval(), scene()
    torch.manual_seed(0)
    exact = detector(images).losses(boxes, labels)
    torch.manual_seed(0)
    with torch.autocast('cpu', torch.bfloat16):
        answer = detector(images)
        losses, found = answer.losses(boxes, labels), answer.detections()
    assert next(iter(answer.levels.values())).dtype == torch.bfloat16 and answer.anchors.dtype == torch.float32
    assert answer.logits().isfinite().all()                                        # asked for after the autocast
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses.values())
    assert all(f['boxes'].dtype == f['scores'].dtype == torch.float32 for f in found)
    if not isinstance(detector.net, FasterRCNN):                                   # which samples other proposals
        for key in exact: assert losses[key].item() == pytest.approx(exact[key].item(), rel=.1)
    double = detector.double()(images.double()).losses(boxes, labels)
    assert all(x.isfinite() for x in double.values()) and detector(images.double()).anchors.dtype == torch.float64


@pytest.mark.parametrize('size', [(64, 64), (97, 131), (32, 200)])
@every_detector
def test_detectors_any_size(build, size):
    detector, image = build(), torch.rand(2, 3, *size)
    boxes, labels = [torch.tensor([[2., 3, 25, 30]]), torch.zeros(0, 4)], [torch.tensor([1]), torch.zeros(0, dtype=torch.int32)]
    for mode in (True, False):
        answer = detector.train(mode)(image)
        assert all(x.isfinite() for x in answer.losses(boxes, labels).values())
        for f in answer.detections():
            assert (f['boxes'] >= 0).all() and (f['boxes'] <= torch.tensor([size[1], size[0]] * 2)).all()


def test_batch_of_one_and_one_level():
    "A network that gives a bare tensor has one level; a batch of one image works in evaluation mode."
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
    backbone.out_channels = 8
    net = RetinaNet(backbone, 2, anchor_generator=AnchorGenerator(((16,),), ((1.,),)))
    answer = Detector(net)(torch.rand(1, 3, 32, 48))
    assert list(answer.levels) == ['0'] and answer.logits().shape == (1, 2, 8 * 12, 2)
    assert all(x.isfinite() for x in answer.losses([torch.tensor([[0., 0, 16, 16]])], [torch.tensor([1])]).values())


@pytest.mark.parametrize('name', ['retinanet, p6p7, norm', 'fcos', 'fcos, pool', 'faster_rcnn'])
def test_anchors_stand_on_their_cells(name):
    "In an image of odd size they are those of one that all strides divide, less what is cut away."
    detector = DETECTORS[name]().eval()
    def grids(height, width):
        answer = detector(torch.zeros(1, 3, height, width))
        parts = answer.anchors.split(answer.per_level)
        return [p.view(*m.shape[-2:], -1, 4) for p, m in zip(parts, answer.levels.values())]
    for small, whole in zip(grids(97, 131), grids(192, 256)):
        assert small.shape < whole.shape and torch.equal(small, whole[:small.shape[0], :small.shape[1]])


def test_cut_outs_come_from_the_right_level():
    pool = faster_rcnn(body(), num_classes=3, channels=16, hidden=32).net.roi_heads.box_roi_pool
    theirs = MultiScaleRoIAlign(['0', '1', '2'], output_size=7, sampling_ratio=2)
    maps = {str(i): torch.randn(1, 4, 512 // s, 512 // s) for i, s in enumerate((4, 8, 16))}
    boxes = [torch.tensor([[0., 0, s, s] for s in (16, 111, 113, 223, 225, 500)])]
    assert torch.equal(pool(maps, boxes, [(512, 512)]), theirs(maps, boxes, [(512, 512)])) and pool.scales == theirs.scales
    gap = faster_rcnn('resnet18', num_classes=2, strides=(4, 16), channels=8, hidden=8).net.roi_heads.box_roi_pool
    assert gap.map_levels(boxes).tolist() == [0, 0, 1, 1, 1, 1]                    # none is cut from a level that is not there


def test_anchors_of_the_builders():
    def sides(detector):
        a = detector.eval()(torch.zeros(1, 3, 128, 128))
        firsts = [part[0] for part in a.anchors.split(a.per_level)]
        return [((f[2] - f[0]) * (f[3] - f[1])).sqrt().item() for f in firsts], a.per_level
    for build, per_stride, shapes, extra in ((retinanet, 4, 9, 'p6p7'), (fcos, 1, 1, 'p6p7'), (fcos, 1, 1, None)):
        found, per_level = sides(build(body(), num_classes=1, channels=8, extra=extra))
        strides = [4, 8, 16, 32, 64][:len(found)]
        assert found == pytest.approx([per_stride * s for s in strides], rel=.05)
        assert per_level == [shapes * (128 // s)**2 for s in strides]
    found, per_level = sides(faster_rcnn(body(), num_classes=1, channels=8, hidden=8))
    assert found == pytest.approx([32, 64, 128, 256], rel=.05) and per_level == [3 * (128 // s)**2 for s in (4, 8, 16, 32)]
    found, _ = sides(fcos(body(), num_classes=1, channels=8, extra=None, anchors=(6, 12, 30)))
    assert found == [6, 12, 30]


def test_ssd_on_resnet18_is_ssd300s_grid():
    with torch.device('meta'): detector = ssd('resnet18', num_classes=20).eval()
    answer = detector(torch.empty(1, 3, 300, 300, device='meta'))
    assert answer.per_level == [38**2 * 4, 19**2 * 6, 10**2 * 6, 5**2 * 6, 3**2 * 4, 2**2 * 4]
    with torch.device('meta'): theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21).anchor_generator
    assert detector.net.anchor_generator.scales == pytest.approx(theirs.scales)
    assert detector.net.anchor_generator.aspect_ratios == theirs.aspect_ratios


def test_count_of_a_detector_by_hand():
    cells = {s: (64 // s) * (96 // s) for s in (2, 4, 8, 16)}
    macs = cells[2] * 27 * 16 + cells[4] * 9 * (16 * 24 + 24 * 24) + cells[8] * 9 * (24 * 32 + 32 * 32) + cells[16] * 9 * 32 * 48
    macs += sum(cells[s] * (c * 32 + 9 * 32 * 32) for s, c in ((4, 24), (8, 32), (16, 48)))      # pyramid
    macs += sum(cells[s] for s in (4, 8, 16)) * 9 * 32 * (2 * 32 + 3 + 4 + 1)                    # head: classes, sides, middle
    assert count(tiny_detector_student(3), (64, 96)).flops == 2 * macs


def test_count_of_detectors_is_torchvisions():
    pairs = ((retinanet, detection.retinanet_resnet50_fpn, 7), (fcos, detection.fcos_resnet50_fpn, 7),
             (faster_rcnn, detection.fasterrcnn_resnet50_fpn, 8))
    for build, witness, classes in pairs:
        with torch.device('meta'):
            ours = build('resnet50', num_classes=7)
            theirs = Detector(witness(weights=None, weights_backbone=None, num_classes=classes))
        for training in (False, True)[:1 + (build is faster_rcnn)]:
            assert count(ours, (128, 160), training=training) == count(theirs, (128, 160), training=training)


@pytest.mark.parametrize('training', [False, True])
def test_count_of_both_stages(training):
    "With nothing suppressed the real pass proposes the most it may, and costs what `count` says."
    limits = dict(rpn_post_nms_top_n_train=40, rpn_post_nms_top_n_test=30, box_batch_size_per_image=24, rpn_nms_thresh=1.)
    detector = faster_rcnn(body(), num_classes=3, channels=16, hidden=32, **limits).train(training)
    images, boxes, labels = scene()
    detector.net.rpn.min_size = -1.
    if training: detector.net.roi_heads.fg_bg_sampler.positive_fraction = 0.       # negatives alone fill the 24
    with FlopCounterMode(display=False) as counter:
        answer = detector(images)
        answer.losses(boxes[1:] * 2, labels[1:] * 2) if training else answer.detections()
    before = state(detector)
    assert count(detector, (64, 96), training=training).flops == counter.get_total_flops() // 2
    assert equal(before, detector.state_dict()) and detector.training is training


@every_detector
def test_count_needs_no_values(build):
    detector = build()
    with torch.device('meta'): shadow = copy.deepcopy(detector).to('meta')
    assert count(detector, (64, 96)) == count(shadow, (64, 96)) and count(detector, (64, 96)).flops > 0


def test_the_tiny_detectors():
    student, teacher = tiny_detector_student(3), tiny_detector_teacher(3)
    small, large = count(student, (96, 192)), count(teacher, (96, 192))
    assert 60_000 < small.params < 120_000 and 4 * small.params < large.params < 500_000 and large.flops > 3 * small.flops
    image = torch.rand(2, 3, 96, 192)
    a, b = student(image), teacher(image)
    assert a.logits().shape == b.logits().shape == (2, 2, 24 * 48 + 12 * 24 + 6 * 12, 3) and torch.equal(a.anchors, b.anchors)
    assert [m.shape[1:] for m in a.levels.values()] == [(32, 24, 48), (32, 12, 24), (32, 6, 12)]
    assert [m.shape[1:] for m in b.levels.values()] == [(48, 24, 48), (48, 12, 24), (48, 6, 12)]
    assert student.num_classes == teacher.num_classes == 3


def test_a_tiny_detector_finds_what_it_learned():
    torch.manual_seed(0)
    images, boxes, labels = scene()
    for b, l, colour in zip(boxes[0].long().tolist(), labels[0].tolist(), torch.eye(3)[labels[0]]):
        images[0, :, b[1]:b[3], b[0]:b[2]] = colour[:, None, None] * 3
    detector = tiny_detector_student(3)
    optimiser = torch.optim.AdamW(detector.parameters(), 5e-3)
    for _ in range(120):
        optimiser.zero_grad()
        sum(detector.train()(images).losses(boxes, labels).values()).backward()
        optimiser.step()
    found, nothing = detector.train()(images).detections()                         # as it was trained: two images are few for BatchNorm
    best = [found['labels'][(box_iou(b[None], found['boxes'])[0] * found['scores']).argmax()] for b in boxes[0]]
    overlap = [box_iou(b[None], found['boxes'][found['labels'] == l]).max() for b, l in zip(boxes[0], labels[0])]
    assert best == labels[0].tolist() and min(overlap) > .6
    assert len(nothing['scores']) == 0 or nothing['scores'].max() < .3


def test_a_classifiers_backbone_fits_ssd(tmp_path):
    whole = timm.create_model('resnet18', num_classes=5)
    path = save_weights(whole, tmp_path / 'classifier.safetensors')
    own = ssd('resnet18', num_classes=3, pretrained=path).net.backbone.body.state_dict()
    assert equal(own, {k: v for k, v in whole.state_dict().items() if k in own}) and len(own) == len(whole.state_dict()) - 2


@pytest.mark.parametrize('call, message', [
    (lambda: Detector(tiny_student(3)), 'got SegmentationNet'),
    (lambda: Detector(detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)), 'key points, got MaskRCNN'),
    (lambda: retinanet('resnet18x', num_classes=3), "'resnet18x' is no network of timm"),
    (lambda: fcos(body(), num_classes=0, channels=16), 'at least 1, got 0'),
    (lambda: ssd(body(), num_classes=0), 'at least 1, got 0'),
    (lambda: fcos(body(), num_classes=2, channels=20), 'groups of 8 channels, got 20'),
    (lambda: fcos(body(), num_classes=2, channels=16, extra='p6'), "got 'p6'"),
    (lambda: retinanet(body(), num_classes=2, channels=16, extra=None, anchors=(8, 16)), r'3 anchor sides.*got \(8, 16\)'),
    (lambda: ssd(body(), num_classes=2, extra=(8,), scales=(.1, .2)), '5 scales for 4 maps'),
    (lambda: retinanet(body(), num_classes=2, channels=16, convs=5), '0 to 4, got 5'),
    (lambda: retinanet(body(), num_classes=2, channels=16, convs=-1), '0 to 4, got -1'),
    (lambda: retinanet(body(), num_classes=2, channels=4, norm=True), 'groups of 8 channels, got 4'),
    (lambda: retinanet(body(), num_classes=2, score_treshold=.1), "'score_treshold' is no option here; those of RetinaNet: .*score_thresh"),
    (lambda: fcos(body(), num_classes=2, min_size=300), "'min_size' is no option"),
    (lambda: faster_rcnn(body(), num_classes=2, score_thresh=.1), 'those of FasterRCNN: .*box_score_thresh'),
    (lambda: ssd(body(), num_classes=2, size=(64, 64)), "'size' is no option"),
    (lambda: retinanet(nn.Conv2d(3, 8, 3, 4, 1), num_classes=2), r'list of maps, got one of \(1, 8, 128, 128\)'),
    (lambda: ssd(Stages(nn.Conv2d(3, 8, 3, 4, 1), nn.Upsample(scale_factor=2)), num_classes=2), r'finest first, got strides \[4, 2\]'),
    (lambda: fcos(Stages(), num_classes=2), r'got strides \[\]'),
    (lambda: ssd(body(), num_classes=2, pretrained=True), 'is a module'),
    (lambda: tiny_detector_student(3)(torch.zeros(3, 32, 32)), r'got \(3, 32, 32\)'),
    (lambda: tiny_detector_student(3)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), 'torch.uint8')])
def test_detectors_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize('change, message', [
    (lambda b, l: (b[:1], l), 'of 2 images, got 1 and 2'),
    (lambda b, l: ([b[0][:, :3], b[1]], l), r'\(3, 3\) and \(3,\)'),
    (lambda b, l: (b, [l[0][:2], l[1]]), r'\(3, 4\) and \(2,\)'),
    (lambda b, l: (b, [l[0].float(), l[1]]), 'torch.float32'),
    (lambda b, l: ([b[0][:, [2, 1, 0, 3]], b[1]], l), r'x0 < x1.*got \[40.0, 10.0, 8.0, 50.0\]'),
    (lambda b, l: ([b[0][:, [0, 1, 2, 1]], b[1]], l), 'y0 < y1'),
    (lambda b, l: ([b[0] * float('nan'), b[1]], l), 'nan'),
    (lambda b, l: (b, [torch.tensor([0, 1, 3]), l[1]]), r'0\.\.2, got .* with label 3'),
    (lambda b, l: (b, [torch.tensor([0, -1, 1]), l[1]]), 'with label -1')])
@pytest.mark.parametrize('name', ['fcos', 'ssd', 'faster_rcnn', 'retinanet'])
def test_no_boxes_that_are_none(name, change, message):
    images, boxes, labels = scene()
    detector = DETECTORS[name]()
    with pytest.raises(ValueError, match=message): detector(images).losses(*change(boxes, labels))
    assert detector.training and all(m.training for m in detector.modules())


def test_an_error_leaves_the_stages_modes_alone():
    detector, (images, boxes, labels) = DETECTORS['faster_rcnn']().eval(), scene()
    def broken(*args): raise RuntimeError('out of memory')
    detector.net.roi_heads.box_roi_pool.forward = broken
    with pytest.raises(RuntimeError, match='out of memory'): detector(images).losses(boxes, labels)
    assert not any(m.training for m in detector.modules())


# classifiers of timm

@pytest.mark.parametrize('name, path', [('resnet18', 'layer4'), ('resnet50', 'layer4'), ('mobilenetv2_100', 'bn2')])
def test_timms_classifiers_read_their_last_map(name, path):
    net, image = timm.create_model(name, num_classes=6).double().eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad(), Taps(net, {'last': path}) as taps:
        logits = net(image)
        assert torch.allclose(net.get_classifier()(taps['last'].mean((2, 3))), logits)
