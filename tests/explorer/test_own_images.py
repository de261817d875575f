"""Images that readers bring: whatever they are, they fit, or are refused with a reason."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from immunity_lib.explorer import own_images
from immunity_lib.explorer.own_images import own_image

NOISE = np.random.RandomState(0).randint(0, 256, (48, 64, 4), np.uint8)


def encoded(picture, kind="PNG", **options):
    content = BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def test_a_fitting_image_is_taken_as_it_is():
    pixels = NOISE[:32, :32, :3]
    image, notes = own_image(encoded(Image.fromarray(pixels)), "mine.png")
    assert notes == []
    assert torch.equal(image, torch.from_numpy(pixels.transpose(2, 0, 1) / 255).float())


@pytest.mark.parametrize(
    ("picture", "kind", "notes"),
    [
        (Image.fromarray(NOISE[..., :3]), "JPEG", ["middle square", "64x48 pixels become 32x32"]),
        (Image.fromarray(NOISE[:32, :32, 0]), "PNG", ["mode L becomes RGB"]),
        (Image.fromarray(NOISE[:32, :32]), "PNG", ["transparency is dropped"]),
        (Image.fromarray(NOISE[:32, :32, :3]).convert("P"), "GIF", ["mode P becomes RGB"]),
        (Image.fromarray(NOISE[:32, :32]).convert("CMYK"), "JPEG", ["mode CMYK"]),
        (Image.fromarray(NOISE[:5, :5, :3]), "BMP", ["5x5 pixels become 32x32"]),
    ],
    ids=["large", "grey", "transparent", "palette", "print colours", "tiny"],
)
def test_another_size_or_mode_is_converted_with_a_note(picture, kind, notes):
    image, found = own_image(encoded(picture, kind), "mine")
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1
    for note in notes:
        assert any(note in one for one in found), found


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.fromarray(NOISE[:32, :32, k]) for k in range(3)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    _, notes = own_image(content, "moving.gif")
    assert "the first of its 3 frames is taken" in notes


def test_photographs_are_turned_upright():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image, _ = own_image(encoded(Image.fromarray(pixels), exif=exif.tobytes()), "photo.png")
    assert image[:, 16:].min() == 1 and image[:, :16].max() == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read as an image"),
        (encoded(Image.fromarray(NOISE))[:200], "cannot be read as an image"),
        (encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16))), "8 bits a channel"),
    ],
    ids=["empty", "not pixels", "cut off", "16 bits"],
)
def test_what_cannot_be_used_is_refused_with_a_reason(content, reason):
    with pytest.raises(ValueError, match=f"mine.dat.*{reason}"):
        own_image(content, "mine.dat")


def test_a_file_that_is_too_large_is_not_even_read(monkeypatch):
    monkeypatch.setattr(own_images, "LARGEST", 100)
    with pytest.raises(ValueError, match="at most 100"):
        own_image(encoded(Image.fromarray(NOISE)), "huge.png")
