"""A folder of images: its layouts, what becomes of its pixels, and every way it can be wrong."""

import hashlib
import io
import os
import struct
import zlib
from itertools import product

import numpy as np
import pytest
from PIL import Image
from spoiling import spoil
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize

from immunity_lib.data import find_source, load_dataset
from immunity_lib.data.images import FORMATS, pixels


def _save(path, seed, size=(40, 60)):
    """An image of some colours with soft borders; size: height, width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def _fill(folder, classes=("cat", "dog")):
    for split, (label, name), number in product(("train", "test"), enumerate(classes), range(6)):
        _save(folder / split / name / f"{name}-{number}.png", seed=100 * label + number)
    return folder


def _load(folder, **options):
    return load_dataset("images", folder, **{"validation_images": 1} | options)


def test_images_are_those_of_torchvision_s_image_folder(tmp_path):
    shapes = {"wide": (40, 90), "high": (75, 33), "small": (20, 31), "exact": (32, 32)}
    for split in ("train", "test"):
        for number, (name, size) in enumerate(shapes.items()):
            for ending in ("png", "jpg", "JPEG", "webp"):
                _save(tmp_path / split / name / "deeper" / f"{number}.{ending}", number, size)
        Image.new("L", (50, 40), 77).save(tmp_path / split / "wide" / "grey.png")
        Image.new("RGBA", (50, 40), (9, 8, 7, 100)).save(tmp_path / split / "wide" / "clear.png")
        (tmp_path / split / "wide" / "notes.txt").write_text("no image")
    oracle = ImageFolder(tmp_path / "train", Compose([Resize(32), CenterCrop(32), np.asarray]))
    expected = [(label, image.transpose(2, 0, 1).tobytes()) for image, label in oracle]
    for hidden in (".hidden/a.png", "wide/.cache/a.png", "wide/._a.png"):
        _save(tmp_path / "train" / hidden, 0)

    dataset = _load(tmp_path, validation_images=3)
    found = [
        (label, image.numpy().tobytes()) for split in ("train", "validation")
        for image, label in zip(dataset.splits[split].images, dataset.splits[split].labels.tolist(), strict=True)
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)
    assert dataset.class_names == tuple(oracle.classes) == ("exact", "high", "small", "wide")
    assert dataset.source == "image folder with train/ and test/"


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("train", "test", "val")])
def test_folders_of_splits_are_no_classes(tmp_path, names):
    for split, name in zip(names, ("train", "test", "test"), strict=False):
        _fill(tmp_path / "good")
        (tmp_path / split).mkdir(exist_ok=True)
        os.rename(tmp_path / "good" / name, tmp_path / split)
    (tmp_path / "good").rename(tmp_path / ".good")
    if len(names) == 3:
        assert _load(tmp_path).source == "image folder with train/ and test/ (val left out)"
    else:
        with pytest.raises(ValueError, match=f"has {', '.join(sorted(names))} where classes should be; valid are"):
            _load(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """For root, who runs some of these tests, every folder can be."""
    (locked := _fill(tmp_path) / "train" / "cat" / "locked").mkdir()
    scan = os.scandir

    def refuse(path):
        if os.path.samefile(path, locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cat/locked cannot be read \(Permission denied\); mend that"):
        _load(tmp_path)


def test_statistics_are_those_of_the_training_images(tmp_path):
    for path in _fill(tmp_path).rglob("*.png"):
        picture = np.array(Image.open(path))
        picture[..., 2] = 51
        Image.fromarray(picture).save(path)
    dataset = _load(tmp_path, train_images=8, validation_images=4)
    values = dataset.splits["train"].images.double() / 255
    assert dataset.mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert dataset.std == pytest.approx([*values.std((0, 2, 3), correction=0).tolist()[:2], 1.0])  # blue never varies


def test_the_split_and_its_order_rest_on_names_alone(tmp_path):
    """Digests up to 0.333..., hexadecimal, test; and rows follow the digests."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(16):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    digests = {k: hashlib.sha256(f"{k}.png".encode()).hexdigest() for k in range(16)}
    source = find_source("images", tmp_path)
    assert source.description == "image folder split by file names"
    for split in ("test", "train"):
        expected = [k for k in range(16) if (digests[k] < "3" * 64) == (split == "test")]
        expected.sort(key=digests.get)
        rows = source.read(split, source.available[split])
        assert rows.images[:, 0, 0, 0].tolist() == [k for k in expected for _ in range(2)]
        assert rows.labels.tolist() == [0, 1] * len(expected)


def test_a_photograph_is_upright_and_shrunk_as_if_from_its_full_size(tmp_path):
    """Large JPEGs are decoded at a fraction of their size; phones note how they were held."""
    held = Image.Exif()
    held[0x0112] = 6  # turned by 90 degrees clockwise to be upright
    _save(tmp_path / "large.png", seed=3, size=(700, 1100))
    with Image.open(tmp_path / "large.png") as large:
        large.save(tmp_path / "held.jpg", quality=95, exif=held)
        upright = np.asarray(large.rotate(-90, expand=True).resize((32, 50)))[9:41]
    image = pixels(str(tmp_path / "held.jpg")).transpose(1, 2, 0)
    assert abs(image.astype(int) - upright).mean() < 3
    assert abs(np.rot90(image).astype(int) - upright).mean() > 20


BOTH = ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [([], "has 0 class folders; valid are"), (["cat/1.png"], "has 1 class folders; valid are"),
     (["train/cat/1.png", "train/dog/2.png"], "no images for test/cat, test/dog; valid are"),
     (["train/1.png", "test/1.png"], "has 0 class folders"),
     ([*BOTH, "test/cow/1.png"], "no images for train/cow, test/dog; valid are"),
     (["cat/1.png", "dog/1.png"], "no images for test/cat, test/dog; valid are .*many images"),
     ([f"{k}/1.txt" for k in range(10, 14)], "train/13, test/10, and 3 more; valid"),
     (None, "nowhere' is no folder; valid are .*<class>")],
)  # fmt: skip
def test_a_folder_in_no_valid_layout_is_told_what_is_wrong(tmp_path, layout, message):
    for name in layout or ():
        _save(tmp_path / "image.png", seed=0)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "image.png").rename(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        _load(tmp_path if layout is not None else tmp_path / "nowhere")
    with pytest.raises(ValueError, match="which folder.*valid are"):
        _load(None)


def test_broken_files_are_named_with_the_remedy(tmp_path):
    cat, dog = (_fill(tmp_path) / "train" / name for name in ("cat", "dog"))
    spoil(cat / "cat-1.png", "truncated")
    spoil(dog / "dog-0.png", "empty")
    spoil(dog / "dog-2.png", "foreign")
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(dog / "dog-3.png")
    with pytest.raises(ValueError, match="4 images cannot be used: .*replace these files") as told:
        _load(tmp_path)
    for part in ("cat-1.png", "dog-0.png", "dog-2.png", "dog-3.png (pixels of mode I;16"):
        assert part in str(told.value)
    for path in dog.iterdir():
        spoil(path, "empty")
    with pytest.raises(ValueError, match="7 images.*, and 2 more; replace"):
        _load(tmp_path)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PCX", "TGA", "JPEG2000", "AVIF", "DDS"])
def test_C3_no_other_format_is_decoded_whatever_the_ending(tmp_path, kind, monkeypatch):
    content, ghostscript = io.BytesIO(), tmp_path / "bin" / "gs"
    Image.new("RGB", (40, 40)).save(content, kind)
    _fill(tmp_path / "images")
    (tmp_path / "images" / "train" / "cat" / "9.png").write_bytes(content.getvalue())
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    with pytest.raises(ValueError, match="9.png .no intact image of the formats BMP"):
        _load(tmp_path / "images")
    with pytest.raises(ValueError, match="no intact image of the formats BMP"):
        pixels(content)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_C3_the_formats_named_are_decoded_whatever_the_ending(tmp_path, kind):
    """MPO, two JPEGs in one, is what some phones write."""
    picture = Image.new("RGB", (40, 40), (200, 100, 50))
    more = {"save_all": True, "append_images": [picture]} if kind == "MPO" else {}
    picture.save(tmp_path / "9.png", kind, **more)
    assert abs(pixels(str(tmp_path / "9.png"))[:, 5, 5].astype(int) - (200, 100, 50)).max() < 5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(13300, 13300), (8000, 6300), (10**6, 1), (1, 10**6)])
def test_C4_too_many_pixels_are_refused_before_they_are_decoded(size):
    """As they are, or as they would be: a strip becomes 32 times as long."""
    header = b"P6 %d %d 255 " % size  # of a PPM file, whose pixels do not even follow
    with pytest.raises(ValueError, match="x".join(map(str, size)) + " pixels, over 50,000,000 or too long"):
        pixels(io.BytesIO(header))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_C4_neighbours_nothing_beside_the_first_picture_is_unpacked(kind):
    """Text and profiles that grow a thousandfold are refused; further pages are not read."""
    picture, plain, pages = Image.new("RGB", (40, 40)), io.BytesIO(), io.BytesIO()
    picture.save(plain, "PNG")
    body = kind + b"x\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(ValueError, match="too large"):
        pixels(io.BytesIO(plain.getvalue()[:33] + chunk + plain.getvalue()[33:]))
    picture.save(pages, "TIFF", save_all=True, append_images=[Image.new("RGB", (1, 10**6))])
    assert not pixels(pages).any()


def test_C7_class_names_survive_whatever_their_bytes_and_move_no_terminal_s_cursor(tmp_path):
    names = {
        "\x1b[31mred\nline": r"\x1b[31mred\nline", "\u202eabc": r"\u202eabc", os.fsdecode(b"caf\xe9"): r"caf\xe9",
        **{same: same for same in ("\u05e9\u05dc", "=cmd|'x'!A0 _%&\\", "US$ and A$")},
    }  # fmt: skip
    _fill(tmp_path, classes=names)
    assert set(_load(tmp_path).class_names) == set(names.values())
    for name in names:
        (tmp_path / "train" / name / "broken\r.png").touch()
    with pytest.raises(ValueError, match="6 images cannot be used: ") as told:
        _load(tmp_path)
    named = [name for name in names.values() if rf"{name}/broken\r.png" in str(told.value)]
    assert len(named) == 5 and str(told.value).isprintable()  # and 1 more
