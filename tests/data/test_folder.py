"""A folder of images: its layouts, what becomes of its pixels, and every way it can be wrong."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize

from immunity_lib.data import load_dataset
from immunity_lib.data.folder import source


def _save(path, seed, size=(40, 60)):
    """An image of some colours with soft borders; size: height, width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def _fill(folder, classes=("cat", "dog"), count=4, ending="png"):
    for label, name in enumerate(classes):
        for number in range(count):
            _save(folder / name / f"{name}-{number}.{ending}", seed=100 * label + number)
    return folder


def _both(folder, **options):
    _fill(folder / "train", **options)
    _fill(folder / "test", **options)
    return folder


def _load(folder, **options):
    return load_dataset("images", folder, **{"validation_images": 1} | options)


def _as_set(images, labels):
    """Images with their labels, whatever their order."""
    return sorted((int(y), x.tobytes()) for x, y in zip(images, labels, strict=True))


def test_images_are_those_of_torchvision_s_image_folder(tmp_path):
    shapes = {"wide": (40, 90), "high": (75, 33), "small": (20, 31), "exact": (32, 32)}
    for split in ("train", "test"):
        for number, (name, size) in enumerate(shapes.items()):
            for ending in ("png", "jpg", "JPEG", "webp"):
                _save(tmp_path / split / name / "deeper" / f"{number}.{ending}", number, size)
        Image.new("L", (50, 40), 77).save(tmp_path / split / "wide" / "grey.png")
        Image.new("RGBA", (50, 40), (9, 8, 7, 100)).save(tmp_path / split / "wide" / "clear.png")
        (tmp_path / split / "wide" / "notes.txt").write_text("no image")
        _save(tmp_path / split / ".hidden" / "a.png", 0)
    dataset = _load(tmp_path, validation_images=3)
    rows = [dataset.splits[split] for split in ("train", "validation")]
    found = _as_set(
        torch.cat([r.images for r in rows]).numpy(), torch.cat([r.labels for r in rows])
    )

    (tmp_path / "train" / ".hidden" / "a.png").unlink()
    (tmp_path / "train" / ".hidden").rmdir()
    oracle = ImageFolder(tmp_path / "train", Compose([Resize(32), CenterCrop(32), np.asarray]))
    assert dataset.class_names == tuple(oracle.classes) == ("exact", "high", "small", "wide")
    images, labels = zip(*oracle, strict=True)
    assert found == _as_set([image.transpose(2, 0, 1) for image in images], labels)
    assert dataset.source == "image folder with train/ and test/"


def test_mean_and_deviation_are_those_of_the_training_images(tmp_path):
    dataset = _load(_both(tmp_path, count=6), train_images=8, validation_images=4)
    pixels = dataset.splits["train"].images.double() / 255
    assert len(pixels) == 8
    assert dataset.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert dataset.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_a_channel_that_never_varies_is_left_unscaled(tmp_path):
    _both(tmp_path)
    for path in tmp_path.rglob("*.png"):
        green = np.array(Image.open(path))
        green[..., [0, 2]] = 0, 51
        Image.fromarray(green).save(path)
    dataset = _load(tmp_path)
    assert dataset.mean[::2] == pytest.approx((0.0, 0.2)) and dataset.std[::2] == (1.0, 1.0)
    assert 0 < dataset.std[1] < 1


def test_the_first_rows_are_of_all_classes(tmp_path):
    _both(tmp_path, classes=("a", "b", "c"), count=30)
    dataset = _load(tmp_path, train_images=45, test_images=45, validation_images=5)
    for split in ("train", "test"):
        assert min(dataset.splits[split].labels.bincount()) >= 8, "15 of each are expected"
    again = _load(tmp_path, validation_images=5).splits["train"].first(45)
    assert again.checksum == dataset.splits["train"].checksum


def _split_of(folder):
    """Which of the classes' colours are in which split, by the pixels of their images."""
    own = source(folder)
    return {
        split: set(_as_set(rows.images.numpy(), rows.labels))
        for split, rows in ((split, own.read(split, n)) for split, n in own.available.items())
    }


def test_a_fifth_of_every_class_tests_and_adding_files_moves_no_other(tmp_path):
    _fill(tmp_path, count=200)
    before, available = _split_of(tmp_path), source(tmp_path).available
    assert sum(available.values()) == 400
    for label in (0, 1):
        share = sum(row[0] == label for row in before["test"])
        assert 25 <= share <= 57, "40 are expected, with a deviation of 5.7"
    for number in range(200, 230):
        _save(tmp_path / "cat" / f"cat-{number}.png", seed=1000 + number)
    after = _split_of(tmp_path)
    assert before["train"] < after["train"] and before["test"] < after["test"]
    assert not after["train"] & after["test"]
    assert sum(source(tmp_path).available.values()) == 430
    assert _load(tmp_path).source == "image folder split by file names"


def test_the_split_is_the_same_everywhere(tmp_path):
    """It and the order rest on names alone: digests up to 0.333..., hexadecimal, test."""
    numbers = range(16)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in numbers:
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    digests = {k: hashlib.sha256(f"{k}.png".encode()).hexdigest() for k in numbers}
    own = source(tmp_path)
    for split in ("test", "train"):
        expected = [k for k in numbers if (digests[k] < "3" * 64) == (split == "test")]
        expected.sort(key=digests.get)
        rows = own.read(split, own.available[split])
        assert rows.images[:, 0, 0, 0].tolist() == [k for k in expected for _ in range(2)]
        assert rows.labels.tolist() == [0, 1] * len(expected)


def test_no_more_than_the_rows_asked_for_are_decoded(tmp_path, monkeypatch):
    _both(tmp_path, count=10)
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_image(path))
    _load(tmp_path, train_images=3, validation_images=2, test_images=4)
    assert len(opened) == 9


def test_a_photograph_is_upright_and_shrunk_as_if_from_its_full_size(tmp_path):
    """Large JPEGs are decoded at a fraction of their size; phones note how they were held."""
    _both(tmp_path, count=1)
    held = Image.Exif()
    held[0x0112] = 6  # turned by 90 degrees clockwise to be upright
    _save(tmp_path / "large.png", seed=3, size=(700, 1100))
    with Image.open(tmp_path / "large.png") as large:
        large.save(tmp_path / "train" / "cat" / "cat-0.jpg", quality=95, exif=held)
        upright = np.asarray(large.rotate(-90, expand=True).resize((32, 50)))[9:41]
    (tmp_path / "train" / "cat" / "cat-0.png").unlink()
    rows = source(tmp_path).read("train", 2)
    image = rows.images[rows.labels == 0][0].permute(1, 2, 0).numpy()
    assert abs(image.astype(int) - upright).mean() < 3
    assert abs(np.rot90(image).astype(int) - upright).mean() > 20


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([], "has no class folders; valid are"),
        (["cat/1.png"], "has only the class folder cat; valid are"),
        (["1.png", "2.png"], "has no class folders; valid are"),
        (["train/cat/1.png", "train/dog/2.png"], "folder train without its counterpart"),
        (["train/1.png", "test/1.png"], "train' has no class folders"),
        (
            ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/cow/1.png"],
            "in one of train and test only: cow, dog; give both",
        ),
        (
            ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.txt"],
            r"no test images of dog; add some \(.jpg",
        ),
        (["cat/1.png", "dog/1.png"], "no test images of cat, dog; .*laying out train/ and test/"),
        ([f"{k}/1.txt" for k in range(10, 17)], "of 10, 11, 12, 13, 14, and 2 more"),
    ],
)
def test_a_folder_in_no_valid_layout_is_told_what_is_wrong(tmp_path, layout, message):
    for name in layout:
        if name.endswith(".png"):
            _save(tmp_path / name, seed=0)
        else:
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text("no image")
    with pytest.raises(ValueError, match=message):
        _load(tmp_path)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match="no folder '.*nowhere'; valid are .*<class>"):
        _load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="which folder.*valid are"):
        _load(None)


def test_broken_files_are_named_with_the_remedy(tmp_path):
    _both(tmp_path, count=4)
    train = tmp_path / "train"
    content = (train / "cat" / "cat-1.png").read_bytes()
    (train / "cat" / "cat-1.png").write_bytes(content[: len(content) // 2])
    (train / "dog" / "dog-0.png").write_bytes(b"")
    (train / "dog" / "dog-2.png").write_text("no image")
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(train / "dog" / "dog-3.png")
    with pytest.raises(ValueError, match="4 image files cannot be used: .*replace them") as told:
        _load(tmp_path)
    for part in ("cat-1.png", "dog-0.png", "dog-2.png", "dog-3.png (pixels of mode I;16"):
        assert part in str(told.value)
    for path in list(train.glob("dog/*")):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="5 image files"):
        _load(tmp_path)
    (train / "dog" / "dog-4.png").write_bytes(b"")
    with pytest.raises(ValueError, match="6 image files.*, and 1 more; replace"):
        _load(tmp_path)
