"""The scores of section 5.2.1 and eqs (4)-(8), (10), against plain loops and their identities."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunity_lib import scores


def centres_by_loops(maps):
    images, experts, height, width = maps.shape
    centres = np.zeros((images, experts, 2))
    for q, i, a, b in np.ndindex(images, experts, height, width):
        centres[q, i] += np.array([a, b]) * maps[q, i, a, b]
    return centres


def independence_by_loops(maps):
    images, experts = maps.shape[:2]
    total = 0.0
    for q, i, j in np.ndindex(images, experts, experts):
        total += ((maps[q, i] - maps[q, j]) ** 2).sum()
    return total / (experts * (experts - 1)) / images


def causality_by_loops(maps):
    images, experts = maps.shape[:2]
    centres, total = centres_by_loops(maps), 0.0
    for i, j in np.ndindex(experts, experts):
        distances = [((centres[q, i] - centres[q, j]) ** 2).sum() for q in range(images)]
        total += sum((distance - np.mean(distances)) ** 2 for distance in distances)
    return total / images


def information_by_loops(maps):
    """I(C, E) = sum_c,e p(c, e) log(p(c, e) / p(c) p(e)), mean over images."""
    images, experts, height, width = maps.shape
    total = 0.0
    for q, i, a, b in np.ndindex(images, experts, height, width):
        joint = maps[q, i, a, b] / experts
        if joint > 0:
            total += joint * math.log(joint / (maps[q, :, a, b].mean() / experts))
    return total / images


@pytest.mark.parametrize(
    ("score", "by_loops"),
    [
        (scores.centre_of_mass, centres_by_loops),
        (scores.independence_score, independence_by_loops),
        (scores.causality_score, causality_by_loops),
        (scores.mutual_information, information_by_loops),
    ],
)
@given(data=st.data())
def test_scores_are_what_plain_loops_give(heat_maps, score, by_loops, data):
    maps = data.draw(heat_maps)
    expected = torch.as_tensor(by_loops(maps.numpy()))
    torch.testing.assert_close(score(maps), expected, rtol=1e-9, atol=1e-11)


@given(data=st.data())
def test_relabelling_the_experts_changes_no_score(heat_maps, data):
    maps = data.draw(heat_maps)
    order = data.draw(st.permutations(range(maps.shape[1])))
    permuted = maps[:, order]
    for score in (scores.independence_score, scores.causality_score, scores.mutual_information):
        torch.testing.assert_close(score(permuted), score(maps), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        scores.centre_of_mass(permuted), scores.centre_of_mass(maps)[:, order]
    )


@given(data=st.data())
def test_information_lies_between_zero_and_log_n(heat_maps, data):
    maps = data.draw(heat_maps)
    information = scores.mutual_information(maps).item()
    assert -1e-12 <= information <= math.log(maps.shape[1]) + 1e-12


def test_a_single_hot_pixel_is_its_own_centre():
    maps = torch.zeros(32 * 32, 1, 32, 32)
    for image, (a, b) in enumerate(itertools.product(range(32), range(32))):
        maps[image, 0, a, b] = 1
    pixels = torch.tensor(list(itertools.product(range(32), range(32)))).float()
    torch.testing.assert_close(scores.centre_of_mass(maps)[:, 0], pixels)
    torch.testing.assert_close(scores.centre_of_mass(maps, "unit")[:, 0], pixels / 31)


def test_disjoint_and_equal_maps_are_the_extremes_of_the_independence_score():
    """Two one-pixel maps differ by 1 at each of two pixels; equal maps do not differ."""
    apart = torch.eye(3).reshape(1, 3, 1, 3)
    assert scores.independence_score(apart).item() == 2
    assert scores.independence_score(apart[:, :1].expand(1, 3, 1, 3)).item() == 0


def test_a_single_expert_is_neither_independent_nor_unsteady():
    maps = torch.full((2, 1, 4, 4), 1 / 16)
    assert scores.independence_score(maps).item() == 0
    assert scores.causality_score(maps).item() == 0
    assert scores.mutual_information(maps).item() == 0


def test_unknown_coordinates_name_the_valid_ones():
    with pytest.raises(ValueError, match="pixels, unit; got 'metres'"):
        scores.centre_of_mass(torch.ones(1, 1, 2, 2) / 4, "metres")
