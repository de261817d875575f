"""Losses and scores, eqs (2) and (4)-(12) and section 5.2.1, against plain loops and their identities."""

import importlib
import inspect
import math
import pkgutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import draw_outputs, heat_maps
from hypothesis import given
from hypothesis import strategies as st

import immunity_lib
from immunity_lib import losses, scores
from immunity_lib.recipe import Recipe


def cross_entropy_by_loops(outputs, labels, alpha):
    """Eq (2), mean over the batch."""
    total = 0.0
    for q, label in enumerate(labels):
        probabilities = [np.exp(f) / np.exp(f).sum() for f in outputs.logits[q].numpy()]
        mixture = sum(g * p[label] for g, p in zip(outputs.gate[q], probabilities, strict=True))
        total -= math.log(mixture) + alpha * sum(math.log(p[label]) for p in probabilities)
    return total / len(labels)


def mutual_information_by_loops(maps):
    """Eq (9), of each image."""
    totals = np.zeros(len(maps))
    for q, i, a, b in np.ndindex(maps.shape):
        if (h := maps[q, i, a, b]) > 0:
            totals[q] -= h * math.log(h / maps[q, :, a, b].sum())
    return totals


def centres_by_loops(maps):
    """Eq (10), in pixels."""
    centres = np.zeros((*maps.shape[:2], 2))
    for q, i, a, b in np.ndindex(maps.shape):
        centres[q, i] += maps[q, i, a, b] * np.array([a, b])
    return centres


def position_stability_by_loops(maps, scale=1.0):
    """Eq (11), each image's part of its sum."""
    (images, experts), centres = maps.shape[:2], scale * centres_by_loops(maps)
    parts = np.zeros(images)
    for i, j in np.ndindex(experts, experts):
        distances = np.array([((centres[q, i] - centres[q, j]) ** 2).sum() for q in range(images)])
        parts += (distances - distances.mean()) ** 2
    return parts


def independence_by_loops(maps):
    """The IScore of each image."""
    images, experts = maps.shape[:2]
    totals = np.zeros(images)
    for q, i, j in np.ndindex(images, experts, experts):
        totals[q] += ((maps[q, i] - maps[q, j]) ** 2).sum()
    return totals / (experts * (experts - 1))


@given(maps=heat_maps())
def test_losses_and_scores_of_maps_are_what_plain_loops_give(maps):
    """Image by image, too. The CScore is the mean over the images of what eq (11) is the sum of."""
    known, experts = maps.numpy(), maps.shape[1]
    loss, stability = mutual_information_by_loops(known), position_stability_by_loops(known)
    independence, information = independence_by_loops(known), math.log(experts) - loss / experts
    for found, expected in (
        (losses.mutual_information_loss(maps), loss.mean()),
        (losses.position_stability_loss(maps), position_stability_by_loops(known, 1 / 4).sum()),
        (losses.position_stability_loss(maps, "pixels"), stability.sum()),
        (scores.causality_by_image(maps), stability), (scores.causality_score(maps), stability.mean()),
        (scores.independence_by_image(maps), independence), (scores.independence_score(maps), independence.mean()),
        (scores.information_by_image(maps), information), (scores.mutual_information(maps), information.mean()),
    ):  # fmt: skip
        assert found.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-11)
    centres = torch.from_numpy(centres_by_loops(known))
    torch.testing.assert_close(scores.centre_of_mass(maps, "pixels"), centres)
    torch.testing.assert_close(scores.centre_of_mass(maps), centres / 4)


@given(maps=heat_maps())
def test_mutual_information_loss_is_n_log_n_less_n_times_the_information(maps):
    """N log N where all maps are equal, 0 where they are disjoint."""
    experts, most = maps.shape[1], maps.shape[1] * math.log(maps.shape[1])
    loss, information = losses.mutual_information_loss(maps), scores.mutual_information(maps)
    assert loss.item() == pytest.approx(most - experts * information.item(), abs=1e-10)
    assert -1e-10 <= loss.item() <= most + 1e-10
    equal = maps[:, :1].expand_as(maps)
    assert losses.mutual_information_loss(equal).item() == pytest.approx(most)
    apart = torch.diag_embed(maps.flatten(2).movedim(1, -1)).movedim(-1, 1)  # a lane per expert
    assert losses.mutual_information_loss(apart).item() == pytest.approx(0, abs=1e-12)


@given(
    maps=heat_maps(), alpha=st.sampled_from([0.0, 0.3, 1.0]), beta=st.sampled_from([0.0, 0.5]),
    gamma=st.sampled_from([0.0, 7.0]), coordinates=st.sampled_from(scores.COORDINATES),
)  # fmt: skip
def test_total_is_eq_12(maps, alpha, beta, gamma, coordinates):
    """(1/B) { sum_q CE + (beta/N) sum_q MI + gamma/(N (N - 1)) PS }."""
    images, experts = maps.shape[:2]
    outputs, labels = draw_outputs(0, experts, images=images), torch.tensor([0, 4, 2])[:images]
    weights = {"alpha": alpha, "beta": beta, "gamma": gamma, "coordinates": coordinates}
    loss = losses.immunity_loss(outputs, labels, maps, **weights)
    cross_entropy = cross_entropy_by_loops(outputs, labels, alpha)
    information = mutual_information_by_loops(maps.numpy()).mean()
    stability = position_stability_by_loops(maps.numpy(), 1 / 4 if coordinates == "unit" else 1.0).sum()
    total = cross_entropy + beta / experts * information + gamma / (experts * (experts - 1)) * stability / images
    assert loss.total.item() == pytest.approx(total, rel=1e-12)
    assert loss.cross_entropy.item() == pytest.approx(cross_entropy)
    assert loss.mutual_information.item() == pytest.approx(information if beta else 0)
    assert loss.position_stability.item() == pytest.approx(stability if gamma else 0)


def test_A2_neighbours_a_function_s_default_is_the_recipe_s():
    """But for the floor, which training has and the one fixed reading has not."""
    defaults, different = {field.name: field.default for field in fields(Recipe)}, set()
    for module in pkgutil.walk_packages(immunity_lib.__path__, "immunity_lib."):
        for function in vars(importlib.import_module(module.name)).values():
            if inspect.isfunction(function) and function.__module__ == module.name:
                for name, parameter in inspect.signature(function).parameters.items():
                    if parameter.default not in (parameter.empty, defaults.get(name, parameter.default)):
                        different.add((function.__name__, name))
    assert different == {("expert_heatmaps", "floor"), ("normalise_maps", "floor")}


def test_heat_map_terms_need_maps_and_coordinates_that_there_are():
    with pytest.raises(ValueError, match="pixels, unit; got 'metres'"):
        scores.centre_of_mass(torch.ones(1, 2, 5, 5), "metres")
    for beta, gamma in ((0.5, 0.0), (0.0, 2.0)):
        with pytest.raises(ValueError, match=f"beta = {beta} and gamma = {gamma} need"):
            losses.immunity_loss(draw_outputs(0), torch.arange(4), None, alpha=1, beta=beta, gamma=gamma)


def test_disjoint_pixels_have_independence_2_and_a_single_expert_scores_nothing():
    apart = torch.eye(3).reshape(1, 3, 1, 3)
    assert scores.independence_score(apart).item() == 2
    for score in (scores.independence_score, scores.causality_score, scores.mutual_information):
        assert score(torch.full((2, 1, 4, 4), 1 / 16)).item() == 0


def test_the_gradient_of_information_is_finite_where_no_expert_has_heat():
    """As in maps of one's own, behind a ReLU."""
    disjoint = torch.zeros(2, 2, 8, 8)
    disjoint[:, 0, 0, 0] = disjoint[:, 1, 7, 7] = 1
    for maps in (disjoint, disjoint[:, :1], disjoint[:, [0, 0]], 0 * disjoint):
        maps = maps.clone().requires_grad_()
        (losses.mutual_information_loss(maps) + scores.mutual_information(maps)).backward()
        assert maps.grad.isfinite().all()
