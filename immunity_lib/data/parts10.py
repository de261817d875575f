"""Parts-10: birds made of parts, generated from a seed, with the truth about every pixel.

The paper argues that experts should look at different parts of an object, and not at its surroundings. Here both can
be measured. A bird is a body that says nothing about its class, and four parts of which each says it all: the colour
of a part narrows the class down to two, its shape or texture decides, and no two parts pair the classes in the same
way. Parts can be missing or hidden behind leaves, so it pays to know several. Each class has a habitat, where the
bird is seen with probability `HABITAT_AGREEMENT`; in the split "test-shifted", all ten are equally likely.

Pixels are the same on every machine: numpy freezes the streams of `RandomState`, and only operations whose rounding
IEEE 754 fixes are used (+, -, *, /, sqrt, floor, comparisons).
"""

import numpy as np
import torch

from immunity_lib.data.batches import ImageSet

CLASS_NAMES = (
    "ashwing", "bramblet", "cinderjay", "dunlark", "emberfinch",
    "fernling", "glimmertail", "hollowren", "inkcrest", "junodove",
)  # fmt: skip
PART_NAMES = ("head", "wing", "tail", "feet")
AVAILABLE = {"train": 6500, "test": 2000, "test-shifted": 2000}
HABITAT_AGREEMENT = 0.8
PART_MISSING, PART_HIDDEN = 0.3, 0.2

# Of each part (rows) and class (digits): its colour, and which of its two variants it has.
COLOUR = np.array([[*"0123401234"], [*"1133004422"], [*"2424010313"], [*"3240211043"]], int)
VARIANT = np.array([[*"0000011111"], [*"0101010101"], [*"0011001011"], [*"0000101111"]], int) == 1
# Colours are (3, 1, 1), as images have their channels.
PART_COLOURS = np.float32(
    [[0.85, 0.18, 0.15], [0.95, 0.78, 0.15], [0.15, 0.35, 0.85], [0.93, 0.92, 0.90], [0.55, 0.18, 0.60]]
)[..., None, None]
LEAF_COLOUR = np.float32([0.3, 0.45, 0.18])[:, None, None]
HABITAT_COLOURS = np.float32([
    [0.35, 0.50, 0.25], [0.60, 0.50, 0.30], [0.40, 0.55, 0.65], [0.50, 0.50, 0.50],
    [0.25, 0.42, 0.40], [0.62, 0.58, 0.48], [0.45, 0.35, 0.28], [0.55, 0.62, 0.38],
    [0.38, 0.38, 0.52], [0.62, 0.48, 0.48],
])[..., None, None]  # fmt: skip
# How many stripes of a habitat 32 pixels cross, along x and along y.
HABITAT_STRIPES = np.float32([[4, 0, 3, 3, 5, 2, 5, 2, 0, 6], [0, 4, 3, -3, 2, 5, -2, -5, 6, 0]])
# The leaf that can hide each part: its centre and radii (x, y), in pixels from the centre of a bird that looks to the
# right (y points down).
LEAVES = ((7.0, -5.5, 5.0, 6.5), (-1.5, -1.5, 6.8, 5.2), (-9.5, -1.0, 5.2, 6.2), (0.0, 7.5, 6.6, 5.0))
CHUNK = 250  # images drawn together, from one stream: the first k are the same for any count
GRID_Y, GRID_X = np.mgrid[0:32, 0:32].astype(np.float32)


def generate(split: str, count: int, seed: int) -> ImageSet:
    """The first `count` images of a split, with the masks of their parts and of the background."""
    streams = [[seed, list(AVAILABLE).index(split), chunk] for chunk in range(-(-count // CHUNK))]
    chunks = [_draw_chunk(np.random.RandomState(stream), split) for stream in streams]
    arrays = (np.concatenate(rows)[:count] for rows in zip(*chunks, strict=True))
    return ImageSet(*map(torch.from_numpy, arrays))


def _draw_chunk(random: np.random.RandomState, split: str) -> tuple[np.ndarray, ...]:
    """CHUNK images, their labels, part masks and background masks."""
    labels = random.randint(0, len(CLASS_NAMES), CHUNK)
    image = _draw_habitats(random, _choose_habitats(random, labels, split))

    # Which parts are there, and which of them behind a leaf; one of them is surely seen.
    fate = random.random_sample((4, CHUNK, 1, 1))
    surely_seen = random.randint(0, 4, CHUNK), np.arange(CHUNK)
    fate[surely_seen] = 1
    there, seen = fate >= PART_MISSING, fate >= PART_MISSING + PART_HIDDEN
    variants = VARIANT[:, labels, None, None]
    colours = PART_COLOURS[COLOUR[:, labels]] + _uniform(random, -0.2, 0.2, 4, CHUNK, 3, 1, 1)
    grey = _uniform(random, 0.3, 0.6, CHUNK, 1, 1, 1)
    body_colour = grey + _uniform(random, -0.06, 0.06, CHUNK, 3, 1, 1)
    leaf_colour = LEAF_COLOUR + _uniform(random, -0.1, 0.1, CHUNK, 3, 1, 1)

    # Every pixel (B, 32, 32) as seen from a bird of random place, size and pose.
    centre_x, centre_y = _uniform(random, 13.5, 17.5, 2, CHUNK, 1, 1)
    facing = np.where(random.random_sample((CHUNK, 1, 1)) < 0.5, -1, 1).astype(np.float32)
    size = _uniform(random, 0.85, 1.1, CHUNK, 1, 1)
    x = (GRID_X - centre_x) * facing / size
    y = (GRID_Y - centre_y) / size + _uniform(random, -0.2, 0.2, CHUNK, 1, 1) * x

    shapes = _part_shapes(x, y, variants) * there
    leaves = np.max([_ellipse(x, y, *leaf) for leaf in LEAVES] * (there & ~seen), axis=0)
    wing_bars = 0.45 + 0.75 * _wave(np.where(variants[1], x, y + 0.25 * x) / 4)  # across or along
    layers = {  # from the bottom to the top
        "tail": (shapes[2], colours[2]), "feet": (shapes[3], colours[3]),
        "body": (_ellipse(x, y, 0, 0, 7.0, 5.0), body_colour),
        "wing": (shapes[1], colours[1] * wing_bars[:, None]), "head": (shapes[0], colours[0]),
        "leaves": (leaves * (1 - shapes[surely_seen]), leaf_colour),
    }  # fmt: skip
    masks = {}
    for name, (shape, colour) in layers.items():
        _paint(image, shape, colour)
        if name == "head":
            _paint(image, _ellipse(x, y, 8.2, -6.2, 1.0, 1.0) * shape, 0.05)  # its eye
        for below in masks.values():
            below &= shape < 0.5
        masks[name] = shape >= 0.5
    part_masks = np.stack([masks[name] for name in PART_NAMES], axis=1)
    background = ~(part_masks.any(axis=1) | masks["body"])

    # A photograph, under random light and with a sensor's noise.
    contrast = _uniform(random, 0.75, 1.1, CHUNK, 1, 1, 1)
    tint = _uniform(random, -0.08, 0.08, CHUNK, 3, 1, 1)
    noise = _uniform(random, -0.08, 0.08, *image.shape)
    exposed = (image - 0.5) * contrast + 0.5 + tint + noise
    return np.floor(exposed.clip(0, 1) * 255 + 0.5).astype(np.uint8), labels, part_masks, background


def _choose_habitats(random: np.random.RandomState, labels: np.ndarray, split: str) -> np.ndarray:
    any_habitat = random.randint(0, 10, CHUNK)
    another = (labels + random.randint(1, 10, CHUNK)) % 10
    agrees = random.random_sample(CHUNK) < HABITAT_AGREEMENT
    return any_habitat if split == "test-shifted" else np.where(agrees, labels, another)


def _part_shapes(x: np.ndarray, y: np.ndarray, variants: np.ndarray) -> np.ndarray:
    """Opacities (4, B, 32, 32) of head, wing, tail and feet, in [0, 1]."""
    # A round head, with a crest or without.
    crest = _edge(np.minimum(2.0 - abs(x - 6.5 - 0.2 * y), y + 12)) * (variants[0] & (y < -5))
    head = np.maximum(_ellipse(x, y, 7.0, -5.0, 3.9, 3.7), crest)
    wing = _ellipse(x, y + 0.25 * x, -1.5, -1.5, 5.6, 3.6)
    # The tail fans out, with a notch or without.
    along, beside = -5.5 - x, abs(y + 1)
    fan = np.minimum(np.minimum(along, 8 - along), 1.2 + 0.45 * along - beside)
    tail = _edge(np.minimum(fan, np.where(variants[2], beside - 0.9 * (along - 3), 2)))
    # Two legs that end in webs or in claws.
    leg = abs(abs(x) - 3)
    webbed = 0.7 + 0.42 * (y - 4) - leg
    clawed = np.maximum(1.0 - leg, np.minimum(2.8 - leg, y - 8.5))
    length = np.minimum(y - 4, 10.5 - y)
    feet = _edge(np.minimum(length, np.where(variants[3], webbed, clawed)))
    return np.stack([head, wing, tail, feet])


def _draw_habitats(random: np.random.RandomState, habitats: np.ndarray) -> np.ndarray:
    """Backgrounds (B, 3, 32, 32): the hue and stripes of a habitat, and pebbles that mislead."""
    across, down = HABITAT_STRIPES[:, habitats, None, None] / 32
    stripes = _wave(across * GRID_X + down * GRID_Y + _uniform(random, 0, 1, CHUNK, 1, 1))
    blotches = _uniform(random, -0.12, 0.12, CHUNK, 8, 8).repeat(4, axis=1).repeat(4, axis=2)
    light = 0.75 + 0.3 * stripes + blotches
    image = HABITAT_COLOURS[habitats] * light[:, None]
    for _ in range(3):
        x, y = _uniform(random, 0, 32, 2, CHUNK, 1, 1)
        radius = _uniform(random, 1.2, 2.8, CHUNK, 1, 1)
        colour = PART_COLOURS[random.randint(0, len(PART_COLOURS), CHUNK)]
        _paint(image, _ellipse(GRID_X, GRID_Y, x, y, radius, radius), colour)
    return image


def _uniform(random: np.random.RandomState, low: float, high: float, *shape: int) -> np.ndarray:
    return (low + (high - low) * random.random_sample(shape)).astype(np.float32)


def _paint(image: np.ndarray, opacity: np.ndarray, colour: np.ndarray | float) -> None:
    """Lay a colour over images (B, 3, 32, 32), in place; opacity (B, 32, 32) in [0, 1]."""
    image += opacity[:, None] * (colour - image)


def _ellipse(x: np.ndarray, y: np.ndarray, centre_x, centre_y, radius_x, radius_y) -> np.ndarray:
    """Opacity of an ellipse on a grid of coordinates x and y."""
    across, down = (x - centre_x) / radius_x, (y - centre_y) / radius_y
    distance = np.sqrt(across * across + down * down)
    return _edge((1 - distance) * np.minimum(radius_x, radius_y))


def _edge(inside: np.ndarray) -> np.ndarray:
    """Opacity of a shape from the distance (in pixels) by which a pixel lies inside it."""
    return (inside + 0.5).clip(0, 1)


def _wave(turns: np.ndarray) -> np.ndarray:
    """A triangle wave in [0, 1] of period 1."""
    return abs(2 * (turns - np.floor(turns)) - 1)
