"""The scores of section 5.2.1 and eqs (4)-(8), (10), against plain loops and their identities."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunity_lib import losses, scores


def centres_by_loops(maps):
    centres = np.zeros((*maps.shape[:2], 2))
    for q, i, a, b in np.ndindex(maps.shape):
        centres[q, i] += np.array([a, b]) * maps[q, i, a, b]
    return centres


def independence_by_loops(maps):
    images, experts = maps.shape[:2]
    total = 0.0
    for q, i, j in np.ndindex(images, experts, experts):
        total += ((maps[q, i] - maps[q, j]) ** 2).sum()
    return total / (experts * (experts - 1)) / images


@given(data=st.data())
def test_scores_are_what_plain_loops_give(heat_maps, data):
    maps = data.draw(heat_maps)
    centres = torch.from_numpy(centres_by_loops(maps.numpy()))
    torch.testing.assert_close(scores.centre_of_mass(maps, "pixels"), centres)
    torch.testing.assert_close(scores.centre_of_mass(maps), centres / 4)
    independence = scores.independence_score(maps).item()
    assert independence == pytest.approx(independence_by_loops(maps.numpy()), rel=1e-9, abs=1e-11)
    # Eq (11) is the sum over the batch of what the CScore is the mean of; the information is
    # tested with eq (9)
    stability = losses.position_stability_loss(maps, "pixels").item()
    expected = pytest.approx(stability / len(maps), rel=1e-9, abs=1e-11)
    assert scores.causality_score(maps).item() == expected


@given(data=st.data())
def test_relabelling_the_experts_changes_neither_scores_nor_losses(heat_maps, data):
    maps = data.draw(heat_maps)
    order = data.draw(st.permutations(range(maps.shape[1])))
    permuted = maps[:, order]
    for score in (
        scores.independence_by_image, scores.causality_by_image, scores.information_by_image,
        losses.mutual_information_loss, losses.position_stability_loss,
    ):  # fmt: skip
        torch.testing.assert_close(score(permuted), score(maps), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(scores.centre_of_mass(permuted), scores.centre_of_mass(maps)[:, order])


@given(data=st.data())
def test_scores_are_the_means_of_what_is_said_of_each_image(heat_maps, data):
    """Of one image alone, too, save the causality score, which compares images."""
    maps = data.draw(heat_maps)
    for score, by_image in (
        (scores.causality_score, scores.causality_by_image),
        (scores.independence_score, scores.independence_by_image),
        (scores.mutual_information, scores.information_by_image),
    ):
        torch.testing.assert_close(by_image(maps).mean(), score(maps))
        if by_image is not scores.causality_by_image:
            alone = torch.cat([by_image(one[None]) for one in maps])
            torch.testing.assert_close(alone, by_image(maps), rtol=1e-9, atol=1e-11)


def test_disjoint_pixels_have_independence_2_and_a_single_expert_scores_nothing():
    apart = torch.eye(3).reshape(1, 3, 1, 3)
    assert scores.independence_score(apart).item() == 2
    for score in (scores.independence_score, scores.causality_score, scores.mutual_information):
        assert score(torch.full((2, 1, 4, 4), 1 / 16)).item() == 0


def test_unknown_coordinates_name_the_valid_ones():
    with pytest.raises(ValueError, match="pixels, unit; got 'metres'"):
        scores.centre_of_mass(torch.ones(1, 1, 2, 2) / 4, "metres")
