"""Parts-10: the same everywhere, and true to what its description promises."""

import numpy as np
import pytest
import torch

from immunity_lib.data import load_dataset, parts

IMAGES_OF_SEED_0 = "5d33a7f64529344622d39a4f5279c8f053fef23cc619b190a670f8b49c72b9c7"


@pytest.fixture(scope="module")
def train():
    return parts.generate("train", 2000, seed=0)


def test_the_images_of_a_seed_never_change():
    assert parts.generate("train", 300, seed=0).checksum == IMAGES_OF_SEED_0


def test_the_first_images_do_not_depend_on_how_many_are_drawn(train):
    assert parts.generate("train", 7, seed=0).checksum == train.first(7).checksum


def test_seeds_and_splits_are_different_images(train):
    others = [("train", 1), ("test", 0), ("test-shifted", 0)]
    checksums = {parts.generate(split, 100, seed).checksum for split, seed in others}
    assert len(checksums | {train.first(100).checksum}) == 4


def test_no_two_parts_confuse_the_same_classes():
    pairs = [
        (first, second)
        for colours in parts.COLOUR
        for first in range(10)
        for second in range(first + 1, 10)
        if colours[first] == colours[second]
    ]
    assert len(pairs) == len(set(pairs)) == 20
    for colours, variants in zip(parts.COLOUR, parts.VARIANT, strict=True):
        assert len(set(zip(colours, variants, strict=True))) == 10


def test_masks_are_disjoint_and_every_bird_shows_a_part(train):
    overlap = train.part_masks.sum(dim=1) + train.background.long()
    assert overlap.max() == 1
    assert train.part_masks.sum(dim=(2, 3)).amax(dim=1).min() >= 10


def test_masks_point_at_the_part():
    """Under its mask, a head has the colour of its class, up to jitter and light."""
    image_set = parts.generate("test", 500, seed=3)
    visible = image_set.part_masks[:, 0].sum(dim=(1, 2)) > 40
    images = image_set.images[visible].float() / 255
    masks = image_set.part_masks[visible, 0].float()[:, None]
    colours = (images * masks).sum(dim=(2, 3)) / masks.sum(dim=(2, 3))
    expected = torch.from_numpy(parts.PART_COLOURS[parts.COLOUR[0, image_set.labels[visible]]])
    assert (colours - expected).abs().mean() < 0.15


def test_parts_are_missing_or_hidden_as_often_as_stated(train):
    seen = (train.part_masks.sum(dim=(2, 3)) > 10).float().mean().item()
    # One part in four is always there; the others are with the rest of the probability.
    assert seen == pytest.approx(1 - 0.75 * (parts.PART_MISSING + parts.PART_HIDDEN), abs=0.03)


@pytest.mark.parametrize("part", range(4), ids=parts.PART_NAMES)
def test_each_part_alone_identifies_the_class(train, part):
    """The nearest class mean, over pixels under the mask of one part, where chance is 0.1."""
    pictures, labels = _cut_out(train, part)
    test_pictures, test_labels = _cut_out(parts.generate("test", 500, seed=0), part)
    means = torch.stack([pictures[labels == label].mean(dim=0) for label in range(10)])
    predictions = torch.cdist(test_pictures, means).argmin(dim=1)
    assert (predictions == test_labels).float().mean() > 0.65


@pytest.mark.parametrize("split, agreement", [("train", 0.8), ("test", 0.8), ("test-shifted", 0.1)])
def test_the_habitat_agrees_with_the_class_as_often_as_stated(split, agreement):
    """The habitat is read off the generator: it is drawn right after the labels."""
    habitats, labels = [], []
    for chunk in range(8):
        random = np.random.RandomState([0, list(parts.AVAILABLE).index(split), chunk])
        labels.append(random.randint(0, 10, parts.CHUNK))
        habitats.append(parts._choose_habitats(random, labels[-1], split))
    agrees = np.concatenate(habitats) == np.concatenate(labels)
    assert agrees.mean() == pytest.approx(agreement, abs=0.03)
    assert len(np.unique(habitats)) == 10


def test_the_background_tells_the_class_unless_the_habitat_is_shifted(train):
    colours, labels = _background_colours(train)
    means = torch.stack([colours[labels == label].mean(dim=0) for label in range(10)])

    def accuracy(split):
        test_colours, test_labels = _background_colours(parts.generate(split, 1000, seed=0))
        predictions = torch.cdist(test_colours, means).argmin(dim=1)
        return (predictions == test_labels).float().mean()

    assert accuracy("test") > 0.25
    assert accuracy("test-shifted") < 0.15


def test_as_a_data_set():
    dataset = load_dataset("parts10", train_images=300, validation_images=50, test_images=20)
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 300, "validation": 50, "test": 20, "test-shifted": 20,
    }  # fmt: skip
    pixels = dataset.splits["train"].images.double() / 255
    assert dataset.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert dataset.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), rel=1e-4)
    assert dataset.source == "generated"
    assert dataset.part_names == parts.PART_NAMES
    whole = parts.generate("train", 350, seed=0)
    assert dataset.splits["validation"].checksum == whole.rows(300, 350).checksum


def _cut_out(image_set, part):
    """Pixels of one part, black around it and centred, and the labels; where the part is seen."""
    masks = image_set.part_masks[:, part]
    area = masks.sum(dim=(1, 2))
    seen = area >= 12
    masks, area, labels = masks[seen].float(), area[seen], image_set.labels[seen]
    pictures = image_set.images[seen].float() / 255 * masks[:, None]
    steps = torch.arange(32.0)
    down = (16 - (masks.sum(dim=2) @ steps) / area).round().int().tolist()
    right = (16 - (masks.sum(dim=1) @ steps) / area).round().int().tolist()
    centred = [
        torch.roll(picture, shift, dims=(1, 2))[:, 8:24, 8:24].flatten()
        for picture, shift in zip(pictures, zip(down, right, strict=True), strict=True)
    ]
    return torch.stack(centred), labels


def _background_colours(image_set):
    masks = image_set.background.float()[:, None]
    colours = (image_set.images * masks).sum(dim=(2, 3)) / masks.sum(dim=(2, 3))
    return colours, image_set.labels
