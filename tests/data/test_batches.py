"""Batches: every image once, reproducible, and moved as torchvision would move them."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from immunity_lib.data import ImageSet
from immunity_lib.data.batches import (
    affine_maps,
    augment_batch,
    cut_out,
    evaluation_batches,
    resample,
    training_batches,
)


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def image_set():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (101, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(101))


def _move(images, shift=(0, 0), angle=0.0, flip=False):
    count = len(images)
    maps = affine_maps(
        shifts=torch.tensor([shift] * count) / 32,
        angles=torch.full((count,), angle),
        flipped=torch.full((count,), flip),
    )
    return resample(images, maps)


def _same(moved, expected):
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5, check_stride=False)


def test_no_move_leaves_images_unchanged(images):
    _same(_move(images), images)


def test_flip_is_torchvisions(images):
    _same(_move(images, flip=True), reference.hflip(images))


@pytest.mark.parametrize("right, down", [(4, 0), (0, -3), (-2, 4)])
def test_shift_is_a_crop_of_the_padded_image(images, right, down):
    padded = reference.pad(images, 4)
    expected = reference.crop(padded, top=4 - down, left=4 - right, height=32, width=32)
    _same(_move(images, shift=(right, down)), expected)


@pytest.mark.parametrize("angle", [-15.0, 4.0, 90.0])
def test_rotation_is_torchvisions(images, angle):
    expected = reference.rotate(images, angle, InterpolationMode.BILINEAR)
    moved = _move(images, angle=angle)
    # Only at the border do the two differ: torchvision blends a mask of ones as well.
    _same(moved[:, :, 6:-6, 6:-6], expected[:, :, 6:-6, 6:-6])


def test_moves_are_in_the_order_shift_flip_rotate(images):
    moved = _move(images, shift=(3, 1), angle=90.0, flip=True)
    shifted = reference.crop(reference.pad(images, 4), top=3, left=1, height=32, width=32)
    _same(moved, reference.rotate(reference.hflip(shifted), 90.0))


def test_augmentation_differs_between_images_and_stays_in_range(images):
    same_image = images[:1].expand(32, -1, -1, -1)
    augmented = augment_batch(same_image, torch.Generator().manual_seed(0))
    assert len({tuple(image.flatten().tolist()) for image in augmented}) == 32
    assert augmented.min() >= 0 and augmented.max() <= 1
    white = augment_batch(torch.ones(64, 3, 32, 32), torch.Generator().manual_seed(1))
    assert white.max() <= 1


@pytest.mark.parametrize("batch_size, sizes", [(50, [50, 50]), (33, [33, 33, 33, 2])])
def test_each_image_appears_once_per_epoch(image_set, batch_size, sizes):
    """Of 101 images, a last batch of one is dropped, and one of two is kept."""
    epoch = list(training_batches(image_set, batch_size, torch.Generator(), augment=False))
    assert [len(labels) for _, labels in epoch] == sizes
    images, labels = (torch.cat(parts) for parts in zip(*epoch, strict=True))
    assert len(labels.unique()) == sum(sizes)
    assert torch.equal((images * 255).round().byte(), image_set.images[labels])


def test_training_resumes_bit_identically_from_the_generators_state(image_set):
    generator = torch.Generator().manual_seed(5)
    list(training_batches(image_set, 32, generator))
    state = generator.get_state()
    second_epoch = list(training_batches(image_set, 32, generator))
    resumed = list(training_batches(image_set, 32, torch.Generator().set_state(state)))
    for (images, labels), (images_again, labels_again) in zip(second_epoch, resumed, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_skipped_batches_leave_the_others_and_the_generator_as_they_were(image_set):
    whole, resumed = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    every = training_batches(image_set, 32, whole, cutout=8)
    rest = training_batches(image_set, 32, resumed, cutout=8, skipped=2)
    assert torch.equal(whole.get_state(), resumed.get_state())  # all is drawn by the call
    for (images, labels), (images_again, labels_again) in zip(list(every)[2:], rest, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_epochs_differ(image_set):
    generator = torch.Generator().manual_seed(5)
    orders = [
        torch.cat([labels for _, labels in training_batches(image_set, 32, generator)])
        for _ in range(2)
    ]
    assert not torch.equal(*orders)


def test_every_move_is_drawn(image_set):
    """Over many images the maps spread as far as stated, and no further."""
    from immunity_lib.data.batches import _random_maps

    maps = _random_maps(5000, torch.Generator().manual_seed(0), 15.0)
    shifts = (maps[:, :, 2] * -16).round().int()
    assert set(shifts.flatten().tolist()) == set(range(-4, 5))
    angles = torch.rad2deg(torch.atan2(maps[:, 1, 0], maps[:, 1, 1]))
    assert 14.9 < angles.max() <= 15.001 and -15.001 <= angles.min() < -14.9
    assert (maps[:, 0, 0] < 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_training_images_are_channels_last_in_range(image_set):
    images, _ = next(training_batches(image_set, 32, torch.Generator()))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1


def test_evaluation_is_in_order_and_unchanged(image_set):
    batches = list(evaluation_batches(image_set, 50))
    assert [len(labels) for _, labels in batches] == [50, 50, 1]
    assert torch.equal(torch.cat([labels for _, labels in batches]), image_set.labels)
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, image_set.images / 255)
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def test_impossible_batch_sizes_are_named(image_set):
    with pytest.raises(ValueError, match="batch_size is 1;"):
        next(training_batches(image_set, 1, torch.Generator()))
    with pytest.raises(ValueError, match="batch_size is 0;"):
        next(evaluation_batches(image_set, 0))


def test_cutout_hides_a_square_in_the_given_colour_and_nothing_else():
    images = torch.rand(3, 3, 32, 32)
    centres = torch.tensor([[16, 10], [0, 31], [31, 3]])
    fill = (0.1, 0.2, 0.3)
    hidden = cut_out(images, centres, 8, fill)
    for image, before, (row, column) in zip(hidden, images, centres.tolist(), strict=True):
        expected = before.clone()  # against the loop of the published description
        for y in range(max(row - 4, 0), min(row + 4, 32)):
            for x in range(max(column - 4, 0), min(column + 4, 32)):
                expected[:, y, x] = torch.tensor(fill)
        assert torch.equal(image, expected)


def test_cutout_and_rotation_are_asked_for(dataset):
    def first_batch(**options):
        generator = torch.Generator().manual_seed(5)
        return next(training_batches(dataset.splits["train"], 16, generator, **options))[0]

    fill = (0.11, 0.22, 0.33)
    places = (first_batch(augment=False, cutout=8, fill=fill) - first_batch(augment=False)) != 0
    shown = first_batch(augment=False, cutout=8, fill=fill).movedim(1, -1)[places.any(1)]
    assert torch.equal(shown, torch.tensor(fill).expand_as(shown))
    assert not torch.equal(first_batch(rotation=0.0), first_batch())
    whole = first_batch(rotation=0.0)  # without a rotation, pixels move by whole steps
    assert torch.equal((whole * 255).round() / 255, whole)
