"""The greedy attack on a randomly switched gate: where the mean loss has no gradient to follow."""

import pytest
import torch

from immunity_lib.attacks.arc import ArcAttack
from immunity_lib.attacks.exact import ExactPGD
from immunity_lib.evaluation import verdicts
from immunity_lib.moe import ConstantGate

EPS, STEP = 8 / 255, 2 / 255


def share_fooled(model, images, labels):
    with torch.no_grad():
        correct = verdicts(model.expert_outputs(images), labels).switched
    return 1 - correct.double().mean(1)


@pytest.fixture
def opposed(make_linear_model):
    """Two linear classifiers, one of which nearly has the whole gate, that any step within eps
    moves apart: it can fool one of them, and then makes the other surer."""
    model = make_linear_model(2, classes=2)
    pattern = torch.where(torch.arange(3 * 32 * 32) % 2 == 0, 1.0, -1.0) * 1e-3
    with torch.no_grad():
        for expert, sign in zip(model.experts, (1, -1), strict=True):
            expert.linear.weight[0], expert.linear.weight[1] = -sign * pattern, sign * pattern
            expert.linear.bias.copy_(torch.tensor([0.05, -0.05]))  # a grey image is of class 0
        model.gate = ConstantGate(2)
        model.gate.weights.copy_(torch.tensor([9.0, 0.0]))
    return model


def test_it_finds_what_pgd_on_the_mean_loss_misses(opposed):
    images, labels = torch.full((4, 3, 32, 32), 0.5), torch.zeros(4, dtype=torch.long)
    assert share_fooled(opposed, images, labels).eq(0).all()
    mean_loss = ExactPGD(opposed, EPS, STEP, 10, random_start=False)(images, labels)
    assert share_fooled(opposed, mean_loss, labels).eq(0).all()
    greedy = ArcAttack(opposed, EPS, STEP, 10)(images, labels)
    assert share_fooled(opposed, greedy, labels).eq(0.5).all()


def test_no_image_fools_fewer_gates_than_before_and_more_steps_fool_no_fewer(
    make_linear_model, images, labels
):
    model = make_linear_model(4)
    with torch.no_grad():
        labels = model(images, gate="uniform").argmax(1)
    shares = [share_fooled(model, images, labels)]
    for steps in (1, 3, 6):
        adversarial = ArcAttack(model, EPS / 20, STEP / 40, steps)(images, labels)
        assert (adversarial - images).abs().max() <= EPS / 20 + 1e-6
        assert adversarial.min() >= 0 and adversarial.max() <= 1
        shares.append(share_fooled(model, adversarial, labels))
    for before, after in zip(shares, shares[1:], strict=False):
        assert (after >= before).all()
    assert shares[-1].mean() > shares[0].mean()


def test_bad_input_is_named(make_linear_model, images, labels):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ArcAttack(make_linear_model(2))(images * 255, labels)
