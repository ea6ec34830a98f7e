"""kdnotes.data.datasets: files of every kind of wrongness, transforms, order; and the real CamVid when it is there."""
import io, json, os, pickle, struct, time, zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision import tv_tensors

from kdnotes.data import datasets as D

settings.register_profile('kdnotes', deadline=None, derandomize=True)
settings.load_profile('kdnotes')
real = pytest.mark.skipif(not os.environ.get('KDNOTES_DATA'), reason='set KDNOTES_DATA to the folder that contains camvid/')
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')     # Pillow comments on broken metadata


def png(array, bits, *, size=None, colour=0):
    "A PNG made by hand, with any bit depth (Pillow writes grey in 1, 8 or 16 bits only)."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''
    for row in array:
        text = ''.join(format(int(v), f'0{bits}b') for v in row)
        rows += b'\0' + bytes(int(text[i:i + 8].ljust(8, '0'), 2) for i in range(0, len(text), 8))
    height, width = size or array.shape
    head = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def encoded(array, fmt='PNG', **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, fmt, **options)
    return buffer.getvalue()


def picture(seed=0, height=12, width=17):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def labels(seed=0, height=12, width=17, n=4):
    mask = np.random.default_rng([seed, 1]).integers(0, n, (height, width), dtype=np.uint8)
    mask[-1] = 255
    return mask


def tree(folder, names=('000', '001', '002', '003', '004'), *, parts=('images', 'masks'), end='.png', void=255):
    for i, name in enumerate(names):
        mask = labels(i)
        mask[mask == 255] = void
        for part, array, suffix in ((parts[0], picture(i), end), (parts[1], mask, '.png')):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / part / f'{name}{suffix}')


@pytest.fixture
def folder(tmp_path):
    tree(tmp_path)
    return D.SegmentationFolder(tmp_path / 'images', tmp_path / 'masks', num_classes=4)


def equal(a, b): return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


# ---- reading

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
def test_every_eight_bit_mode_becomes_rgb(tmp_path, mode):
    file = tmp_path / ('a.tif' if mode == 'CMYK' else 'a.png')
    source = Image.fromarray(picture()).convert(mode)
    source.save(file)
    image = D.read_image(file)
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8 and image.shape == (3, 12, 17)
    assert equal(image.permute(1, 2, 0), np.array(source.convert('RGB')))


@pytest.mark.parametrize('dtype,mode', [(np.uint16, 'I;16'), (np.int32, 'I'), (np.float32, 'F')])
def test_deep_pictures_are_refused(tmp_path, dtype, mode):
    Image.fromarray(np.ones((3, 4), dtype)).save(tmp_path / 'a.tif')
    with pytest.raises(ValueError, match=rf'a.tif: expected 8 bits per channel, got mode {mode}'):
        D.read_image(tmp_path / 'a.tif')


def test_orientation_is_applied_to_neither(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                               # turned by 90 degrees
    Image.fromarray(picture()).save(tmp_path / 'a.png', exif=exif)
    Image.fromarray(labels()).save(tmp_path / 'm.png', exif=exif)
    assert D.read_image(tmp_path / 'a.png').shape == (3, 12, 17) and D.read_mask(tmp_path / 'm.png').shape == (12, 17)


@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
def test_grey_masks_of_any_depth_keep_their_ids(tmp_path, bits):
    ids = np.arange(24).reshape(4, 6) % 2 ** bits
    (tmp_path / 'm.png').write_bytes(png(ids, bits))
    assert equal(D.read_mask(tmp_path / 'm.png'), torch.from_numpy(ids))


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_palette_masks_are_read_as_indices(tmp_path, bits):
    ids = np.arange(24).reshape(4, 6) % 2 ** bits
    mask = Image.fromarray(ids.astype(np.uint8)).convert('P')
    mask.putpalette([7, 3, 200] * 256)
    mask.save(tmp_path / 'm.png', bits=bits)
    assert equal(D.read_mask(tmp_path / 'm.png'), torch.from_numpy(ids))


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_coloured_masks_are_refused(tmp_path, mode):
    Image.fromarray(picture()).convert(mode).save(tmp_path / 'm.png')
    with pytest.raises(ValueError, match=f'm.png: expected single-channel class ids, got mode {mode}'):
        D.read_mask(tmp_path / 'm.png')


@pytest.mark.parametrize('name', ['m.jpg', 'm.png'])
def test_jpeg_masks_are_refused_by_content_not_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(encoded(labels(), 'JPEG'))
    with pytest.raises(ValueError, match=f'{name}: JPEG invents'): D.read_mask(tmp_path / name)


def test_missing_files_keep_the_systems_error(tmp_path):
    (tmp_path / 'd.png').mkdir()
    for read in (D.read_image, D.read_mask):
        with pytest.raises(FileNotFoundError, match='none.png'): read(tmp_path / 'none.png')
        with pytest.raises(OSError, match='d.png'): read(tmp_path / 'd.png')


def test_a_huge_size_is_refused_before_memory_is_taken(tmp_path):
    (tmp_path / 'bomb.png').write_bytes(png(np.zeros((1, 8)), 1, size=(60_000, 60_000)))
    for read in (D.read_image, D.read_mask):
        with pytest.raises(ValueError, match='bomb.png: not a readable image .*pixels'): read(tmp_path / 'bomb.png')


def test_other_formats_are_never_opened(tmp_path):
    for data in (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n', encoded(labels(), 'GIF')):
        (tmp_path / 'a.png').write_bytes(data)
        with pytest.raises(ValueError, match='a.png: not a readable image'): D.read_image(tmp_path / 'a.png')


def read_or_refuse(read, file):
    "The pixels, or None if the file was refused in the one way that is allowed, within a second."
    start = time.perf_counter()
    try: out = read(file)
    except ValueError as error:
        assert str(error).startswith(f'{file}: '), error
        out = None
    assert time.perf_counter() - start < 1
    return out


@pytest.mark.parametrize('read,array', [(D.read_image, picture()), (D.read_mask, labels())])
def test_a_png_cut_anywhere_is_refused_or_whole(tmp_path, read, array):
    data, file = encoded(array), tmp_path / 'cut.png'
    file.write_bytes(data)
    whole, refused = read(file), 0
    for n in range(len(data)):
        file.write_bytes(data[:n])
        out = read_or_refuse(read, file)
        refused += out is None
        assert out is None or equal(out, whole), n
    assert refused > 0.8 * len(data)


def test_a_jpeg_cut_anywhere_is_refused(tmp_path):
    data, file = encoded(picture(0, 40, 40), 'JPEG'), tmp_path / 'cut.jpg'
    for n in range(0, len(data), 5):
        file.write_bytes(data[:n])
        assert read_or_refuse(D.read_image, file) is None, n


@given(where=st.integers(0, 10 ** 6), bit=st.integers(0, 7))
@settings(max_examples=300)
def test_a_png_with_a_flipped_bit_is_refused_or_whole(tmp_path_factory, where, bit):
    file = tmp_path_factory.getbasetemp() / 'flip.png'
    data = bytearray(encoded(labels()))
    data[where % len(data)] ^= 1 << bit
    file.write_bytes(bytes(data))
    out = read_or_refuse(D.read_mask, file)
    assert out is None or equal(out, torch.from_numpy(labels()).long())


STARTS = [b'', b'\x89PNG\r\n\x1a\n', png(np.zeros((2, 8)), 8)[:33], encoded(picture(), 'JPEG')[:200], b'BM', b'II*\0\x08\0\0\0',
          b'MM\0*', b'RIFF\x20\0\0\0WEBPVP8 ', b'P5 4 4 255\n', b'P6\n', b'GIF89a']

@given(start=st.sampled_from(STARTS), noise=st.binary(max_size=400))
@settings(max_examples=400)
def test_random_bytes_are_refused_or_a_picture(tmp_path_factory, start, noise):
    file = tmp_path_factory.getbasetemp() / 'noise.png'
    file.write_bytes(start + noise)
    image, mask = read_or_refuse(D.read_image, file), read_or_refuse(D.read_mask, file)
    assert image is None or (image.dtype == torch.uint8 and image.shape[0] == 3)
    assert mask is None or (mask.dtype == torch.int64 and mask.ndim == 2)


# ---- ids, pairs, folders

@given(ids=st.dictionaries(st.integers(0, 5) | st.just(300), st.sampled_from([0, 1, 2, 7, 255]), min_size=1),
       raw=st.lists(st.integers(-2, 7) | st.sampled_from([299, 300, 301]), min_size=1, max_size=4))
@settings(max_examples=300)
def test_relabel_is_a_dictionary(ids, raw):
    mask = torch.tensor([raw])
    if all(v in ids for v in raw): assert equal(D.relabel(mask, ids), [[ids[v] for v in raw]])
    else:
        first = next(v for v in raw if v not in ids)
        with pytest.raises(ValueError, match=rf'x.png: label {first} is out of range'): D.relabel(mask, ids, source='x.png')


def test_relabel_at_the_edges():
    for wrong in (-1, -2, 3, 4):
        with pytest.raises(ValueError, match=f'label {wrong} is out of range'): D.relabel(torch.tensor([[0, wrong]]), {0: 0, 1: 1, 2: 255})


def test_relabel_refuses_a_table_with_negative_ids():
    with pytest.raises(ValueError, match='>= 0, got -1'): D.relabel(torch.zeros(1, 1), {-1: 0, 0: 1})


def test_a_folder_gives_what_was_written(folder):
    assert len(folder) == 5 and folder.num_classes == 4 and folder.classes[3] == 'class 3' and len(set(folder.palette)) == 4
    for i, sample in enumerate(folder):
        assert isinstance(sample['image'], tv_tensors.Image) and isinstance(sample['mask'], tv_tensors.Mask)
        assert equal(sample['image'].permute(1, 2, 0), picture(i)) and sample['mask'].dtype == torch.int64
        assert equal(sample['mask'], torch.from_numpy(labels(i)).long())


@pytest.mark.parametrize('options,rule', [
    (dict(num_classes=0), r'num_classes must be in 1..255, got 0'), (dict(num_classes=256), 'got 256'),
    (dict(num_classes=4, ignore_index=3), 'ignore_index 3 is one of the classes 0..3'),
    (dict(num_classes=4, classes=['a']), 'num_classes is 4, but there are 1 class names'),
    (dict(num_classes=4, palette=[(0, 0, 0)]), 'got 4 classes and 1 colours')])
def test_contradictions_are_refused(tmp_path, options, rule):
    tree(tmp_path)
    with pytest.raises(ValueError, match=rule): D.SegmentationFolder(tmp_path / 'images', tmp_path / 'masks', **options)


def test_no_void_label(tmp_path):
    tree(tmp_path, ['000'])
    dataset = D.SegmentationFolder(tmp_path / 'images', tmp_path / 'masks', num_classes=4, ignore_index=None)
    with pytest.raises(ValueError, match='000.png: label 255 is .* allowed are classes 0..3 and ignored none'):
        dataset[0]


def test_pairs_go_by_stem_whatever_the_ending_and_hidden_files(tmp_path):
    for part, names in (('i', 'b.JPG a.x.jpeg a.png .DS_Store ._a.png notes.txt'), ('m', 'b.png a.x.tif a.PNG Thumbs.db')):
        (tmp_path / part).mkdir()
        for name in names.split(): (tmp_path / part / name).touch()
    pairs = [(i.name, m.name) for i, m in D.pair_by_stem(tmp_path / 'i', tmp_path / 'm')]
    assert pairs == [('a.png', 'a.PNG'), ('a.x.jpeg', 'a.x.tif'), ('b.JPG', 'b.png')]


def test_the_broken_file_of_a_folder_is_named_in_a_worker_too(tmp_path):
    tree(tmp_path)
    (tmp_path / 'images/003.png').write_bytes(b'\x89PNG\r\n\x1a\nnothing')
    dataset = D.SegmentationFolder(tmp_path / 'images', tmp_path / 'masks', num_classes=4)
    for workers in (0, 1):
        with pytest.raises(ValueError, match='003.png: not a readable image'):
            list(D.eval_loader(D.Augmented(dataset, D.eval_transform()), workers=workers))


# ---- sets

def test_data_root(tmp_path, monkeypatch):
    monkeypatch.delenv('KDNOTES_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='--data_root PATH .*KDNOTES_DATA'): D.data_root()
    monkeypatch.setenv('KDNOTES_DATA', str(tmp_path / 'gone'))
    with pytest.raises(FileNotFoundError, match='KDNOTES_DATA is .*gone: no such folder'): D.data_root()
    monkeypatch.setenv('KDNOTES_DATA', str(tmp_path))
    assert D.data_root() == tmp_path
    with pytest.raises(FileNotFoundError, match='data_root is elsewhere'): D.data_root('elsewhere')


def test_camvid_form(tmp_path):
    names = [f'A_{i:03d}' for i in range(10)] + [f'B_{i:03d}' for i in range(7)]
    for split, part in (('train', names), ('val', ['B_100', 'B_101'])):
        tree(tmp_path / 'camvid' / split, part, parts=('images', 'labels'), end='.jpg', void=11)
    sets = {s: D.CamVid(tmp_path, split=s) for s in ('train', 'val', 'tune_train', 'tune_val')}
    stems = {s: [image.stem for image, _ in d.pairs] for s, d in sets.items()}
    assert stems['train'] == names and stems['val'] == ['B_100', 'B_101']
    assert stems['tune_train'] == names[:8] + names[10:15] and stems['tune_val'] == names[8:10] + names[15:]
    assert equal(sets['val'][1]['mask'], torch.from_numpy(labels(1)).long())
    with pytest.raises(ValueError, match="split must be .* got 'test'"): D.CamVid(tmp_path, split='test')
    with pytest.raises(FileNotFoundError, match='camvid/train/images: the folder of images'): D.CamVid(tmp_path / 'camvid')


def cityscapes(root, split='train', cities=('ulm', 'aachen')):
    for city in cities:
        for i in (1, 0):
            for part, end, array in (('leftImg8bit', 'leftImg8bit', picture(i, 4, 34)),
                                     ('gtFine', 'gtFine_labelIds', np.arange(34, dtype=np.uint8)[None].repeat(4, 0))):
                (folder := root / 'cityscapes' / part / split / city).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f'{city}_{i:06d}_000019_{end}.png')
    return root


def test_cityscapes_form(tmp_path):
    dataset = D.Cityscapes(cityscapes(tmp_path))
    assert [image.name[:10] for image, _ in dataset.pairs] == ['aachen_000', 'aachen_000', 'ulm_000000', 'ulm_000001']
    official = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                            255, 255, 16, 17, 18]
    assert dataset[3]['mask'].tolist() == [official] * 4 and equal(dataset[3]['image'].permute(1, 2, 0), picture(1, 4, 34))
    assert D.CITYSCAPES_CLASSES[0] == 'road' and D.CITYSCAPES_CLASSES[18] == 'bicycle' and D.CITYSCAPES_PALETTE[13] == (0, 0, 142)


def test_cityscapes_errors(tmp_path):
    root = cityscapes(tmp_path)
    with pytest.raises(ValueError, match="train or val, got 'test'"): D.Cityscapes(root, split='test')
    with pytest.raises(FileNotFoundError, match='leftImg8bit/val'): D.Cityscapes(root, split='val')
    (root / 'cityscapes/leftImg8bit/train/ulm/notes.txt').touch()
    assert len(D.Cityscapes(root)) == 4
    (root / 'cityscapes/gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png').unlink()
    with pytest.raises(ValueError, match='1 x image without a mask in .*: ulm_000001'): D.Cityscapes(root)
    for file in (root / 'cityscapes/leftImg8bit/train').rglob('*.png'): file.unlink()
    with pytest.raises(FileNotFoundError, match='leftImg8bit.png here'): D.Cityscapes(root)


# ---- transforms

@given(height=st.integers(1, 40), width=st.integers(1, 40), crop=st.tuples(st.integers(1, 48), st.integers(1, 48)),
       low=st.floats(0.2, 1.5), more=st.floats(0, 1), seed=st.integers(0, 2 ** 31))
@settings(max_examples=150)
def test_training_samples_have_one_form(height, width, crop, low, more, seed):
    sample = dict(image=torch.from_numpy(picture(0, height, width)).permute(2, 0, 1),
                  mask=torch.from_numpy(labels(0, height, width)),
                  depth=torch.full((height, width), 3.5), boxes=torch.tensor([[0., 0., width, height]]), scene=1)
    torch.manual_seed(seed)
    out = D.train_transform(crop=crop, scale=(low, low + more))(sample)
    assert all(type(v) is torch.Tensor for k, v in out.items() if k != 'scene') and out['scene'] == 1
    assert out['image'].shape == (3, *crop) and out['image'].dtype == torch.float32 and out['image'].isfinite().all()
    assert out['mask'].shape == crop and out['mask'].dtype == torch.int64
    assert set(out['mask'].unique().tolist()) <= {0, 1, 2, 3, 255}
    assert out['depth'].shape == crop and out['depth'].dtype == torch.float32
    assert set(out['depth'].unique().tolist()) <= {0.0, 3.5}
    x0, y0, x1, y1 = out['boxes'][0].tolist()
    assert 0 <= x0 <= x1 <= crop[1] and 0 <= y0 <= y1 <= crop[0]


def test_padding_is_ignored_and_outside_the_mask_nothing_is():
    sample = dict(image=torch.full((3, 10, 10), 255, dtype=torch.uint8), mask=torch.zeros(10, 10, dtype=torch.uint8))
    torch.manual_seed(0)
    out = D.train_transform(crop=16, scale=(1, 1), mean=(0.5,) * 3, std=(0.5,) * 3)(sample)
    inside = out['mask'] == 0
    assert inside.sum() == 100 and (out['mask'][~inside] == 255).all()
    assert (out['image'][:, inside] == 1).all() and (out['image'][:, ~inside].abs() < 0.005).all()


def test_plain_tensors_are_flipped_together():
    x = torch.arange(5, dtype=torch.uint8).expand(3, 4, 5)
    out = D.train_transform(crop=(4, 5), scale=(1, 1), flip=1.0, mean=(0,) * 3, std=(1,) * 3)(dict(image=x, mask=x[0]))
    assert equal((out['image'][0] * 255).round().long(), out['mask']) and out['mask'][0].tolist() == [4, 3, 2, 1, 0]


def test_shrinking_averages():
    noise = torch.from_numpy(picture(0, 100, 100)).permute(2, 0, 1)
    torch.manual_seed(0)
    out = D.train_transform(crop=20, scale=(0.2, 0.2), mean=(0,) * 3, std=(1,) * 3)(dict(image=noise))
    assert out['image'].std() < 0.35 * (noise / 255).std()         # 25 pixels into one; picking one of them keeps it all


def test_evaluation_only_normalises(folder):
    out = D.eval_transform()(folder[0])
    mean, std = (torch.tensor(v)[:, None, None] for v in (D.IMAGENET_MEAN, D.IMAGENET_STD))
    torch.testing.assert_close(out['image'], (torch.from_numpy(picture(0)).permute(2, 0, 1) / 255 - mean) / std)
    assert equal(out['mask'], torch.from_numpy(labels(0)).long()) and type(out['mask']) is torch.Tensor


@pytest.mark.parametrize('options,rule', [
    (dict(crop=0), 'crop must be'), (dict(crop=(3, 4, 5)), 'crop must be'), (dict(crop=8, scale=(0, 1)), 'scale must be'),
    (dict(crop=8, scale=(2, 1)), 'scale must be'), (dict(crop=8, flip=1.5), 'flip is a probability'),
    (dict(crop=8, mean=(123., 116., 103.)), 'in 0..1'), (dict(crop=8, std=(0, 1, 1)), 'in 0..1')])
def test_impossible_transforms_are_refused(options, rule):
    with pytest.raises(ValueError, match=rule): D.train_transform(**options)


@pytest.mark.parametrize('shape,dtype', [((3, 4, 5), torch.float32), ((1, 4, 5), torch.uint8), ((4, 5, 3), torch.uint8)])
def test_images_of_another_form_are_refused(shape, dtype):
    image = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=r'image must be uint8 \(3,H,W\), got'): D.eval_transform()(dict(image=image))


def test_image_and_mask_of_different_size_do_not_pass():
    sample = dict(image=torch.zeros(3, 4, 5, dtype=torch.uint8), mask=torch.zeros(5, 4))
    with pytest.raises(ValueError, match='HxW'): D.train_transform(crop=4)(sample)


# ---- randomness with an address

def test_a_sample_depends_on_its_address_only(folder):
    train = D.Augmented(folder, D.train_transform(crop=10), seed=3)
    before = torch.get_rng_state()
    first = train[1, 2]['image']
    train[0, 0], train[1, 1]
    assert equal(train[1, 2]['image'], first) and equal(train[1, -3]['image'], first)
    assert equal(train[2]['image'], train[0, 2]['image']) and not equal(train[2]['image'], first)
    assert not equal(D.Augmented(folder, train.transform, seed=4)[1, 2]['image'], first)
    assert equal(torch.get_rng_state(), before)


def test_the_global_generator_survives_an_error(folder):
    def fails(sample): torch.rand(3); raise KeyError('no')
    before = torch.get_rng_state()
    with pytest.raises(KeyError): D.Augmented(folder, fails)[0]
    with pytest.raises(IndexError): D.Augmented(folder, D.eval_transform())[5]
    assert equal(torch.get_rng_state(), before)


def test_everything_can_be_pickled(folder):
    train = D.Augmented(folder, D.train_transform(crop=10))
    assert equal(pickle.loads(pickle.dumps(train))[1, 2]['image'], train[1, 2]['image'])
    assert list(pickle.loads(pickle.dumps(D.Batches(5, 2, steps=4)))) == list(D.Batches(5, 2, steps=4))


def test_workers_change_nothing(folder):
    train = D.Augmented(folder, D.train_transform(crop=10), seed=1)
    before = torch.get_rng_state()
    runs = [list(D.train_loader(train, 3, steps=6, seed=1, workers=w)) for w in (0, 1, 2)]
    assert equal(torch.get_rng_state(), before)
    for batches in zip(*runs, strict=True):
        for key in ('image', 'mask'): assert all(equal(b[key], batches[0][key]) for b in batches)
    resumed = list(D.train_loader(train, 3, steps=6, start=4, seed=1, workers=2))
    assert len(resumed) == 2 and all(equal(a['image'], b['image']) for a, b in zip(resumed, runs[0][4:]))
    assert not equal(runs[0][0]['image'], runs[0][1]['image'])


def count_threads(sample): return {'threads': torch.get_num_threads()}


def test_workers_use_one_thread(folder):
    assert next(iter(D.eval_loader(D.Augmented(folder, count_threads), workers=1)))['threads'].item() == 1


# ---- order

plans = dict(n=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 5))

@given(**plans, steps=st.integers(0, 20))
def test_batches_are_slices_of_one_stream_of_whole_epochs(n, batch, seed, steps):
    batches = list(D.Batches(n, batch, steps=steps, seed=seed))
    assert len(batches) == len(D.Batches(n, batch, steps=steps, seed=seed)) == steps and all(len(b) == batch for b in batches)
    stream = sum(batches, [])
    assert [e for e, _ in stream] == [p // n for p in range(steps * batch)]
    for epoch in range(steps * batch // n): assert sorted(i for e, i in stream if e == epoch) == list(range(n))
    assert all(type(e) is int and type(i) is int for e, i in stream)


@given(**plans, start=st.integers(0, 10), more=st.integers(0, 10), world=st.integers(1, 5))
def test_resuming_and_sharing_change_nothing(n, batch, seed, start, more, world):
    whole = list(D.Batches(n, batch * world, steps=start + more, seed=seed))
    ranks = [D.Batches(n, batch * world, steps=start + more, start=start, seed=seed, rank=r, world=world) for r in range(world)]
    assert [sum(shares, []) for shares in zip(*ranks, strict=True)] == whole[start:]
    assert all(len(r) == more for r in ranks)


def test_seeds_and_epochs_give_different_orders_and_the_order_is_fixed():
    orders = {tuple(D.epoch_order(20, seed, epoch).tolist()) for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100
    assert D.epoch_order(8, 0, 0).tolist() == np.random.default_rng([0, 0]).random(8).argsort(kind='stable').tolist()
    assert D.epoch_order(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    with pytest.raises(ValueError, match='read-only'): D.epoch_order(8, 0, 0)[0] = 1


@pytest.mark.parametrize('options,rule', [
    (dict(n=0), '>= 1'), (dict(batch_size=0), '>= 1'), (dict(start=3), 'start <= steps'), (dict(start=-1), 'start <= steps'),
    (dict(world=3), 'batch_size 4 does not divide among 3'), (dict(rank=1), 'rank 1, world 1'),
    (dict(rank=-1, world=2), 'rank -1, world 2')])
def test_impossible_plans_are_refused(options, rule):
    with pytest.raises(ValueError, match=rule): D.Batches(**(dict(n=5, batch_size=4, steps=2) | options))


@pytest.mark.parametrize('world', [1, 2, 3, 7])
def test_evaluation_sees_every_sample_once(folder, world):
    number = lambda sample: {'id': sample['image'].long().sum()}
    test = D.Augmented(folder, number)
    seen = [batch['id'].item() for r in range(world) for batch in D.eval_loader(test, rank=r, world=world)]
    assert sorted(seen) == sorted(test[i]['id'].item() for i in range(5))
    assert sum(len(D.eval_loader(test, rank=r, world=world)) for r in range(world)) == 5
    with pytest.raises(ValueError, match='0 <= rank < world'): D.eval_loader(test, rank=world, world=world)


def test_a_raw_set_is_no_training_set(folder):
    with pytest.raises(ValueError, match='Augmented'): D.train_loader(folder, 2, steps=1)


# ---- the real CamVid

@real
@pytest.mark.parametrize('split,count', [('train', 367), ('val', 101)])
def test_real_camvid(split, count):
    dataset = D.CamVid(None, split=split)
    stats = json.loads((D.data_root() / 'camvid/stats.json').read_text())
    assert len(dataset) == count and stats['classes'][:11] == list(D.CAMVID_CLASSES)
    assert stats['palette'][:11] == [list(c) for c in D.CAMVID_PALETTE]
    pixels = torch.zeros(256, dtype=torch.long)
    for _, file in dataset.pairs:
        mask = D.relabel(D.read_mask(file), dataset.ids, source=file)
        assert mask.shape == (360, 480)
        pixels += torch.bincount(mask.flatten(), minlength=256)
    assert pixels[:11].tolist() + [pixels[255].item()] == stats['stats'][split]['pixels'] and pixels[11:255].sum() == 0
    torch.testing.assert_close((pixels[:11] / pixels.sum()).tolist(), stats['stats'][split]['freq_all'][:11], rtol=1e-5, atol=0)


@real
def test_real_camvid_colours():
    dataset = D.CamVid(None, split='val')
    measured = np.array(D.channel_stats(dataset))
    pixels = np.stack([np.asarray(Image.open(image)) for image, _ in dataset.pairs]) / 255
    np.testing.assert_allclose(measured, [pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))], rtol=1e-9)
    # The numbers stored beside the data were taken from other encodings of the same frames: close, not equal.
    stored = json.loads((D.data_root() / 'camvid/stats.json').read_text())['stats']['val']
    np.testing.assert_allclose(measured, [stored['mean_jpeg'], stored['std_jpeg']], rtol=2e-3)


@real
def test_real_camvid_val_is_one_clip_and_the_tuning_blocks_hold_every_class():
    sets = {s: D.CamVid(None, split=s) for s in ('train', 'val', 'tune_train', 'tune_val')}
    drives = {s: {i.stem.split('_')[0] for i, _ in d.pairs} for s, d in sets.items()}
    assert len(drives['val']) == 1 and drives['val'] < drives['train'] and len(drives['train']) == 3
    assert drives['tune_train'] == drives['tune_val'] == drives['train']
    assert sorted(sets['tune_train'].pairs + sets['tune_val'].pairs) == sets['train'].pairs
    assert 0.19 < len(sets['tune_val']) / len(sets['train']) < 0.22
    seen = {int(v) for _, file in sets['tune_val'].pairs for v in D.read_mask(file).unique()}
    assert seen >= set(range(11))


@real
def test_real_camvid_batches():
    train = D.Augmented(D.CamVid(None), D.train_transform(crop=(180, 240)))
    zero, two = (list(D.train_loader(train, 4, steps=2, workers=w)) for w in (0, 2))
    assert all(equal(a['image'], b['image']) and equal(a['mask'], b['mask']) for a, b in zip(zero, two, strict=True))
    assert zero[0]['image'].shape == (4, 3, 180, 240) and set(zero[0]['mask'].unique().tolist()) <= {*range(11), 255}
