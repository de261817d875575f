"""Batches: every image once, reproducible, and moved as torchvision would move them."""

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from immunity_lib.data import ImageSet
from immunity_lib.data.batches import affine_maps, cut_out, evaluation_batches, random_maps, resample, training_batches


@pytest.fixture
def image_set():
    return ImageSet(torch.randint(0, 256, (101, 3, 32, 32), dtype=torch.uint8), torch.arange(101))


@pytest.mark.parametrize(
    ("shift", "angle", "flip"),
    [((0, 0), 0.0, True), ((-2, 4), 0.0, False), ((0, 0), -15.0, False), ((0, 0), 4.0, False), ((3, 1), 90.0, True)],
)
def test_moves_are_torchvisions_shift_flip_and_rotation_in_this_order(images, shift, angle, flip):
    right, down = shift
    expected = reference.pad(images, 4)
    expected = reference.crop(expected, top=4 - down, left=4 - right, height=32, width=32)
    expected = reference.hflip(expected) if flip else expected
    expected = reference.rotate(expected, angle, InterpolationMode.BILINEAR)
    maps = affine_maps(torch.tensor([shift]) / 32, torch.tensor([angle]), torch.tensor([flip]))
    moved = resample(images, maps.expand(len(images), -1, -1))
    # Only at the border of rotated ones do the two differ: torchvision blends a mask of ones, too
    inner = slice(6, 26) if angle % 90 else slice(None)
    moved, expected = moved[..., inner, inner], expected[..., inner, inner]
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5, check_stride=False)


def test_every_move_is_drawn_and_another_for_each_image():
    """Over many images the maps spread as far as stated, and no further."""
    maps = random_maps(5000, torch.Generator().manual_seed(0), 15.0)
    shifts = (maps[:, :, 2] * -16).round().int()
    assert set(shifts.flatten().tolist()) == set(range(-4, 5))
    angles = torch.rad2deg(torch.atan2(maps[:, 1, 0], maps[:, 1, 1]))
    assert 14.9 < angles.max() <= 15.001 and -15.001 <= angles.min() < -14.9
    assert (maps[:, 0, 0] < 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert len(maps.unique(dim=0)) == 5000
    white = resample(torch.ones(5000, 3, 32, 32), maps)
    assert white.min() >= 0 and white.max() <= 1


@pytest.mark.parametrize("batch_size, sizes", [(50, [50, 50]), (33, [33, 33, 33, 2])])
def test_each_image_appears_once_per_epoch(image_set, batch_size, sizes):
    """Of 101 images, a last batch of one is dropped, and one of two is kept."""
    epoch = list(training_batches(image_set, batch_size, torch.Generator(), augment=False))
    assert [len(labels) for _, labels in epoch] == sizes
    images, labels = (torch.cat(parts) for parts in zip(*epoch, strict=True))
    assert len(labels.unique()) == sum(sizes)
    assert torch.equal((images * 255).round().byte(), image_set.images[labels])


def test_all_is_drawn_from_the_generator_by_the_call_and_in_this_order(image_set):
    drawn, generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    order = torch.randperm(101, generator=drawn)[:40]
    maps = random_maps(101, drawn, 9.0)[:40]
    centres, fill = torch.randint(0, 32, (101, 2), generator=drawn)[:40], (0.3, 0.2, 0.1)
    batches = training_batches(image_set, 40, generator, rotation=9.0, cutout=6, fill=fill)
    assert torch.equal(generator.get_state(), drawn.get_state())
    images, labels = next(batches)
    assert torch.equal(labels, order)
    moved = resample(image_set.images[order].float() / 255, maps)
    assert torch.equal(images, cut_out(moved, centres, 6, fill))
    assert images.is_contiguous(memory_format=torch.channels_last)
    _, next_epoch = next(training_batches(image_set, 40, generator))
    assert not torch.equal(next_epoch, labels)


def test_evaluation_is_in_order_and_unchanged_and_impossible_batch_sizes_are_named(image_set):
    images, labels = zip(*evaluation_batches(image_set, 50), strict=True)
    assert list(map(len, labels)) == [50, 50, 1]
    assert torch.equal(torch.cat(labels), image_set.labels)
    assert torch.equal(torch.cat(images), image_set.images / 255)
    assert images[0].is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="batch_size is 1;"):
        training_batches(image_set, 1, torch.Generator())
    with pytest.raises(ValueError, match="batch_size is 0;"):
        next(evaluation_batches(image_set, 0))


def test_images_of_another_type_or_shape_are_refused_with_what_they_must_be(image_set):
    """Floats would be divided by 255 where they lie, in the caller's own tensor."""
    for images in (image_set.images / 255, image_set.images.int()):
        with pytest.raises(ValueError, match=rf"images are {images.dtype}; .* torch.uint8: .*\(255 \* images\).round"):
            ImageSet(images, image_set.labels)
    of, to = image_set.images, image_set.labels
    for wrong in ((of[:, :1], to), (of.movedim(1, -1), to), (of, to[:7]), (of, to[:, None])):
        with pytest.raises(ValueError, match=r"shape .* and labels of shape .*; an ImageSet holds \(B, 3, 32, 32\)"):
            ImageSet(*wrong)
    for labels in (to.int(), to.double(), to - 1):
        with pytest.raises(ValueError, match=r"labels are .*, from .*; an ImageSet holds classes 0, 1, .* torch.int64"):
            ImageSet(of, labels)
    again = ImageSet((255 * (image_set.images / 255)).round().to(torch.uint8), image_set.labels)
    # C2: of fewer images than a notebook shows, all are taken
    assert again.checksum == image_set.first(102).checksum == image_set.checksum and len(image_set.first(3)) == 3


def test_cutout_hides_a_square_in_the_given_colour_and_nothing_else():
    images = torch.rand(3, 3, 32, 32)
    centres, fill = torch.tensor([[16, 10], [0, 31], [31, 3]]), (0.1, 0.2, 0.3)
    hidden = cut_out(images, centres, 8, fill)
    for image, before, (row, column) in zip(hidden, images, centres.tolist(), strict=True):
        expected = before.clone()  # against the loop of the published description
        for y in range(max(row - 4, 0), min(row + 4, 32)):
            for x in range(max(column - 4, 0), min(column + 4, 32)):
                expected[:, y, x] = torch.tensor(fill)
        assert torch.equal(image, expected)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 40))
def test_a_balanced_choice_shows_every_class_alike_however_few_of_it_are_taken(labels, count):
    images = ImageSet(torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8), torch.tensor(labels))
    rows = images.balanced(count)
    assert len(set(rows.tolist())) == min(count, len(labels))
    assert rows.tolist() == images.balanced(len(labels))[:count].tolist()
    chosen = Counter(labels[row] for row in rows.tolist())
    left = Counter(labels) - chosen
    for one, other in product(range(4), repeat=2):
        assert chosen[one] >= chosen[other] - 1 or not left[one], "there were more images of it"
    assert images.select(rows).labels.tolist() == [labels[row] for row in rows.tolist()]
