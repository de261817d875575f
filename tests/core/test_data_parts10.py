"""Parts-10: the same everywhere, and true to what its description promises."""

import hashlib

import numpy as np
import pytest
import torch

from immunity_lib.data import load_dataset, parts10

IMAGES_OF_SEED_0 = "5d33a7f64529344622d39a4f5279c8f053fef23cc619b190a670f8b49c72b9c7"
MASKS_OF_SEED_0 = "bc65a03f087b844eba6014f77335cec2346b76fa4e8b457f6ac8b547a24a10a7"


@pytest.fixture(scope="module")
def train():
    return parts10.generate("train", 2000, seed=0)


def test_the_images_and_masks_of_a_seed_never_change(train):
    """And the first ones do not depend on how many are drawn."""
    image_set = parts10.generate("train", 300, seed=0)
    assert image_set.checksum == train.first(300).checksum == IMAGES_OF_SEED_0
    masks = image_set.part_masks.numpy().tobytes() + image_set.background.numpy().tobytes()
    assert hashlib.sha256(masks).hexdigest() == MASKS_OF_SEED_0
    others = [("train", 1), ("test", 0), ("test-shifted", 0)]
    assert len({parts10.generate(split, 300, seed).checksum for split, seed in others} | {IMAGES_OF_SEED_0}) == 4
    dataset = load_dataset("parts10", train_images=300, validation_images=50, test_images=20)
    assert dataset.splits["validation"].checksum == train.select(slice(300, 350)).checksum


def test_no_two_parts_confuse_the_same_classes():
    first, second = np.triu_indices(10, k=1)
    confused = parts10.COLOUR[:, first] == parts10.COLOUR[:, second]  # (4, pairs of classes)
    assert confused.sum() == 20 and confused.sum(axis=0).max() == 1
    assert (parts10.VARIANT[:, first] != parts10.VARIANT[:, second])[confused].all()


def test_masks_are_disjoint_and_every_bird_shows_a_part(train):
    assert (train.part_masks.sum(dim=1) + train.background.long()).max() == 1
    area = train.part_masks.sum(dim=(2, 3))
    assert area.amax(dim=1).min() >= 10
    # One part in four is always there; the others are with the rest of the probability.
    unseen = parts10.PART_MISSING + parts10.PART_HIDDEN
    assert (area > 10).float().mean().item() == pytest.approx(1 - 0.75 * unseen, abs=0.03)


@pytest.mark.parametrize("part", range(4), ids=parts10.PART_NAMES)
def test_each_part_alone_identifies_the_class(train, part):
    """The nearest class mean, over pixels under the mask of one part, where chance is 0.1."""
    test = parts10.generate("test", 500, seed=0)
    assert _accuracy(_cut_out(train, part), _cut_out(test, part)) > 0.65


def _accuracy(known, asked):
    """Of the nearest class mean; each of the two is features (B, F) and labels (B,)."""
    means = torch.stack([known[0][known[1] == label].mean(dim=0) for label in range(10)])
    return (torch.cdist(asked[0], means).argmin(dim=1) == asked[1]).float().mean()


def _cut_out(image_set, part):
    """Pixels of one part, black around it and centred, and the labels; where the part is seen."""
    seen = image_set.part_masks[:, part].sum(dim=(1, 2)) >= 12
    pictures = []
    for picture, mask in zip(image_set.images[seen], image_set.part_masks[seen, part], strict=True):
        down, right = (16 - mask.nonzero().double().mean(dim=0)).round().int().tolist()
        centred = torch.roll(picture * mask / 255, (down, right), dims=(1, 2))
        pictures.append(centred[:, 8:24, 8:24].flatten())
    return torch.stack(pictures), image_set.labels[seen]


@pytest.mark.parametrize("split, agreement", [("train", 0.8), ("test", 0.8), ("test-shifted", 0.1)])
def test_the_habitat_agrees_with_the_class_as_often_as_stated(split, agreement):
    """The habitat is read off the generator: it is drawn right after the labels."""
    habitats, labels = [], []
    for chunk in range(8):
        random = np.random.RandomState([0, list(parts10.AVAILABLE).index(split), chunk])
        labels.append(random.randint(0, 10, parts10.CHUNK))
        habitats.append(parts10._choose_habitats(random, labels[-1], split))
    agrees = np.concatenate(habitats) == np.concatenate(labels)
    assert agrees.mean() == pytest.approx(agreement, abs=0.03)
    assert len(np.unique(habitats)) == 10


def test_the_background_tells_the_class_unless_the_habitat_is_shifted(train):
    def background_of(rows):
        masks = rows.background[:, None].float()
        return (rows.images * masks).sum(dim=(2, 3)) / masks.sum(dim=(2, 3)), rows.labels

    test, shifted = (parts10.generate(split, 1000, 0) for split in ("test", "test-shifted"))
    assert _accuracy(background_of(train), background_of(test)) > 0.25
    assert _accuracy(background_of(train), background_of(shifted)) < 0.15
