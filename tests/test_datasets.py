"""kdnotes.data.datasets: files of every kind of wrongness, transforms, order; and the real sets that are there."""
import io, json, os, pickle, struct, time, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from torchvision import tv_tensors

from kdnotes.data import datasets as D

settings.register_profile('kdnotes', deadline=None, derandomize=True)
settings.load_profile('kdnotes')
def real_set(folder):
    "Run only where KDNOTES_DATA has this folder."
    there = os.environ.get('KDNOTES_DATA') and (Path(os.environ['KDNOTES_DATA']) / folder).is_dir()
    return pytest.mark.skipif(not there, reason=f'set KDNOTES_DATA to the folder that contains {folder}/')


real = real_set('camvid')
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
@example(where=123, bit=4)                                             # decodes to another picture; only the checksum knows
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
    (root / 'cityscapes/leftImg8bit/train/ulm/._ulm_000001_000019_leftImg8bit.png').touch()         # left by a Mac
    assert len(D.Cityscapes(root)) == 4
    (root / 'cityscapes/gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png').unlink()
    with pytest.raises(ValueError, match='1 x image without a mask in .*: ulm_000001'): D.Cityscapes(root)
    for file in (root / 'cityscapes/leftImg8bit/train').rglob('*.png'): file.unlink()
    with pytest.raises(FileNotFoundError, match='leftImg8bit.png here'): D.Cityscapes(root)


# ---- the other public sets: small trees of the official form

class Mine(D.PublicSegmentation):
    folder, ids, classes, palette = 'mine', D.from_one(3), 'abc', D.default_palette(3)


def test_a_set_of_ones_own_says_only_how_it_counts(tmp_path):
    for split in Mine.splits: tree(tmp_path / 'mine', ['1', '2'], parts=(f'images/{split}', f'masks/{split}'), void=3)
    for split in Mine.splits:
        dataset = Mine(tmp_path, split=split)
        raw = torch.from_numpy(labels(1)).long()                                 # 0..3, and 255 written as 3
        assert len(dataset) == 2 and dataset.classes == ('a', 'b', 'c') and dataset.ignored == 'ids 0'
        assert equal(dataset[1]['mask'], torch.where(raw == 0, 255, raw.clamp(max=3) - 1))
    with pytest.raises(FileNotFoundError, match='other/images/train: the folder of images'):
        type('Other', (Mine,), {'folder': 'other'})(tmp_path)


def save(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def pictures_and_masks(place, names, parts, masks):
    for i, (name, mask) in enumerate(zip(names, masks, strict=True)):
        save(place / parts[0] / f'{name}.jpg', picture(i, *mask.shape))
        save(place / parts[1] / f'{name}.png', mask)


def name_list(file, *names):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(f'{n}\n' for n in names))
    return file


def row_of(*ids): return np.array([ids] * 3, np.uint8)


def voc(root, place='voc/VOCdevkit/VOC2012', aug='trainaug'):
    for part in ('SegmentationClass', 'SegmentationClassAug'):
        pictures_and_masks(root / place, ['a', 'b', 'c'], ('JPEGImages', part), [row_of(*range(21), 255)] * 3)
    for split, names in (('train', 'a'), ('val', 'c'), (aug, 'ab')):
        name_list(root / place / f'ImageSets/Segmentation/{split}.txt', *names)
    return root


def context(root, place='pascal_context'):
    pictures_and_masks(root / place, ['a', 'b'], ('JPEGImages', 'SegmentationClassContext'), [row_of(*range(60))] * 2)
    for split, name in (('train', 'a'), ('val', 'b')): name_list(root / place / f'ImageSets/SegmentationContext/{split}.txt', name)
    return root


def ade(root):
    for part in ('training', 'validation'):
        pictures_and_masks(root / 'ade20k/ADEChallengeData2016', [f'ADE_{part}_1'], (f'images/{part}', f'annotations/{part}'),
                           [row_of(*range(151))])
    return root


def nyu(root):
    for split in ('train', 'val'):
        save(root / f'nyu/{split}/images/1.jpg', picture())
        save(root / f'nyu/{split}/depth/1.png', np.arange(12 * 17, dtype=np.uint16).reshape(12, 17) * 50)
    return root


def coco(root, annotations=None, categories=None, images=None):
    if images is None: images = [dict(id=i, file_name=f'{i}.jpg', height=12, width=17) for i in (9, 3)]
    if annotations is None:
        annotations = [dict(id=1, image_id=9, category_id=90, bbox=[1, 2, 3.5, 4], iscrowd=0, segmentation=[[1, 2]]),
                       dict(id=2, image_id=9, category_id=1, bbox=[0, 0, 17, 12], iscrowd=1),
                       dict(id=3, image_id=9, category_id=1, bbox=[0, 0, 5, 0], iscrowd=0),
                       dict(id=4, image_id=9, category_id=13, bbox=[-2, 5, 30, 5])]
    if categories is None: categories = [dict(id=i, name=n) for i, n in D.COCO_IDS.items()]
    for split in ('train', 'val'):
        for i in (3, 9): save(root / f'coco/{split}2017/{i}.jpg', picture(i))
        (root / 'coco/annotations').mkdir(exist_ok=True)
        (root / f'coco/annotations/instances_{split}2017.json').write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return root


def seven_scenes(root):
    (nyu(root) / 'nyu').rename(root / 'rgbd-7scenes')
    return root


def thing(name='car', difficult='<difficult>0</difficult>', box=(2, 3, 9, 8), extra=''):
    corners = ''.join(f'<{side}>{v}</{side}>' for side, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
    return f'<object><name>{name}</name>{difficult}<bndbox>{corners}</bndbox>{extra}</object>'


SIZE = '<size><width>17</width><height>12</height><depth>3</depth></size>'
HARD = '<difficult>1</difficult>'


def voc07(root, content=None, place='voc/VOCdevkit/VOC2007'):
    "000005 with two things and a difficult one, 000007 with none; or one content (bytes) for 000005."
    if content is None: content = f'<annotation>{SIZE}{thing()}{thing("sofa", HARD)}{thing("person", "", (1, 1, 17, 12))}</annotation>'
    for name, text in (('000005', content), ('000007', f'<annotation>{SIZE}</annotation>')):
        save(root / place / f'JPEGImages/{name}.jpg', picture(int(name)))
        (root / place / 'Annotations').mkdir(exist_ok=True)
        (root / place / f'Annotations/{name}.xml').write_bytes(text if isinstance(text, bytes) else text.encode())
    for split in ('trainval', 'test'): name_list(root / place / f'ImageSets/Main/{split}.txt', '000005', '000007')
    return root


def bccd(root, content=None, **change):
    first = dict(file='images/train/a.jpg', width=17, height=12, boxes=[[1, 2, 4.5, 6], [-2, 5, 30, 10], [3, 3, 3, 9]], labels=[2, 0, 1]) | change
    second = dict(file='images/train/b.jpg', width=17, height=12, boxes=[], labels=[])
    for i, name in enumerate('ab'): save(root / f'bccd/images/train/{name}.jpg', picture(i))
    if content is None: content = json.dumps(dict(classes=['RBC', 'WBC', 'Platelets'], images=[first, second]))
    for split in ('train', 'val'): (root / f'bccd/{split}.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def cifar10(root, n=4, side=32, **change):
    parts = [np.frombuffer(encoded(picture(i, side, side), 'JPEG'), np.uint8) for i in range(n)]
    arrays = dict(jpeg=np.concatenate(parts), offsets=np.cumsum([0, *map(len, parts)]), labels=np.array([0, 9, 5, 7], np.int16),
                  classes=np.array([f'n{i}' for i in range(10)]))
    (root / 'cifar10-jpeg').mkdir(exist_ok=True)
    for split in ('train', 'val'):
        np.savez(root / f'cifar10-jpeg/{split}.npz', **{k: v for k, v in (arrays | change).items() if v is not None})
    return root


def cifar(root, rows=None, labels=None, names=None, protocol=2):
    place = root / 'cifar100/cifar-100-python'
    place.mkdir(parents=True, exist_ok=True)
    if rows is None: rows = np.arange(4 * 3072).reshape(4, 3072).astype(np.uint8)
    labels = [0, 99, 5, 7] if labels is None else labels
    for name in ('train', 'test'): (place / name).write_bytes(pickle.dumps(dict(data=rows, fine_labels=labels), protocol))
    (place / 'meta').write_bytes(pickle.dumps(dict(fine_label_names=names or [f'n{i}' for i in range(100)]), protocol))
    return root


def image_folder(root, splits=('train', 'val')):
    for split in splits:
        for c in ('cat', 'dog'):
            for i in range(2): save(root / f'imagefolder/{split}/{c}/{i}.png', picture(i))
    return root


ALL = dict(VOC=voc, PascalContext=context, ADE20K=ade, NYUDepth=nyu, CocoDetection=coco, CIFAR100=cifar, ImageFolder=image_folder,
           SevenScenes=seven_scenes, VOCDetection=voc07, BCCD=bccd, CIFAR10JPEG=cifar10,
           Cityscapes=lambda root: cityscapes(cityscapes(root), 'val'))


def make(name, root, **options): return getattr(D, name)(root, **options, **({'official': False} if name == 'CIFAR100' else {}))


@pytest.mark.parametrize('name', ALL)
def test_every_set_keeps_the_common_contract(tmp_path, monkeypatch, name):
    ALL[name](tmp_path)
    for split in getattr(D, name).splits:
        dataset = make(name, tmp_path, split=split)
        assert isinstance(dataset, D.RawSet) and len(dataset) >= 1 and dataset.task in ('segmentation', 'depth', 'detection', 'classification')
        sample = dataset[0]
        assert isinstance(sample['image'], tv_tensors.Image) and sample['image'].dtype == torch.uint8 and sample['image'].shape[0] == 3
        keys = dict(segmentation={'mask'}, depth={'depth'}, detection={'boxes', 'labels', 'image_id'}, classification={'label'})
        assert set(sample) == {'image'} | keys[dataset.task]
        assert len(list(dataset)) == len(dataset)                                  # IndexError ends a plain loop
        if dataset.task != 'depth': assert dataset.num_classes == len(dataset.classes) == len(set(dataset.classes))
        kept = D.InMemory(pickle.loads(pickle.dumps(dataset)))
        assert equal(kept[0]['image'], sample['image'])
    with pytest.raises(ValueError, match="split must be train.* or (val|test), got 'best'"): make(name, tmp_path, split='best')
    with pytest.raises(ValueError, match=f'give it Augmented.*{name}'): D.train_loader(dataset, 2, steps=1)
    monkeypatch.setenv('KDNOTES_DATA', str(tmp_path))
    assert len(make(name, None, split=dataset.splits[-1])) >= 1
    (tmp_path / 'nothing').mkdir()
    with pytest.raises(FileNotFoundError, match=str(tmp_path / 'nothing')): make(name, tmp_path / 'nothing')


@pytest.mark.parametrize('name', ALL)
def test_every_set_trains_and_is_scored(tmp_path, name):
    ALL[name](tmp_path)
    dataset = make(name, tmp_path)
    for transform in (D.train_transform(crop=16), D.cifar_transform(size=10), D.imagenet_transform(size=8))[:2 if dataset.task == 'depth' else 3]:
        out = D.Augmented(dataset, transform)[3, 0]
        assert all(type(v) in (torch.Tensor, int) for v in out.values()) and out['image'].dtype == torch.float32
        for key in ('mask', 'depth'):
            if key in out: assert out[key].shape == out['image'].shape[1:]
        if 'boxes' in out: assert len(out['boxes']) == len(out['labels'])
    batch = next(iter(D.eval_loader(D.Augmented(dataset, D.eval_transform()))))
    if dataset.task == 'classification': assert batch['label'].dtype == torch.int64 and batch['label'].shape == (1,)
    if dataset.task == 'depth': assert batch['depth'].dtype == torch.float32


@pytest.mark.parametrize('place', ['voc/VOCdevkit/VOC2012', 'voc/VOC2012'])
@pytest.mark.parametrize('aug', ['train_aug', 'trainaug'])
def test_voc(tmp_path, place, aug):
    voc(tmp_path, place, aug)
    sets = {split: D.VOC(tmp_path, split=split) for split in D.VOC.splits}
    assert {s: [i.stem for i, _ in d.pairs] for s, d in sets.items()} == dict(train=['a'], val=['c'], train_aug=['a', 'b'])
    assert {s: d.pairs[0][1].parent.name for s, d in sets.items()} == dict(train='SegmentationClass', val='SegmentationClass',
                                                                             train_aug='SegmentationClassAug')
    assert sets['val'][0]['mask'][0].tolist() == [*range(21), 255] and sets['val'].ignored == 'ids 255'
    assert D.VOC_CLASSES[0] == 'background' and D.VOC_CLASSES[15] == 'person' and D.VOC_CLASSES[20] == 'tvmonitor'
    assert D.VOC_PALETTE[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0)) and D.VOC_PALETTE[15] == (192, 128, 128)


def test_wrong_voc_trees(tmp_path):
    with pytest.raises(FileNotFoundError, match='voc: expected the folder VOCdevkit/VOC2012 or VOC2012 here'): D.VOC(tmp_path)
    place = voc(tmp_path) / 'voc/VOCdevkit/VOC2012'
    save(place / 'SegmentationClass/a.png', row_of(*range(22)))
    with pytest.raises(ValueError, match='a.png: label 21 is out of range, allowed are classes 0..20 and ignored 255'): D.VOC(tmp_path)[0]
    save(place / 'SegmentationClass/a.png', row_of(0, 1))
    with pytest.raises(ValueError, match=r'a.png: expected \(3, 22\) .*a.jpg, got \(3, 2\)'): D.VOC(tmp_path)[0]
    (place / 'SegmentationClass/a.png').unlink()
    with pytest.raises(FileNotFoundError, match='1 files that .*train.txt names do not exist: .*SegmentationClass/a.png'): D.VOC(tmp_path)
    (place / 'ImageSets/Segmentation/trainaug.txt').unlink()
    with pytest.raises(FileNotFoundError, match='expected the list train_aug.txt or trainaug.txt'): D.VOC(tmp_path, split='train_aug')


@pytest.mark.parametrize('text,rule', [
    (b'', 'no names'), (b'\n \n', 'no names'), (b'a\nb\na\n', 'more than once'), (b'a b\n', "got 'a b'"), (b'../a\n', "got '../a'"),
    (b'..\n', "got '..'"), (b'/a\n', "got '/a'"), (b'a\\b\n', 'plain name'), (b'a\0b\n', 'plain name'), (b'\xff\xfe', 'not a text file')])
def test_lists_are_read_strictly(tmp_path, text, rule):
    (tmp_path / 'l.txt').write_bytes(text)
    rule = 'the list is empty' if rule == 'no names' else rule
    with pytest.raises(ValueError, match=f'l.txt: .*{rule}'): D.read_list(tmp_path / 'l.txt')


def test_lists(tmp_path):
    (tmp_path / 'l.txt').write_bytes(b'2007_000032 \r\n\nb.x-1\n')
    assert D.read_list(tmp_path / 'l.txt') == ['2007_000032', 'b.x-1']
    with pytest.raises(FileNotFoundError, match='none.txt: this list of names'): D.read_list(tmp_path / 'none.txt')


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_no_list_leads_out_of_its_folder(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / 'fuzz.txt'
    file.write_bytes(content)
    try: names = D.read_list(file)
    except ValueError as error: assert str(error).startswith(f'{file}: ')
    else:
        for name in names: assert (file.parent / f'{name}.png').resolve().parent == file.parent.resolve() and name[0] != '.'


@pytest.mark.parametrize('place', ['pascal_context', 'pascal_context/VOC2010', 'pascal_context/VOCdevkit/VOC2010'])
def test_pascal_context(tmp_path, place):
    context(tmp_path, place)
    assert D.PascalContext(tmp_path, split='val')[0]['mask'][0].tolist() == [255, *range(59)]
    whole = D.PascalContext(tmp_path, split='val', num_classes=60)
    assert whole[0]['mask'][0].tolist() == [*range(60)] and whole.classes[1:] == D.CONTEXT_CLASSES and whole.ignored == 'ids none'
    assert D.CONTEXT_CLASSES[0] == 'aeroplane' and D.CONTEXT_CLASSES[49] == 'sky' and D.CONTEXT_CLASSES[58] == 'wood'
    with pytest.raises(ValueError, match='59 or 60, got 33'): D.PascalContext(tmp_path, num_classes=33)
    save(tmp_path / place / 'SegmentationClassContext/a.png', row_of(*range(1, 61)))
    with pytest.raises(ValueError, match='a.png: label 60 is out of range'): D.PascalContext(tmp_path)[0]


def test_pascal_context_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match='pascal_context: expected the folder JPEGImages or VOCdevkit'): D.PascalContext(tmp_path)
    (context(tmp_path) / 'pascal_context/ImageSets/SegmentationContext/val.txt').unlink()
    with pytest.raises(FileNotFoundError, match='SegmentationContext/val.txt: this list'): D.PascalContext(tmp_path, split='val')


def test_ade20k(tmp_path):
    dataset = D.ADE20K(ade(tmp_path), split='val')
    assert dataset.pairs[0][0].parent.name == 'validation' and dataset[0]['mask'][0].tolist() == [255, *range(150)]
    assert [D.ADE20K_CLASSES[i] for i in (0, 2, 6, 20, 76, 149)] == ['wall', 'sky', 'road', 'car', 'boat', 'flag']
    place = tmp_path / 'ade20k/ADEChallengeData2016'
    save(place / 'annotations/training/ADE_training_1.png', row_of(*range(1, 152)))
    with pytest.raises(ValueError, match='ADE_training_1.png: label 151 is out of range'): D.ADE20K(tmp_path)[0]
    (place / 'annotations/training/ADE_training_1.png').unlink()
    with pytest.raises(FileNotFoundError, match='annotations/training: no masks here'): D.ADE20K(tmp_path)
    (place / 'annotations/training').rmdir()
    with pytest.raises(FileNotFoundError, match='annotations/training: the folder of masks does not exist'): D.ADE20K(tmp_path)


def test_nyu_depth(tmp_path):
    depth = D.NYUDepth(nyu(tmp_path), split='val')[0]['depth']
    assert type(depth) is D.DepthMap and depth.dtype == torch.float32 and depth.shape == (12, 17)
    assert depth[0, 0] == 0 and depth[0, 3] == torch.tensor(.15) and depth.max() == torch.tensor(10.15)
    place = tmp_path / 'nyu/train'
    for array, rule in ((np.zeros((12, 17), np.uint8), 'expected one channel of 16 bits .millimetres., got mode L'),
                        (picture(), 'expected one channel of 16 bits .millimetres., got mode RGB'),
                        (np.ones((17, 12), np.uint16), r'expected \(12, 17\) .*1.jpg, got \(17, 12\)')):
        save(place / 'depth/1.png', array)
        with pytest.raises(ValueError, match=f'depth/1.png: {rule}'): D.NYUDepth(tmp_path)[0]
    save(place / 'depth/2.png', np.ones((12, 17), np.uint16))
    with pytest.raises(ValueError, match='1 x depth map without an image in .*train/images: 2.png'): D.NYUDepth(tmp_path)
    (place / 'depth').rename(place / 'depths')
    with pytest.raises(FileNotFoundError, match='train/depth: the folder of depth maps does not exist'): D.NYUDepth(tmp_path)


def test_depth_of_65_metres_keeps_every_millimetre(tmp_path):
    save(tmp_path / 'd.png', np.arange(65536, dtype=np.uint16).reshape(256, 256))
    assert equal((torch.Tensor(D.read_depth(tmp_path / 'd.png')).double() * 1000).round().long().flatten(), torch.arange(65536))


# ---- boxes

def test_coco(tmp_path):
    empty, full = D.CocoDetection(coco(tmp_path), split='val')            # images in the order of their ids
    assert empty['image_id'] == 3 and empty['boxes'].shape == (0, 4) and empty['labels'].shape == (0,)
    assert type(full['boxes']) is tv_tensors.BoundingBoxes and full['boxes'].canvas_size == (12, 17) and full['boxes'].dtype == torch.float32
    assert full['boxes'].tolist() == [[1, 2, 4.5, 6], [0, 5, 17, 10]] and full['labels'].tolist() == [79, 11]
    assert [D.COCO_CLASSES[i] for i in (0, 11, 79)] == ['person', 'stop sign', 'toothbrush'] and len(D.COCO_CLASSES) == 80
    assert equal(torch.as_tensor(full['image']).shape, (3, 12, 17))
    moved = D.train_transform(crop=(12, 17), scale=(1, 1), flip=1.)(full)
    assert moved['boxes'].tolist() == [[12.5, 2, 16, 6], [0, 5, 17, 10]] and type(moved['boxes']) is torch.Tensor


ONE = dict(id=1, image_id=9, category_id=1, bbox=[1, 2, 3, 4], iscrowd=0)

@pytest.mark.parametrize('change,rule', [
    (dict(image_id=4), 'its image_id is none of the images: .*"image_id": 4'), (dict(category_id=12), 'its category_id is none of the categories'),
    (dict(bbox=[1, 2, -3, 4]), 'bbox must be'), (dict(bbox=[float('nan'), 2, 3, 4]), 'bbox must be'),
    (dict(bbox=[1, 2, float('inf'), 4]), 'bbox must be'), (dict(bbox=[17, 2, 3, 4]), 'the box lies outside its image'),
    (dict(bbox=[1, -9, 3, 4]), 'the box lies outside its image'), (dict(bbox=[1, 2, 3]), "not boxes in COCO's form"),
    (dict(bbox='abcd'), "not boxes in COCO's form"), (dict(bbox=None), "not boxes in COCO's form"),
    (dict(bbox=[10 ** 400, 0, 1, 1]), "not boxes in COCO's form")])
def test_wrong_boxes_are_named(tmp_path, change, rule):
    with pytest.raises(ValueError, match=f'instances_train2017.json: {rule}'): D.CocoDetection(coco(tmp_path, [ONE | change]))


@pytest.mark.parametrize('content', [
    '', '[]', '{', 'null', '3', '"x"', '{"images": [], "annotations": [], "categories": []}', '{"images": {}, "annotations": 1}',
    '{"images": [{"id": 1}], "annotations": [], "categories": []}', '\ud800', '[' * 100_000,
    '{"images": [{"id": [], "file_name": "a", "height": 1, "width": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
    '{"images": [{"id": 1, "file_name": "a", "height": 1e999, "width": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}'])
def test_files_that_are_no_coco_file(tmp_path, content):
    (tmp_path / 'x.json').write_bytes(content.encode('utf-8', 'surrogatepass'))
    with pytest.raises(ValueError, match="x.json: not boxes in COCO's form"): D.DetectionFolder(tmp_path, tmp_path / 'x.json')


@pytest.mark.parametrize('record,kind,rule', [
    (dict(id=3, file_name='/etc/hostname', height=1, width=1), ValueError, "image 3: '/etc/hostname' would lie outside"),
    (dict(id=3, file_name='../9.jpg', height=12, width=17), ValueError, "image 3: '../9.jpg' would lie outside"),
    (dict(id=3, file_name='4.jpg', height=12, width=17), FileNotFoundError, '1 images that .* names do not exist: .*train2017/4.jpg'),
    (dict(id=9, file_name='9.jpg', height=12, width=17), ValueError, 'one id')])
def test_wrong_images_of_a_coco_file(tmp_path, record, kind, rule):
    images = [dict(id=9, file_name='9.jpg', height=12, width=17), record]
    with pytest.raises(kind, match=rule): D.CocoDetection(coco(tmp_path, images=images))


def test_coco_wants_its_own_categories_and_sizes(tmp_path):
    coco(tmp_path, [ONE], categories=[dict(id=1, name='cell'), dict(id=0, name='plate')])
    with pytest.raises(ValueError, match=r'expected the 80 categories of COCO, got others \(2\); .*DetectionFolder'): D.CocoDetection(tmp_path)
    own = D.DetectionFolder(tmp_path / 'coco/train2017', tmp_path / 'coco/annotations/instances_train2017.json')
    assert own.classes == ('plate', 'cell') and own[1]['labels'].tolist() == [1]
    coco(tmp_path, [], images=[dict(id=9, file_name='9.jpg', height=17, width=12)])
    with pytest.raises(ValueError, match=r'2017.json: expected \(12, 17\) .*9.jpg, got \(17, 12\)'): D.CocoDetection(tmp_path)[0]
    assert len(D.CocoDetection(tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match='none.json: the file of boxes'): D.DetectionFolder(tmp_path, tmp_path / 'none.json')
    with pytest.raises(FileNotFoundError, match='gone: the folder of images'): D.DetectionFolder(tmp_path / 'gone', tmp_path / 'none.json')


@given(boxes=st.lists(st.tuples(st.sampled_from([3, 9]), st.integers(-4, 16), st.integers(-4, 11), st.integers(0, 30), st.integers(0, 30),
                                st.booleans()), max_size=12))
@settings(max_examples=100)
def test_boxes_are_those_of_a_loop(tmp_path_factory, boxes):
    root = tmp_path_factory.getbasetemp() / 'coco_loop'
    boxes = [b for b in boxes if (b[1] + b[3] > 0 and b[2] + b[4] > 0) or not (b[3] and b[4])]
    dataset = D.CocoDetection(coco(root, [dict(image_id=i, category_id=1, bbox=[x, y, w, h], iscrowd=int(c)) for i, x, y, w, h, c in boxes]))
    for sample in dataset:
        expected = [[max(x, 0), max(y, 0), min(x + w, 17), min(y + h, 12)] for i, x, y, w, h, c in boxes
                    if i == sample['image_id'] and not c and w and h]
        assert sample['boxes'].tolist() == expected and len(sample['labels']) == len(expected)


def test_voc07(tmp_path):
    full, empty = D.VOCDetection(voc07(tmp_path))
    assert full['boxes'].tolist() == [[1, 2, 9, 8], [0, 0, 17, 12]] and type(full['boxes']) is tv_tensors.BoundingBoxes
    assert [D.VOC_CLASSES[1:][i] for i in full['labels']] == ['car', 'person'] and full['image_id'] == 0                  # the sofa is difficult
    assert empty['boxes'].shape == (0, 4) and empty['labels'].dtype == torch.int64
    dataset = D.VOCDetection(tmp_path, split='test')
    assert dataset.classes == D.VOC_CLASSES[1:] and dataset.num_classes == 20 and dataset.classes[14] == 'person'
    (tmp_path / 'voc/VOCdevkit/VOC2007').rename(tmp_path / 'voc/VOC2007')
    assert len(D.VOCDetection(tmp_path)) == 2
    with pytest.raises(FileNotFoundError, match='voc: expected the folder VOCdevkit/VOC2007 or VOC2007 here'): D.VOCDetection(tmp_path / 'voc/..' / 'voc')


@pytest.mark.parametrize('inside,expected', [
    (thing(box=(1.4, 2, 3, 4.5)), [[.4, 1, 3, 4.5]]), (thing(box=(-3, 0, 40, 40)), [[0, 0, 17, 12]]), (thing(box=(5, 5, 5, 5)), [[4, 4, 5, 5]]),
    (thing(extra='<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>'), [[1, 2, 9, 8]]), (thing(difficult=HARD), []),
    (f'<!-- a comment -->{thing(" car ")}<segmented>1</segmented>', [[1, 2, 9, 8]]), (thing(box=(9, 5, 8, 9)), [])])
def test_objects_of_voc(tmp_path, inside, expected):
    boxes = D.VOCDetection(voc07(tmp_path, f'<annotation>{SIZE}{inside}</annotation>'))[0]['boxes']
    torch.testing.assert_close(torch.Tensor(boxes), torch.tensor(expected).reshape(-1, 4).float())


NOT_VOC = "not boxes in VOC's form"

@pytest.mark.parametrize('content,rule', [
    (b'', NOT_VOC), (b'<annotation>', NOT_VOC), (b'{}', NOT_VOC), (b'\xff\xfe<\0a\0', NOT_VOC), (b'<annotation></annotation>', NOT_VOC), (b'\x89PNG', NOT_VOC),
    (f'<a>{SIZE}{thing("cat", "<difficult>2</difficult>")}</a>', NOT_VOC), (f'<a>{SIZE}{thing("cat", "<difficult/>")}</a>', NOT_VOC),
    (f'<a>{SIZE}{thing("tree")}</a>', 'its category_id is none of the categories: .*"tree"'), (f'<a>{SIZE}<object/></a>', NOT_VOC),
    (f'<a>{SIZE}{thing(box=("x", 1, 2, 3))}</a>', NOT_VOC), (f'<a>{SIZE}{thing(box=("nan", 1, 2, 3))}</a>', 'bbox must be'),
    (f'<a>{SIZE}{thing(box=(1, 1, "inf", 3))}</a>', 'bbox must be'), (f'<a>{SIZE}{thing(box=(9, 1, 5, 3))}</a>', 'bbox must be'),
    (f'<a>{SIZE}{thing(box=(1, 1, "1e999", 3))}</a>', 'bbox must be'),
    (f'<a>{SIZE}{thing(box=(90, 1, 99, 3))}</a>', 'the box lies outside its image'), (f'<a>{SIZE}{thing(box=(1, 2, 3))}</a>', NOT_VOC),
    (SIZE, NOT_VOC), ('<a><size><width>0</width><height>12</height></size></a>', 'its size cannot be 12 x 0'),
    (f'<a><size><width>17</width><height>{"9" * 30}</height></size></a>', 'its size cannot be 9'),
    ('<a><size><width>17</width><height>13</height></size></a>', r'expected \(12, 17\) .*000005.jpg, got \(13, 17\)'),
    (b'<' + b'a><' * 100_000, NOT_VOC), (b'<a>' * 100_000 + b'</a>' * 100_000, NOT_VOC)])
def test_wrong_annotations_are_named(tmp_path, content, rule):
    with pytest.raises(ValueError, match=f'000005.xml: (image 0: )?{rule}'): D.VOCDetection(voc07(tmp_path, content))[0]


DOCTYPE = '<!DOCTYPE a [<!ENTITY e "car">]>'
HEAD = '<?xml version="1.0" encoding="{}"?>'

@pytest.mark.parametrize('content', [
    f'{DOCTYPE}<a>{SIZE}{thing("&e;")}</a>', f'{DOCTYPE}<a>{SIZE}</a>', f'\ufeff{DOCTYPE}<a>{SIZE}</a>',
    f'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><a>{SIZE}{thing("&e;")}</a>', f'<!DOCTYPE a SYSTEM "x.dtd"><a>{SIZE}</a>',
    f'{HEAD.format("utf-16")}{DOCTYPE}<a>{SIZE}</a>'.encode('utf-16'), f'{HEAD.format("utf-16-be")}{DOCTYPE}<a>{SIZE}</a>'.encode('utf-16-be'),
    f'{HEAD.format("utf-7")}+ADwAIQ-DOCTYPE a [+ADwAIQ-ENTITY e "car">]><a>{SIZE}</a>', f'{DOCTYPE.lower()}<a>{SIZE}</a>', f'<a>{SIZE}&e;</a>',
    '<!DOCTYPE a [<!ENTITY a "x">' + ''.join(f'<!ENTITY {b} "{f"&{a};" * 20}">' for a, b in zip('abcdefg', 'bcdefgh')) + f']><a>{SIZE}{thing("&h;")}</a>'])
def test_no_entity_is_ever_expanded(tmp_path, content):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f'000005.xml: {NOT_VOC}'): D.VOCDetection(voc07(tmp_path, content))
    assert time.perf_counter() - start < 1


def test_the_declared_encoding_is_not_obeyed(tmp_path):
    content = f'{HEAD.format("utf-7")}<annotation>{SIZE}{thing()}<source>+ADw-</source></annotation>'
    assert len(D.VOCDetection(voc07(tmp_path, content))[0]['boxes']) == 1


@given(st.text(alphabet='<>/&;!- annotationszewidthg0127', max_size=80))
@settings(max_examples=100)
def test_random_annotations_are_refused(tmp_path_factory, inside):
    root = voc07(tmp_path_factory.getbasetemp() / 'voc_fuzz', f'<annotation>{inside}</annotation>')
    with pytest.raises(ValueError, match='000005.xml: '): D.VOCDetection(root)


def test_lists_of_voc07(tmp_path):
    place = voc07(tmp_path) / 'voc/VOCdevkit/VOC2007'
    name_list(place / 'ImageSets/Main/trainval.txt', '000007')
    assert [len(s['boxes']) for s in D.VOCDetection(tmp_path)] == [0]
    name_list(place / 'ImageSets/Main/trainval.txt', '000005 1')
    with pytest.raises(ValueError, match='trainval.txt: expected one plain name'): D.VOCDetection(tmp_path)
    (place / 'Annotations/000007.xml').unlink()
    with pytest.raises(FileNotFoundError, match='1 files that .*test.txt names do not exist: .*Annotations/000007.xml'): D.VOCDetection(tmp_path, split='test')


def test_bccd(tmp_path):
    full, empty = D.BCCD(bccd(tmp_path), split='val')
    assert full['boxes'].tolist() == [[1, 2, 4.5, 6], [0, 5, 17, 10]] and full['labels'].tolist() == [2, 0]
    assert empty['boxes'].shape == (0, 4) and empty['image_id'] == 1 and D.BCCD(tmp_path).classes == ('RBC', 'WBC', 'Platelets')
    (tmp_path / 'bccd/train.json').unlink()
    with pytest.raises(FileNotFoundError, match='train.json: the file of boxes does not exist'): D.BCCD(tmp_path)


NOT_BCCD = "not boxes in BCCD's form"

@pytest.mark.parametrize('change,rule', [
    (dict(labels=[3, 0, 0]), 'its category_id is none of the categories'), (dict(labels=[-1, 0, 0]), 'its category_id is none'),
    (dict(labels=['RBC', 0, 0]), 'its category_id is none'), (dict(labels=[[0], 0, 0]), NOT_BCCD), (dict(labels=[0, 0]), NOT_BCCD),
    (dict(labels=None), NOT_BCCD), (dict(boxes=None), NOT_BCCD), (dict(boxes=[[1, 2, 3]] * 3), NOT_BCCD), (dict(boxes='abc'), NOT_BCCD),
    (dict(boxes=[[4, 2, 1, 6]] * 3), 'bbox must be x0, y0, x1, y1'), (dict(boxes=[[float('nan'), 2, 1, 6]] * 3), 'bbox must be'),
    (dict(boxes=[[20, 2, 30, 6]] * 3), 'the box lies outside its image'), (dict(width=0), 'image 0: its size cannot be 12 x 0'),
    (dict(width=10 ** 40), 'its size cannot be'), (dict(width='wide'), NOT_BCCD), (dict(width=18), r'expected \(12, 17\) .*a.jpg, got \(12, 18\)'),
    (dict(file='../a.jpg'), "'../a.jpg' would lie outside"), (dict(file='/etc/hostname'), "'/etc/hostname' would lie outside")])
def test_wrong_bccd_files(tmp_path, change, rule):
    with pytest.raises(ValueError, match=f'train.json: (image 0: )?{rule}'): D.BCCD(bccd(tmp_path, **change))[0]


@pytest.mark.parametrize('content', ['', '[]', 'null', '{"classes": ["RBC", "WBC", "Platelets"], "images": []}', '{"classes": ["a"], "images": []}', '{"images": []}',
                                     '{"classes": ["RBC", "WBC", "Platelets"], "images": [3]}', '[' * 100_000, b'\xff\xfe'])
def test_files_that_are_no_bccd_file(tmp_path, content):
    with pytest.raises(ValueError, match=f'train.json: {NOT_BCCD}'): D.BCCD(bccd(tmp_path, content))
    with pytest.raises(FileNotFoundError, match='1 images that .*train.json names do not exist: .*c.jpg'): D.BCCD(bccd(tmp_path, file='images/train/c.jpg'))


@pytest.mark.parametrize('change', [dict(image_id=[9]), dict(category_id={}), dict(image_id=None)])
def test_annotations_that_cannot_be_looked_up(tmp_path, change):
    with pytest.raises(ValueError, match='instances_train2017.json: '): D.CocoDetection(coco(tmp_path, [ONE | change]))
    lacking = {k: v for k, v in ONE.items() if k not in change}
    with pytest.raises(ValueError, match="instances_train2017.json: not boxes in COCO's form .KeyError"): D.CocoDetection(coco(tmp_path, [lacking]))


# ---- classes

def test_cifar10_jpeg(tmp_path):
    dataset = D.CIFAR10JPEG(cifar10(tmp_path), split='val')
    assert len(dataset) == 4 and dataset.num_classes == 10 and dataset.classes[9] == 'n9'
    assert [s['label'] for s in dataset] == [0, 9, 5, 7] and type(dataset[1]['label']) is int
    for i, sample in enumerate(dataset):
        assert equal(sample['image'].permute(1, 2, 0), np.array(Image.open(io.BytesIO(encoded(picture(i, 32, 32), 'JPEG')))))
    assert equal(dataset[-1]['image'], dataset[3]['image'])
    with pytest.raises(IndexError): dataset[4]


ENDS = np.cumsum([0] + [len(encoded(picture(i, 32, 32), 'JPEG')) for i in range(4)])

@pytest.mark.parametrize('change,rule', [
    (dict(jpeg=None), 'not an archive of plain arrays'), (dict(classes=None), 'not an archive'), (dict(labels=np.array([object()] * 4)), 'not an archive.*allow_pickle'),
    (dict(jpeg=np.zeros(9)), 'expected jpeg to be bytes'), (dict(jpeg=np.zeros((3, 3), np.uint8)), 'expected jpeg to be bytes'),
    (dict(labels=np.array([0, 1, 2, 10])), 'expected labels in 0..9'), (dict(labels=np.array([0, 1, 2, -1])), 'expected labels in 0..9'),
    (dict(labels=np.array([0, 1, 2, 3.])), 'expected labels in 0..9'), (dict(labels=np.array([], int)), 'expected labels in 0..9'), (dict(labels=np.array(3)), 'expected labels'),
    (dict(labels=np.array([0, 1, 2])), 'expected offsets to rise from 0'), (dict(offsets=ENDS + 1), 'expected offsets'), (dict(offsets=ENDS * 1.), 'expected offsets'),
    (dict(offsets=ENDS[[0, 2, 1, 3, 4]]), 'expected offsets'), (dict(offsets=ENDS[[0, 1, 1, 3, 4]]), 'expected offsets'), (dict(offsets=np.array(0)), 'expected offsets'),
    (dict(offsets=ENDS[[0, 2, 1, 3, 4]].astype(np.uint64)), 'expected offsets'), (dict(classes=np.arange(10)), 'expected 10 names'),
    (dict(classes=np.array(['a'] * 10)), 'expected 10 names'), (dict(classes=np.array(['a', 'b'])), 'expected 10 names')])
def test_wrong_archives(tmp_path, change, rule):
    with pytest.raises(ValueError, match=f'train.npz: {rule}'): D.CIFAR10JPEG(cifar10(tmp_path, **change))


def test_pictures_inside_an_archive_are_guarded(tmp_path):
    with pytest.raises(ValueError, match=r'train.npz: picture 0: expected 32 x 32, got \(16, 16\)'): D.CIFAR10JPEG(cifar10(tmp_path, side=16))[0]
    data = encoded(picture(0, 32, 32), 'JPEG')
    for other in (data[:len(data) // 2], b'%!PS-Adobe-3.0', encoded(labels(), 'GIF'), b'x'):
        bytes_ = np.frombuffer(other + data, np.uint8)
        dataset = D.CIFAR10JPEG(cifar10(tmp_path, jpeg=bytes_, offsets=np.array([0, len(other), len(bytes_)]), labels=np.array([1, 2])))
        assert dataset[1]['label'] == 2 and dataset[1]['image'].shape == (3, 32, 32)
        with pytest.raises(ValueError, match='train.npz: picture 0: not a readable image'): dataset[0]


def test_an_archive_never_runs_anything(tmp_path):
    file, witness = cifar10(tmp_path) / 'cifar10-jpeg/train.npz', tmp_path / 'witness'
    evil = np.array([Evil(os.mkdir, str(witness))] * 10, object)
    with pytest.raises(ValueError, match='train.npz: not an archive'): D.CIFAR10JPEG(cifar10(tmp_path, classes=evil))
    for content in (pickle.dumps(Evil(os.mkdir, str(witness))), b'', b'PK', b'PK\x03\x04' + b'x' * 40, b'\x93NUMPY\x01\0'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match='train.npz: not an archive'): D.CIFAR10JPEG(tmp_path)
    np.save(file.with_suffix('.npy'), np.zeros(3)); file.with_suffix('.npy').rename(file)
    with pytest.raises(ValueError, match='train.npz: not an archive'): D.CIFAR10JPEG(tmp_path)
    assert not witness.exists()


def test_an_archive_cut_anywhere_is_refused(tmp_path):
    file = cifar10(tmp_path) / 'cifar10-jpeg/train.npz'
    data = file.read_bytes()
    for n in range(0, len(data), 101):
        file.write_bytes(data[:n])
        with pytest.raises(ValueError, match='train.npz: not an archive'): D.CIFAR10JPEG(tmp_path)


@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4])
def test_cifar100(tmp_path, protocol):
    dataset = D.CIFAR100(cifar(tmp_path, protocol=protocol), split='val', official=False)
    assert len(dataset) == 4 and dataset.num_classes == 100 and dataset.classes[99] == 'n99'
    assert [s['label'] for s in dataset] == [0, 99, 5, 7] and type(dataset[1]['label']) is int
    rows = np.arange(4 * 3072).reshape(4, 3, 32, 32).astype(np.uint8)
    assert all(equal(s['image'], torch.from_numpy(r)) for s, r in zip(dataset, rows, strict=True))


def test_cifar100_reads_the_pickles_of_python_2(tmp_path):
    place = cifar(tmp_path) / 'cifar100/cifar-100-python'
    text = lambda b: b'T' + struct.pack('<i', len(b)) + b                      # str of Python 2: BINSTRING
    array = (b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t' + text(b'b') + b'tR(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n('
             + text(b'u1') + b'K\0K\x01tR(K\x03' + text(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89' + text(bytes(range(256)) * 12) + b'tb')
    (place / 'train').write_bytes(b'\x80\x02}(' + text(b'data') + array + text(b'fine_labels') + b']K\x07au.')
    sample = D.CIFAR100(tmp_path, official=False)[0]
    assert sample['label'] == 7 and equal(sample['image'].flatten(), torch.arange(256, dtype=torch.uint8).repeat(12))


def test_cifar100_wants_the_official_files_unless_told_otherwise(tmp_path):
    with pytest.raises(FileNotFoundError, match='cifar-100-python/train: this file of CIFAR-100'): D.CIFAR100(tmp_path)
    cifar(tmp_path)
    for split, file, md5 in (('train', 'train', '16019d7e3df5f24257cddd939b257f8d'), ('val', 'test', 'f0ef6b0ae62326f3e7ffdfab6717acfc')):
        with pytest.raises(ValueError, match=f'{file}: md5 .* is not the official {md5}; official=False'): D.CIFAR100(tmp_path, split=split)


class Evil:
    def __init__(self, function, *arguments): self.what = function, arguments
    def __reduce__(self): return self.what


@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize('where', ['train', 'meta'])
def test_a_pickle_never_runs_anything(tmp_path, protocol, where):
    place, witness = cifar(tmp_path) / 'cifar100/cifar-100-python', tmp_path / 'witness'
    for evil in (Evil(os.mkdir, str(witness)), Evil(eval, f'__import__("os").mkdir({str(witness)!r})'), Evil(np.fromfile, str(witness))):
        (place / where).write_bytes(pickle.dumps({'data': evil, 'fine_label_names': evil}, protocol))
        with pytest.raises(ValueError, match=f'{where}: not plain data .it names '): D.CIFAR100(tmp_path, official=False)
    assert not witness.exists()
    for code in (b'cnumpy\nndarray.__init__\n.', b'\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.', b'cbuiltins\ngetattr\n.', b'Pid\n.',
                 b'cnumpy\nndarray\n(K\x01K\x01J\x00\x00\x00\x10K\0tb.', b'ios\nmkdir\n(.', b'.', b'', b'\x80\x02.', b'\x80\xff'):
        (place / where).write_bytes(code)
        with pytest.raises(ValueError, match=f'{where}: not plain data'): D.CIFAR100(tmp_path, official=False)


def test_a_pickle_cut_anywhere_is_refused(tmp_path):
    place = cifar(tmp_path, rows=np.zeros((1, 3072), np.uint8), labels=[3]) / 'cifar100/cifar-100-python'
    data = (place / 'train').read_bytes()
    for n in [*range(0, 200), *range(len(data) - 60, len(data))]:
        (place / 'train').write_bytes(data[:n])
        with pytest.raises(ValueError, match='train: not plain data'): D.CIFAR100(tmp_path, official=False)


@pytest.mark.parametrize('options,rule', [
    (dict(labels=[0, 1, 2]), 'train: expected fine_labels, a list of 4'), (dict(labels=[0, 1, 2, 100]), 'train: label 100 is out of range, allowed are 0..99'),
    (dict(labels=[0, 1, 2, -1]), 'label -1 is out of range'), (dict(labels=[0, 1, 2, '3']), "label '3' is out of range"),
    (dict(labels='0123'), 'train: expected fine_labels'), (dict(rows=np.zeros((4, 3072))), 'train: not plain data .an array that is not rows of bytes'),
    (dict(rows=np.zeros((4, 3072), np.int8)), 'not rows of bytes'), (dict(rows=np.zeros((4, 3071), np.uint8)), r'train: expected data of shape \(n, 3072\)'),
    (dict(rows=np.zeros(3072, np.uint8)), 'expected data of shape'), (dict(rows=[[0] * 3072] * 4), 'expected data of shape'),
    (dict(rows=np.zeros((4, 3072), object)), 'not rows of bytes'), (dict(rows=np.zeros((3072, 4), np.uint8).T), 'not rows of bytes'),
    (dict(names=['a'] * 100), 'meta: expected fine_label_names, a list of 100'), (dict(names=['a']), 'meta: expected fine_label_names')])
def test_wrong_cifar_files(tmp_path, options, rule):
    with pytest.raises(ValueError, match=rule): D.CIFAR100(cifar(tmp_path, **options), official=False)


def test_image_folder(tmp_path):
    dataset = D.ImageFolder(image_folder(tmp_path), split='val')
    assert dataset.classes == ('cat', 'dog') and [s['label'] for s in dataset] == [0, 0, 1, 1]
    assert equal(dataset[3]['image'].permute(1, 2, 0), picture(1))
    (tmp_path / 'imagefolder/val/cat').rename(tmp_path / 'imagefolder/val/cow')
    with pytest.raises(ValueError, match=r"imagefolder/val: .* those of train; missing \['cat'\], unknown \['cow'\]"): D.ImageFolder(tmp_path, split='val')
    for file in (tmp_path / 'imagefolder/train/dog').iterdir(): file.unlink()
    with pytest.raises(FileNotFoundError, match='dog'): D.ImageFolder(tmp_path)
    (tmp_path / 'imagefolder/train').rename(tmp_path / 'imagefolder/training')
    with pytest.raises(FileNotFoundError, match='imagefolder/train: this folder of classes'): D.ImageFolder(tmp_path, split='val')


def test_a_broken_picture_of_a_folder_of_classes_is_named(tmp_path):
    (image_folder(tmp_path) / 'imagefolder/train/dog/1.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='dog/1.png: not a readable image'): D.ImageFolder(tmp_path)[3]


def test_transforms_of_classification(tmp_path):
    sample = dict(image=torch.full((3, 32, 32), 255, dtype=torch.uint8), label=4)
    draws = [D.cifar_transform(flip=0, mean=(.2,) * 3, std=(1,) * 3)(sample)['image'] for _ in range(60)]
    border = {tuple((x == x.max()).sum((1, 2)).tolist()) for x in draws}
    assert all(x.shape == (3, 32, 32) for x in draws) and len(border) > 5 and min(min(b) for b in border) >= 28 * 28
    assert all({round(v, 4) for v in x.unique().tolist()} <= {0., .8} for x in draws)                           # border = mean
    black = [D.cifar_transform(fill=0, mean=(0,) * 3, std=(1,) * 3)(sample)['image'] for _ in range(20)]
    assert {v for x in black for v in x.unique().tolist()} == {0., 1.}
    big = dict(image=torch.from_numpy(picture(0, 300, 400)).permute(2, 0, 1), label=4)
    assert D.imagenet_transform()(big)['image'].shape == D.imagenet_eval_transform()(big)['image'].shape == (3, 224, 224)
    small = dict(image=torch.from_numpy(picture(0, 20, 30)).permute(2, 0, 1), mask=torch.zeros(20, 30))
    assert {k: tuple(v.shape[-2:]) for k, v in D.imagenet_eval_transform(resize=20, size=16)(small).items()} == dict(image=(16, 16), mask=(16, 16))
    with pytest.raises(ValueError, match='size <= resize, got 224 and 200'): D.imagenet_eval_transform(resize=200)
    for transform in (D.cifar_transform, D.imagenet_transform):
        with pytest.raises(ValueError, match='flip is a probability'): transform(flip=2)
        with pytest.raises(ValueError, match='in 0..1'): transform(mean=(123, 116, 103))


@pytest.mark.parametrize('transform', [D.cifar_transform(), D.imagenet_transform(size=20)])
def test_draws_of_classification_have_an_address(tmp_path, transform):
    data = D.Augmented(D.CIFAR100(cifar(tmp_path), official=False), transform, seed=2)
    runs = [list(D.train_loader(data, 4, steps=3, workers=w)) for w in (0, 2)]
    for a, b in zip(*runs, strict=True): assert equal(a['image'], b['image']) and equal(a['label'], b['label']) and a['label'].dtype == torch.int64
    assert len({tuple(data[e, 1]['image'].flatten().tolist()) for e in range(10)}) > 5


# ---- transforms

@given(height=st.integers(1, 40), width=st.integers(1, 40), crop=st.tuples(st.integers(1, 48), st.integers(1, 48)),
       low=st.floats(0.2, 1.5), more=st.floats(0, 1), seed=st.integers(0, 2 ** 31))
@settings(max_examples=150)
def test_training_samples_have_one_form(height, width, crop, low, more, seed):
    n = crop[0]                                                        # as many boxes as rows, so that none is taken for the other
    sample = dict(image=torch.from_numpy(picture(0, height, width)).permute(2, 0, 1),
                  mask=torch.from_numpy(labels(0, height, width)), depth=torch.full((height, width), 3.5),
                  boxes=torch.rand(n, 2).repeat(1, 2) * torch.tensor([0, 0, width, height]), labels=torch.arange(n),
                  box_labels=torch.arange(n) + 7, scene=1)
    torch.manual_seed(seed)
    out = D.train_transform(crop=crop, scale=(low, low + more))(sample)
    assert all(type(v) is torch.Tensor for k, v in out.items() if k != 'scene') and out['scene'] == 1
    assert out['image'].shape == (3, *crop) and out['image'].dtype == torch.float32 and out['image'].isfinite().all()
    assert out['mask'].shape == crop and out['mask'].dtype == torch.int64
    assert set(out['mask'].unique().tolist()) <= {0, 1, 2, 3, 255}
    assert out['depth'].shape == crop and out['depth'].dtype == torch.float32
    metres = [v for v in out['depth'].unique().tolist() if v]
    assert len(metres) <= 1 and all(3.5 / (low + more) - 1e-5 <= v <= 3.5 / low + 1e-5 for v in metres)
    boxes = out['boxes']
    assert boxes.dtype == torch.float32 and boxes.shape == (len(out['labels']), 4) and equal(out['box_labels'], out['labels'] + 7)
    assert (boxes >= 0).all() and (boxes[:, 0::2] <= crop[1]).all() and (boxes[:, 1::2] <= crop[0]).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 2).all() and (out['labels'].diff() > 0).all()


@pytest.mark.parametrize('factor', [.5, .8, 1., 1.7, 2.])
def test_depth_is_divided_by_the_zoom_and_what_is_unknown_stays_so(factor):
    metres = torch.rand(20, 30) * 9 + 1
    metres[:4] = 0
    sample = dict(image=torch.zeros(3, 20, 30, dtype=torch.uint8), depth=metres, mask=torch.arange(600).reshape(20, 30))
    out = D.RandomScale(factor, factor)(D.typed(sample))
    assert type(out['depth']) is D.DepthMap and equal(out['depth'] * factor != 0, metres.flatten()[out['mask']] != 0)
    torch.testing.assert_close(torch.Tensor(out['depth']), metres.flatten()[out['mask']] / factor)       # the mask says which pixel it was
    for transform in (D.eval_transform(), D.cifar_transform(size=20, padding=0)):                          # no zoom, nothing divided
        assert {float(v) for v in transform(sample)['depth'].flatten()} <= {float(v) for v in metres.flatten()}
    with pytest.raises(ValueError, match='imagenet_transform stretches'): D.imagenet_transform()(sample)


def test_a_zoom_is_drawn_once_for_all():
    sample = dict(image=torch.zeros(3, 40, 40, dtype=torch.uint8), depth=torch.full((40, 40), 8.), boxes=torch.tensor([[0., 0, 40, 40]]), labels=[0])
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        out = D.RandomScale(.5, 2.)(D.typed(sample))
        zoom = 8 / float(out['depth'][0, 0])
        assert abs(zoom * 40 - out['image'].shape[-1]) <= .5 + 1e-4 and out['boxes'][0, 2:].tolist() == [out['image'].shape[-1]] * 2
        seen.add(round(zoom, 5))
    assert len(seen) == 30 and min(seen) >= .5 and max(seen) <= 2


BOXES = torch.tensor([[0., 0, 20, 20], [0, 0, 9, 20], [6, 6, 14, 14], [14.5, 2, 18, 6], [0, 0, 4.9, 20], [13, 13, 20, 20], [8, 8, 9, 9]])

def test_boxes_at_the_border():
    sample = dict(image=torch.zeros(3, 20, 20, dtype=torch.uint8), boxes=BOXES, labels=torch.arange(7), box_labels=torch.arange(7) * 2)
    for least, kept in ((1, [0, 1, 2, 3, 5, 6]), (2, [0, 1, 2, 5]), (5, [0, 2])):
        crop = D._tidy_boxes(least)(v2_crop(D.typed(sample), 5, 5, 10, 10))
        expected = (BOXES - 5).clamp(0, 10)[kept]
        keep = (expected[:, 2:] - expected[:, :2]).amin(1) >= least
        assert crop['labels'].tolist() == [k for k, is_in in zip(kept, keep.tolist()) if is_in] and equal(crop['box_labels'], crop['labels'] * 2)
        assert equal(torch.Tensor(crop['boxes']), expected[keep]) and crop['boxes'].canvas_size == (10, 10)
    for wrong in (0, -1, float('nan')):
        with pytest.raises(ValueError, match='smallest_box must be at least 1 pixel'): D.train_transform(crop=4, smallest_box=wrong)
    assert len(D.train_transform(crop=20, scale=(1, 1), smallest_box=9)(sample)['boxes']) == 2
    over = D.typed(sample | dict(boxes=torch.tensor([[-5., 3, 25, 9], [18.5, 0, 30, 9], [25, 0, 30, 9]]), labels=[3, 4, 5], box_labels=[6, 8, 10]))
    assert D._tidy_boxes(2)(over)['boxes'].tolist() == [[0, 3, 20, 9]] and D._tidy_boxes(2)(over)['labels'].tolist() == [3]


def v2_crop(sample, *window):
    from torchvision.transforms import v2
    return {k: v2.functional.crop(v, *window) if isinstance(v, tv_tensors.TVTensor) else v for k, v in sample.items()}


@pytest.mark.parametrize('none', [torch.zeros(0, 4), torch.zeros(0), [], torch.zeros(0, 4, dtype=torch.int64)])
def test_an_image_without_boxes_works_everywhere(none):
    sample = dict(image=torch.zeros(3, 40, 40, dtype=torch.uint8), boxes=none, labels=[])
    for transform in (D.train_transform(crop=16), D.cifar_transform(size=40), D.imagenet_transform(size=8), D.eval_transform(),
                      D.imagenet_eval_transform(resize=20, size=16)):
        out = transform(sample)
        assert out['boxes'].shape == (0, 4) and out['boxes'].dtype == torch.float32 and out['labels'].shape == (0,) and out['labels'].dtype == torch.int64
    batch = D.collate([out, out])
    assert batch['boxes'].shape == (2, 0, 4) and batch['labels'].shape == (2, 0) and batch['labels'].dtype == torch.int64
    assert D.Resized([sample], 8)[0]['boxes'].shape == (0, 4)


@pytest.mark.parametrize('change,rule', [
    (dict(boxes=torch.zeros(4, 5)), r'boxes must be \(N,4\), got \(4, 5\)'), (dict(boxes=torch.zeros(4)), r'boxes must be \(N,4\), got \(4,\)'),
    (dict(labels=torch.zeros(3)), r'2 boxes, but labels of shape \(3,\)'), (dict(box_labels=[1]), r'2 boxes, but box_labels of shape \(1,\)'),
    (dict(labels=torch.zeros(2, 1)), r'labels of shape \(2, 1\)'), (dict(boxes=[[0, 0, 1, 1], [4, 4, 6, 3]]), r'box \[4.0, 4.0, 6.0, 3.0\]: expected finite'),
    (dict(boxes=[[0, 0, 1, 1], [4, 4, 3, 6]]), r'box \[4.0, 4.0, 3.0, 6.0\]: expected finite'), (dict(boxes=[[0, 0, float('nan'), 1]] * 2), 'box .*nan.*: expected finite'),
    (dict(boxes=[[0, 0, 1, float('inf')]] * 2), 'box .*inf.*: expected finite')])
def test_lists_that_do_not_fit_are_refused(change, rule):
    sample = dict(image=torch.zeros(3, 8, 8, dtype=torch.uint8), boxes=torch.zeros(2, 4), labels=torch.zeros(2)) | change
    with pytest.raises(ValueError, match=rule): D.eval_transform()(sample)


def test_boxes_of_another_format_are_converted():
    sample = dict(image=torch.zeros(3, 20, 20, dtype=torch.uint8), labels=[1])
    for kind, box in (('XYXY', [2, 4, 8, 6]), ('XYWH', [2, 4, 6, 2]), ('CXCYWH', [5, 5, 6, 2])):
        given = tv_tensors.BoundingBoxes([box], format=kind, canvas_size=(20, 20))
        out = D.eval_transform()(sample | dict(boxes=given))['boxes']
        assert type(out) is torch.Tensor and out.dtype == torch.float32 and out.tolist() == [[2, 4, 8, 6]], kind
        assert given.tolist() == [box]


def test_resized(tmp_path):
    sample = dict(image=torch.from_numpy(picture(0, 12, 16)).permute(2, 0, 1), mask=torch.arange(192).reshape(12, 16),
                  depth=torch.arange(192.).reshape(12, 16), boxes=torch.tensor([[4, 2, 16, 12]]), labels=[3], scene='x')
    small = D.Resized([sample], (6, 4))
    out = small[-1]
    assert len(small) == 1 and out['image'].shape == (3, 6, 4) and out['image'].dtype == torch.uint8 and out['scene'] == 'x'
    assert equal(out['mask'], sample['mask'][::2, ::4]) and equal(torch.Tensor(out['depth']), sample['depth'][::2, ::4])
    assert out['boxes'].tolist() == [[1, 1, 4, 6]] and out['labels'].tolist() == [3]
    assert D.Resized([sample], 5)[0]['mask'].shape == (5, 5)
    with pytest.raises(IndexError): small[1]
    for wrong in (0, (3, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match='size must be a side'): D.Resized([sample], wrong)
    for raw in (small, D.InMemory(small)):
        with pytest.raises(ValueError, match='give it Augmented'): D.train_loader(raw, 1, steps=1)
    kept = D.InMemory(pickle.loads(pickle.dumps(small)))
    assert kept[0] is kept[0] and equal(kept[0]['image'], out['image'])


# ---- batches of unequal lists

@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_collate_fills_up(counts, seed):
    torch.manual_seed(seed)
    samples = [dict(image=torch.zeros(3, 4, 5), boxes=torch.rand(n, 4), labels=torch.randint(9, (n,)), image_id=i, teacher=dict(at=torch.ones(2) * i))
               for i, n in enumerate(counts)]
    batch, most = D.collate(samples), max(counts)
    assert batch['boxes'].shape == (len(counts), most, 4) and batch['boxes'].dtype == torch.float32
    assert batch['labels'].shape == (len(counts), most) and batch['labels'].dtype == torch.int64
    for i, (n, sample) in enumerate(zip(counts, samples)):
        assert equal(batch['boxes'][i, :n], sample['boxes']) and not batch['boxes'][i, n:].any()
        assert equal(batch['labels'][i, :n], sample['labels']) and (batch['labels'][i, n:] == -1).all()
    assert batch['image_id'].tolist() == list(range(len(counts))) and batch['teacher']['at'][:, 1].tolist() == list(range(len(counts)))
    assert set(batch) == set(samples[0]) and len(samples[0]['boxes']) == counts[0]                         # the samples are as they were


def test_collate_is_torchs_for_all_else():
    samples = [dict(image=torch.ones(3, 2, 2), label=3, labels=torch.tensor([1, 0]), depth=torch.ones(2, 2)) for _ in range(2)]
    batch, torchs = D.collate(samples), torch.utils.data.default_collate(samples)
    assert set(batch) == set(torchs) and all(equal(batch[k], torchs[k]) for k in batch)
    with pytest.raises(ValueError, match=r'one size, got \[\(2, 2\), \(2, 3\)\]: .*Resized'):
        D.collate([samples[0], samples[0] | {'image': torch.ones(3, 2, 3)}])


@pytest.mark.parametrize('name', ['CocoDetection', 'VOCDetection', 'BCCD'])
def test_boxes_in_both_loaders(tmp_path, name):
    dataset = make(name, ALL[name](tmp_path))
    train = D.Augmented(dataset, D.train_transform(crop=(10, 14), scale=(.9, 1.2)), seed=1)
    runs = [list(D.train_loader(train, 4, steps=4, workers=w)) for w in (0, 2)]
    for a, b in zip(*runs, strict=True):
        assert all(equal(a[k], b[k]) for k in ('image', 'boxes', 'labels', 'image_id')) and a['boxes'].shape[:2] == a['labels'].shape
        assert ((a['labels'] >= 0) == (a['boxes'].sum(2) > 0)).all()
    batch, = D.eval_loader(D.Augmented(dataset, D.eval_transform()), batch_size=2)
    assert sorted((batch['labels'] >= 0).sum(1).tolist()) == [0, 2]


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


# ---- the other real sets

@real_set('bccd')
@pytest.mark.parametrize('split,images,boxes', [('train', 205, [2381, 214, 209]), ('val', 87, [967, 87, 83])])
def test_real_bccd(split, images, boxes):
    dataset = D.BCCD(None, split=split)
    assert len(dataset) == images and dataset.labels.bincount().tolist() == boxes                          # as the README beside the files counts
    train = D.Augmented(D.Resized(dataset, (120, 160)), D.train_transform(crop=(96, 128), scale=(.8, 1.2)))
    zero, two = (list(D.train_loader(train, 4, steps=2, workers=w)) for w in (0, 2))
    assert all(equal(a[k], b[k]) for a, b in zip(zero, two, strict=True) for k in ('image', 'boxes', 'labels'))
    shown = dataset[0]
    assert shown['image'].shape == (3, 480, 640) and (shown['boxes'][:, 2:] > shown['boxes'][:, :2]).all()


@real_set('bccd')
def test_real_bccd_boxes_are_where_the_cells_are():
    dataset = D.BCCD(None, split='val')
    inside, outside = [], []
    for sample in (dataset[i] for i in range(0, 80, 8)):
        white = sample['boxes'][sample['labels'] == 1].round().long().tolist()                              # white cells are dyed: dark in red and green
        where = torch.zeros(480, 640, dtype=torch.bool)
        for x0, y0, x1, y1 in white: where[y0:y1, x0:x1] = True
        dark = sample['image'][1] < 120
        if white: inside.append(dark[where].float().mean()); outside.append(dark[~where].float().mean())
    assert len(inside) > 5 and sum(inside) > 5 * sum(outside)


@real_set('cifar10-jpeg')
@pytest.mark.parametrize('split,n', [('train', 2000), ('val', 500)])
def test_real_cifar10_jpeg(split, n):
    dataset = D.CIFAR10JPEG(None, split=split)
    assert torch.tensor(dataset.labels).bincount().tolist() == [n] * 10 and dataset.classes[0] == 'airplane' and dataset.classes[9] == 'truck'
    for i in range(0, len(dataset), 97): assert dataset[i]['image'].shape == (3, 32, 32)
    mean, std = D.channel_stats(dataset, n=2000)
    assert all(abs(a - b) < .02 for a, b in zip(mean, (.4914, .4822, .4465)))                               # CIFAR-10's own, as many repositories state it


@real_set('rgbd-7scenes')
def test_real_seven_scenes():
    sets = {split: D.SevenScenes(None, split=split) for split in ('train', 'val')}
    assert {s: len(d) for s, d in sets.items()} == dict(train=107, val=25)
    for split, unknown in (('train', .1), ('val', .17)):
        metres = torch.stack([torch.Tensor(sample['depth']) for sample in sets[split]]).double()
        known = metres[metres > 0]
        assert metres.shape[1:] == (240, 320) and abs((metres == 0).double().mean() - unknown) < .01
        assert .8 < known.min() and known.max() < 3.6
        if split == 'train': assert abs(known.mean() - 1.873) < 1e-3 and abs(known.std() - .641) < 1e-3     # the README beside the files
