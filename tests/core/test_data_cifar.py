"""CIFAR: each way to have it, and every way in which a file can be wrong."""

import io
import pickle
import re
import shutil
import tarfile
from pathlib import Path
from unittest.mock import patch
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from immunity_lib.data import DATASETS, load_dataset


def _pixels(count, seed=0, size=32):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _encode(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def _parquet(**columns):
    return pd.DataFrame(columns).to_parquet(row_group_size=4)


def _rows(contents, labels, paths=None):
    cells = zip(contents, paths or [None] * len(labels), strict=True)
    return _parquet(img=[{"bytes": c, "path": path} for c, path in cells], label=labels)


def _fill(folder):
    """Two train files of 10 images and a test file of 6, the second and fifth of them lossy."""
    lossy = ["test/0", "lossy/1", "test/2", "test/3", "lossy/4", "test/5"]
    (folder / "cifar10").mkdir(parents=True)
    files = {"train-00000-of-00002": 10, "train-00001-of-00002": 10, "test-00000-of-00001": 6}
    for seed, (name, count) in enumerate(files.items()):
        content = _rows(map(_encode, _pixels(count, seed)), list(range(count)), lossy if count == 6 else None)
        (folder / "cifar10" / f"{name}.parquet").write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path):
    return _fill(tmp_path)


def test_C9_parquet_files_are_read_in_order_and_lossy_rows_are_told(folder):
    dataset = load_dataset("cifar10", folder, validation_images=3)
    train, validation, test = (dataset.splits[key] for key in ("train", "validation", "test"))
    expected = np.concatenate([_pixels(10, seed=0), _pixels(10, seed=1)]).transpose(0, 3, 1, 2)
    assert np.array_equal(torch.cat([train.images, validation.images]).numpy(), expected)
    labels = [one.labels.tolist() for one in (train, validation, test)]
    assert labels == [[*range(10), *range(7)], [7, 8, 9], [0, 2, 3, 5]]
    assert np.array_equal(test.images[1].numpy(), _pixels(6, seed=2)[2].transpose(2, 0, 1))
    assert dataset.source == "parquet files (2 lossy rows left out)"
    with patch.object(Image, "open", wraps=Image.open) as opened:  # for the rows asked for
        load_dataset("cifar10", folder, train_images=8, validation_images=4, test_images=3)
    assert opened.call_count == 15


def test_C9_neighbours_a_file_that_is_missing_is_told_and_one_that_is_there_twice_refused(folder):
    (second := folder / "cifar10" / "train-00001-of-00002.parquet").rename(folder / "other.parquet")
    told = load_dataset("cifar10", folder, validation_images=3).source
    assert told == "parquet files (1 of 2 train files, 2 lossy rows left out)"
    for copy in (second, second.with_stem(f"{second.stem}-9f8e")):
        copy.write_bytes((folder / "other.parquet").read_bytes())
    with pytest.raises(ValueError, match="3 train files, by their names of 2; keep one set"):
        load_dataset("cifar10", folder, validation_images=3)


@pytest.mark.parametrize("column", ["fine_label", "label"])
@pytest.mark.parametrize("nested", [True, False])
def test_C8_the_usual_columns_are_understood(tmp_path, column, nested):
    contents, labels = list(map(_encode, _pixels(4))), [0, 99, 49, 87]
    cells = [{"bytes": content} for content in contents] if nested else contents
    (tmp_path / "cifar100").mkdir()
    for split in ("train", "test"):
        content = _parquet(**{"image": cells, "coarse_label": [1, 2, 3, 4], column: labels})
        (tmp_path / "cifar100" / f"{split}-0.parquet").write_bytes(content)
    dataset = load_dataset("cifar100", tmp_path, validation_images=1)
    names = [dataset.class_names[label] for label in dataset.splits["test"].labels]
    assert names == ["apple", "worm", "mountain", "television"]
    assert np.array_equal(dataset.splits["test"].images, _pixels(4).transpose(0, 3, 1, 2))
    assert dataset.source == "parquet files" and list(dataset.class_names) == sorted(set(dataset.class_names))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"train_images": 18}, "18 train images.*1 to 17"), ({"test_images": 5}, "5 test.*1 to 4"),
        ({"train_images": 0}, "0 train images"), ({"validation_images": -1}, "-1 validation imag"),
        ({"validation_images": 500}, "500 validation images.*0 to 19"),
        ({"name": "cifar-10"}, "cifar-10.*" + ", ".join(DATASETS)),
    ],
)  # fmt: skip
def test_unknown_names_and_too_many_images_are_refused(folder, asked, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(**{"name": "cifar10", "folder": folder, "validation_images": 3} | asked)


PICTURE = _encode(_pixels(1)[0])
UNUSABLE = {
    "truncated": (lambda content: content[:-100], ""),
    "zeros": (lambda content: content[:100] + bytes(3900) + content[4000:], ""),
    "C8 columns": (lambda _: _parquet(text=["a"], label=[1]), "column img or image.*column label"),
    "no labels": (lambda _: _parquet(img=[PICTURE], coarse_label=[1]), "and a column label"),
    "names of files": (lambda _: _parquet(img=["/etc/hosts"], label=[1]), "bytes-like"),
    "label": (lambda _: _rows([PICTURE] * 2, [0, 10]), "label 10 is not in 0 .. 9"),
    "no label": (lambda _: _rows([PICTURE], [None]), "label None"),
    "size": (lambda _: _rows([_encode(_pixels(1, size=28)[0])], [1]), "row 0 .28x28 pixels"),
    "broken picture": (lambda _: _rows([PICTURE[:200]], [1]), "row 0"),
    "no picture": (lambda _: _rows([None], [1]), "no intact image"),
    "C3 format": (lambda _: _rows([_encode(_pixels(1)[0], "EPS")], [1]), "formats BMP, GIF, JPEG"),
}


@pytest.mark.parametrize("damage, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_file_is_named_with_the_remedy_and_left_alone(folder, damage, reason):
    file = folder / "cifar10" / "train-00000-of-00002.parquet"
    content = damage(file.read_bytes())
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)^(?=.*{file.name}).*cannot be used.*{reason}.*replace"):
        load_dataset("cifar10", folder, validation_images=1)
    assert file.read_bytes() == content


def _write_archive(folder):
    """A small data set in the layout of torchvision's extracted archive."""
    archive = folder / "cifar-10-batches-py"
    archive.mkdir()
    for seed, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        rows = _pixels(4, seed).transpose(0, 3, 1, 2).reshape(4, -1)
        (archive / name).write_bytes(pickle.dumps({"data": rows, "labels": [seed, 1, 2, 3]}))
    (archive / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return archive


def _pack(archive):
    packed = archive.parent / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as file:
        file.add(archive, archive.name)
    shutil.rmtree(archive)
    return packed


@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_comes_before_parquet_files(folder, packed, monkeypatch):
    for module in ("cifar", "utils"):  # torchvision accepts other archives than the published ones
        name = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(name, lambda file, md5=None: Path(file).is_file())
    archive = _write_archive(folder)
    if packed:
        _pack(archive)
    dataset = load_dataset("cifar10", folder, validation_images=2)
    assert dataset.source == "torchvision archive"
    train = dataset.splits["train"]
    assert (len(train), len(dataset.splits["validation"]), len(dataset.splits["test"])) == (18, 2, 4)
    assert train.labels[:8].tolist() == [0, 1, 2, 3, 1, 1, 2, 3]
    assert np.array_equal(train.images[5].numpy(), _pixels(4, seed=1)[1].transpose(2, 0, 1))


NO_NETWORK = patch("urllib.request.urlopen", side_effect=URLError("no network"))


@NO_NETWORK
def test_C10_a_damaged_archive_is_named_with_the_remedy(_, tmp_path):
    archive = _write_archive(tmp_path)
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged.*replace"):
        load_dataset("cifar10", tmp_path)
    packed = _pack(archive)
    packed.write_bytes(content := packed.read_bytes()[:500])
    for prepare in (lambda _: None, _write_archive):  # alone, and beside an extracted one
        prepare(tmp_path)
        with pytest.raises(ValueError, match="python.tar.gz is incomplete or damaged.*replace"):
            load_dataset("cifar10", tmp_path)
    assert packed.read_bytes() == content


@NO_NETWORK
def test_B5_without_images_and_network_the_three_ways_are_told(_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = re.escape(str(tmp_path / "data"))
    with pytest.raises(ConnectionError, match=rf"not in '{folder}'.*no network.*1.*2.*3"):
        load_dataset("cifar100")
    _fill(tmp_path / "data")
    assert load_dataset("cifar10", validation_images=1).source.startswith("parquet files")
    (tmp_path / "data" / "cifar10" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"no test-\*\.parquet"):
        load_dataset("cifar10")


def test_C5_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(_fill(tmp_path / "home")))
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("cifar10", "~", validation_images=1).splits["test"]) == 4
    with pytest.raises(ValueError, match=f"'{tmp_path}/home/cifar10' has 0 class folders"):
        load_dataset("images", Path("~/cifar10"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
