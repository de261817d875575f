"""The losses of eqs (2), (9), (11) and (12), against plain loops and their identities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from immunity_lib import losses, scores
from immunity_lib.moe import ExpertOutputs


def cross_entropy_by_loops(logits, gate, labels, alpha):
    """Eq (2), mean over the batch; logits (B, N, C), gate (B, N)."""
    total = 0.0
    for q, label in enumerate(labels):
        probabilities = [np.exp(f) / np.exp(f).sum() for f in logits[q]]
        mixture = sum(g * p[label] for g, p in zip(gate[q], probabilities, strict=True))
        total -= math.log(mixture) + alpha * sum(math.log(p[label]) for p in probabilities)
    return total / len(labels)


def mutual_information_by_loops(maps):
    """Eq (9), mean over the batch."""
    total = 0.0
    for q, i, a, b in np.ndindex(maps.shape):
        h = maps[q, i, a, b]
        if h > 0:
            total -= h * math.log(h / maps[q, :, a, b].sum())
    return total / len(maps)


def position_stability_by_loops(maps, scale=1.0):
    """Eq (11), its sum over the batch."""
    images, experts, height, width = maps.shape
    centres = np.zeros((images, experts, 2))
    for q, i, a, b in np.ndindex(maps.shape):
        centres[q, i] += scale * maps[q, i, a, b] * np.array([a, b])
    total = 0.0
    for i, j in np.ndindex(experts, experts):
        distances = np.array([((centres[q, i] - centres[q, j]) ** 2).sum() for q in range(images)])
        total += ((distances - distances.mean()) ** 2).sum()
    return total


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    log_gate = torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(1)
    return ExpertOutputs(logits, log_gate, ())


LABELS = torch.tensor([0, 4, 2, 2])


@given(data=st.data())
def test_heat_map_losses_are_what_plain_loops_give(heat_maps, data):
    maps = data.draw(heat_maps)
    for loss, expected in (
        (losses.mutual_information_loss(maps), mutual_information_by_loops(maps.numpy())),
        (losses.position_stability_loss(maps), position_stability_by_loops(maps.numpy())),
        (
            losses.position_stability_loss(maps, "unit"),
            position_stability_by_loops(maps.numpy(), scale=1 / 4),
        ),
    ):
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@given(data=st.data())
def test_mutual_information_loss_is_n_log_n_less_n_times_the_information(heat_maps, data):
    maps = data.draw(heat_maps)
    experts, loss = maps.shape[1], losses.mutual_information_loss(maps).item()
    information = scores.mutual_information(maps).item()
    assert loss == pytest.approx(experts * (math.log(experts) - information), abs=1e-10)
    assert -1e-10 <= loss <= experts * math.log(experts) + 1e-10


@given(data=st.data())
def test_mutual_information_loss_of_equal_maps_is_n_log_n(heat_maps, data):
    maps = data.draw(heat_maps)
    equal, experts = maps[:, :1].expand_as(maps), maps.shape[1]
    loss = losses.mutual_information_loss(equal).item()
    assert loss == pytest.approx(experts * math.log(experts))


@given(data=st.data())
def test_mutual_information_loss_of_disjoint_maps_is_zero(heat_maps, data):
    maps = data.draw(heat_maps)
    apart = torch.diag_embed(maps.flatten(2).movedim(1, -1)).movedim(-1, 1)  # a lane per expert
    assert losses.mutual_information_loss(apart).item() == pytest.approx(0, abs=1e-12)


@given(data=st.data())
def test_relabelling_the_experts_changes_no_loss(heat_maps, data):
    maps = data.draw(heat_maps)
    permuted = maps[:, data.draw(st.permutations(range(maps.shape[1])))]
    for loss in (losses.mutual_information_loss, losses.position_stability_loss):
        assert loss(permuted).item() == pytest.approx(loss(maps).item(), rel=1e-9, abs=1e-11)


@given(data=st.data())
def test_position_stability_does_not_see_where_an_image_s_maps_lie(heat_maps, data):
    """Shift all maps of an image by one offset, another for every image."""
    maps = data.draw(heat_maps)
    room = functional.pad(maps, (0, 4, 0, 4))
    offset = st.tuples(st.integers(0, 4), st.integers(0, 4))
    shifted = torch.stack([image.roll(data.draw(offset), (-2, -1)) for image in room])
    assert losses.position_stability_loss(shifted).item() == pytest.approx(
        losses.position_stability_loss(room).item(), rel=1e-9, abs=1e-9
    )


def test_position_stability_is_zero_where_distances_are_the_same_on_every_image():
    image = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    maps = (image / image.sum((2, 3), keepdim=True)).expand(4, 3, 6, 6)
    assert losses.position_stability_loss(maps).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_classification_loss_is_eq_2(outputs, alpha):
    expected = cross_entropy_by_loops(
        outputs.logits.numpy(), outputs.gate.numpy(), LABELS.numpy(), alpha
    )
    assert losses.classification_loss(outputs, LABELS, alpha).item() == pytest.approx(expected)


@given(
    alpha=st.sampled_from([0.0, 1.0]), beta=st.sampled_from([0.0, 0.5]),
    gamma=st.sampled_from([0.0, 7.0]), coordinates=st.sampled_from(scores.COORDINATES),
)  # fmt: skip
def test_total_is_eq_12(alpha, beta, gamma, coordinates):
    """(1/B) { sum_q CE + (beta/N) sum_q MI + gamma/(N (N - 1)) PS }, for B = 4 and N = 3."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    log_gate = torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(1)
    maps = torch.rand(4, 3, 6, 6, generator=generator, dtype=torch.float64)
    maps = maps / maps.sum((2, 3), keepdim=True)
    loss = losses.immunity_loss(
        ExpertOutputs(logits, log_gate, ()), LABELS, maps, alpha=alpha, beta=beta, gamma=gamma,
        coordinates=coordinates,
    )  # fmt: skip
    scale = 1 / 5 if coordinates == "unit" else 1.0
    sum_of_ce = 4 * cross_entropy_by_loops(
        logits.numpy(), log_gate.exp().numpy(), LABELS.numpy(), alpha
    )
    sum_of_mi = 4 * mutual_information_by_loops(maps.numpy())
    stability = position_stability_by_loops(maps.numpy(), scale)
    expected = (sum_of_ce + beta / 3 * sum_of_mi + gamma / (3 * 2) * stability) / 4
    assert loss.total.item() == pytest.approx(expected, rel=1e-12)
    assert loss.mutual_information.item() == pytest.approx(sum_of_mi / 4 if beta else 0)
    assert loss.position_stability.item() == pytest.approx(stability if gamma else 0)


def test_eq_11_can_take_its_positions_from_other_maps(outputs):
    maps, positions = torch.rand(2, 4, 3, 6, 6, dtype=torch.float64)
    loss = losses.immunity_loss(outputs, LABELS, maps, positions, alpha=1, beta=1, gamma=1)
    assert loss.mutual_information == losses.mutual_information_loss(maps)
    assert loss.position_stability == losses.position_stability_loss(positions)


@pytest.mark.parametrize(("beta", "gamma"), [(0.5, 0.0), (0.0, 2.0)])
def test_heat_map_terms_without_maps_are_refused(outputs, beta, gamma):
    with pytest.raises(ValueError, match=f"beta = {beta} and gamma = {gamma} need"):
        losses.immunity_loss(outputs, LABELS, None, alpha=1, beta=beta, gamma=gamma)


def test_without_heat_map_terms_no_maps_are_needed(outputs):
    loss = losses.immunity_loss(outputs, LABELS, None, alpha=1, beta=0, gamma=0)
    assert loss.total == loss.cross_entropy
