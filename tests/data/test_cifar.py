"""CIFAR: each way to have it, and every way in which a file can be wrong."""

import io
import pickle
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from immunity_lib.data import DATASETS, load_dataset


def _pixels(count, seed=0, size=32):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _write_parquet(file, pixels, labels, column="label", paths=None):
    paths = paths or [f"train/{row}.png" for row in range(len(labels))]
    images = [
        {"bytes": _png(image), "path": path} for image, path in zip(pixels, paths, strict=True)
    ]
    file.parent.mkdir(exist_ok=True)
    parquet.write_table(arrow.table({"img": images, column: labels}), file, row_group_size=4)


@pytest.fixture
def folder(tmp_path):
    """Two train files of 10 images and a test file of 6, the second and fifth of them lossy."""
    for part in range(2):
        file = tmp_path / "cifar10" / f"train-0000{part}-of-00002.parquet"
        _write_parquet(file, _pixels(10, seed=part), list(range(10)))
    paths = ["test/0", "lossy/1", "test/2", "test/3", "lossy/4", "test/5"]
    file = tmp_path / "cifar10" / "test-00000-of-00001.parquet"
    _write_parquet(file, _pixels(6, seed=2), list(range(6)), paths=paths)
    return tmp_path


def test_parquet_files_are_read_in_order_without_lossy_rows(folder):
    dataset = load_dataset("cifar10", folder, validation_images=3)
    train, validation, test = (dataset.splits[key] for key in ("train", "validation", "test"))
    images = np.concatenate([_pixels(10, seed=0), _pixels(10, seed=1)]).transpose(0, 3, 1, 2)
    assert np.array_equal(torch.cat([train.images, validation.images]).numpy(), images)
    assert train.labels.tolist() == [*range(10), *range(7)]
    assert validation.labels.tolist() == [7, 8, 9]
    assert test.labels.tolist() == [0, 2, 3, 5]
    assert np.array_equal(test.images[1].numpy(), _pixels(6, seed=2)[2].transpose(2, 0, 1))
    assert dataset.source == "parquet files"


def test_validation_is_the_rows_right_after_the_training_images(folder):
    dataset = load_dataset("cifar10", folder, train_images=8, validation_images=4, test_images=3)
    assert dataset.splits["train"].labels.tolist() == list(range(8))
    assert dataset.splits["validation"].labels.tolist() == [8, 9, 0, 1]
    assert dataset.splits["test"].labels.tolist() == [0, 2, 3]


def test_only_the_rows_asked_for_are_decoded(folder, monkeypatch):
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda stream: opened.append(1) or open_image(stream))
    load_dataset("cifar10", folder, train_images=2, validation_images=1, test_images=2)
    assert len(opened) == 5


def test_cifar100_has_fine_labels(tmp_path):
    for split in ("train", "test"):
        file = tmp_path / "cifar100" / f"{split}-0.parquet"
        _write_parquet(file, _pixels(4), [0, 99, 49, 87], column="fine_label")
    dataset = load_dataset("cifar100", tmp_path, validation_images=1)
    names = [dataset.class_names[label] for label in dataset.splits["test"].labels]
    assert names == ["apple", "worm", "mountain", "television"]


def test_class_names_are_those_of_the_data_sets(folder):
    assert len(load_dataset("cifar10", folder, validation_images=1).class_names) == 10
    from immunity_lib.data.cifar import CIFAR

    names = CIFAR["cifar100"].class_names
    assert len(names) == 100 and list(names) == sorted(names)


def test_unknown_names_and_too_many_images_are_refused(folder):
    with pytest.raises(ValueError, match="cifar-10.*" + ", ".join(DATASETS)):
        load_dataset("cifar-10", folder)
    with pytest.raises(ValueError, match="18 train images.*1 to 17"):
        load_dataset("cifar10", folder, train_images=18, validation_images=3)
    with pytest.raises(ValueError, match="5 test images.*1 to 4"):
        load_dataset("cifar10", folder, test_images=5, validation_images=3)
    with pytest.raises(ValueError, match="500 validation images.*20"):
        load_dataset("cifar10", folder)
    with pytest.raises(ValueError, match="6001 train images.*6000"):
        load_dataset("parts10", train_images=6001)


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def _empty(file):
    file.write_bytes(b"")


def _foreign_columns(file):
    parquet.write_table(arrow.table({"text": ["a"], "label": [1]}), file)


def _label_out_of_range(file):
    _write_parquet(file, _pixels(3), [0, 10, 1])


def _label_missing(file):
    _write_parquet(file, _pixels(3), [0, None, 1])


def _wrong_size(file):
    _write_parquet(file, _pixels(10, size=28), list(range(10)))


def _broken_picture(file):
    images = [{"bytes": _png(_pixels(1)[0])[:200], "path": "train/0"}] * 10
    parquet.write_table(arrow.table({"img": images, "label": [0] * 10}), file)


def _no_picture(file):
    parquet.write_table(arrow.table({"img": [{"path": "a"}] * 10, "label": [0] * 10}), file)


def _damaged_middle(file):
    content = bytearray(file.read_bytes())
    content[100:4000] = bytes(3900)
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _empty,
        _foreign_columns,
        _label_out_of_range,
        _label_missing,
        _wrong_size,
        _broken_picture,
        _no_picture,
        _damaged_middle,
    ],
)
def test_an_unusable_file_is_named_with_the_remedy_and_left_alone(folder, damage):
    file = folder / "cifar10" / "train-00001-of-00002.parquet"
    damage(file)
    content = file.read_bytes()
    with pytest.raises(ValueError, match=f"{file.name} cannot be used .*replace it"):
        load_dataset("cifar10", folder, validation_images=1)
    assert file.read_bytes() == content


def test_a_split_without_files_is_named(folder):
    (folder / "cifar10" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"no test-\*\.parquet"):
        load_dataset("cifar10", folder, validation_images=1)


def _write_archive(folder):
    """A small data set in the layout of torchvision's extracted archive."""
    archive = folder / "cifar-10-batches-py"
    archive.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for seed, name in enumerate(names):
        rows = _pixels(4, seed).transpose(0, 3, 1, 2).reshape(4, -1)
        content = {"data": rows, "labels": [seed, 1, 2, 3]}
        (archive / name).write_bytes(pickle.dumps(content))
    (archive / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return archive


@pytest.fixture
def any_checksum(monkeypatch):
    """Let torchvision accept archives that are not the published ones."""

    def exists(file, md5=None):
        return Path(file).is_file()

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", exists)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", exists)


def _check_archive(dataset):
    assert dataset.source == "torchvision archive"
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert (len(train), len(dataset.splits["validation"]), len(test)) == (18, 2, 4)
    assert train.labels[:8].tolist() == [0, 1, 2, 3, 1, 1, 2, 3]
    assert np.array_equal(train.images[5].numpy(), _pixels(4, seed=1)[1].transpose(2, 0, 1))


def test_an_extracted_archive_comes_before_parquet_files(folder, any_checksum):
    _write_archive(folder)
    _check_archive(load_dataset("cifar10", folder, validation_images=2))


def test_a_packed_archive_is_extracted(tmp_path, any_checksum):
    archive = _write_archive(tmp_path)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as packed:
        packed.add(archive, archive.name)
    for file in archive.iterdir():
        file.unlink()
    archive.rmdir()
    _check_archive(load_dataset("cifar10", tmp_path, validation_images=2))


def test_a_damaged_archive_is_named_with_the_remedy(tmp_path):
    _write_archive(tmp_path)
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged; replace"):
        load_dataset("cifar10", tmp_path)


def test_without_images_and_network_the_three_ways_are_told(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(ConnectionError, match=r"no network.*\(1\).*\(2\).*\(3\)"):
        load_dataset("cifar100", tmp_path / "nowhere")
