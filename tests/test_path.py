"""The points that an attack passes through."""

import pytest
import torch

from immunity_lib.attacks import attack_images
from immunity_lib.attacks.path import attack_path

STEP = 2 / 255


def path_of(model, images, labels, eps, steps=4, gate="uniform"):
    return attack_path(model, images, labels, gate, eps=eps, step_size=STEP, steps=steps)


def test_it_begins_at_the_images_and_ends_where_torchattacks_ends(model, images, labels):
    path = path_of(model, images, labels, torch.full((8,), 8 / 255))
    assert path.shape == (5, *images.shape)
    assert torch.equal(path[0], images)
    # BIM is PGD without a random start
    expected = attack_images(
        model, images, labels, "bim", "uniform", eps=8 / 255, step_size=STEP, steps=4
    )
    torch.testing.assert_close(path[-1], expected, rtol=0, atol=1e-6)


def test_every_point_is_where_a_shorter_attack_ends(model, images, labels):
    eps = torch.full((8,), 8 / 255)
    path = path_of(model, images, labels, eps)
    for steps in (1, 2, 3):
        assert torch.equal(path[steps], path_of(model, images, labels, eps, steps)[-1])


def test_budgets_side_by_side_are_those_of_separate_attacks(model, images, labels):
    """Each image keeps to its own eps, and 0 leaves it where it is."""
    budgets = torch.tensor([0.0, 1 / 255, 3 / 255, 8 / 255])
    same, label = images[:1].repeat(4, 1, 1, 1), labels[:1].repeat(4)
    together = path_of(model, same, label, budgets)
    for row, eps in enumerate(budgets):
        alone = path_of(model, images[:1], labels[:1], eps[None])
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=0, atol=1e-6)
        assert (together[-1, row] - images[0]).abs().max() <= eps + 1e-6
    assert torch.equal(together[-1, 0], images[0])


def test_the_attack_sees_the_gate_it_is_told(model, images, labels):
    """An expert alone in the gate is attacked alone: its weight is all that counts."""
    eps = torch.full((8,), 8 / 255)
    ends = [path_of(model, images, labels, eps, gate=gate)[-1] for gate in ("trained", "uniform")]
    assert not torch.equal(*ends)
    assert model.evaluation_gate == "switch", "the model keeps its own gate"


def test_it_refuses_images_that_were_normalised(model, images, labels):
    with pytest.raises(ValueError, match="must lie in"):
        path_of(model, images * 2 - 1, labels, torch.full((8,), 0.1))
