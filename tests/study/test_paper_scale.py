"""The paper preset's models, at full width: a step of training and one of an attack each."""

from dataclasses import replace

import pytest
import torch

from immunity_lib.attacks import attack_images
from immunity_lib.data import Dataset
from immunity_lib.data.images import CLASS_NAMES, STATISTICS
from immunity_lib.train import adversarial_images, build_model, training_loss
from study.catalogue import recipe_of, trained_models
from study.settings import load_preset

PAPER = load_preset("paper")


def once_each():
    """One name for each recipe, whatever its seed; CIFAR-100 for one regime, as a wider output."""
    found = {}
    for name in trained_models(PAPER):
        if name.dataset == "cifar10" or name.regime == "standard":
            found.setdefault(replace(recipe_of(PAPER, name), seed=0), name)
    return sorted(found.values(), key=str)


@pytest.mark.slow
@pytest.mark.parametrize("name", once_each(), ids=str)
def test_one_step_of_training_and_of_an_attack(name):
    wanted = replace(recipe_of(PAPER, name), adversary_steps=1)
    mean, std = STATISTICS[name.dataset]
    dataset = Dataset("", CLASS_NAMES[name.dataset], mean, std, (), "noise", {})
    torch.manual_seed(0)
    model = build_model(wanted, dataset).train()
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 7])
    optimiser = torch.optim.SGD(model.parameters(), wanted.learning_rate)
    before = [parameter.detach().clone() for parameter in model.experts.parameters()]
    adversarial = adversarial_images(model, images, labels, wanted)
    training_loss(model, images, labels, wanted, wanted.epochs, adversarial).total.backward()
    optimiser.step()
    after = list(model.experts.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert sum(changed) > 0.95 * len(changed)
    # Not strict, as in training: after one step, batch norms have not seen enough
    budget = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 1, "strict": False}
    attacked = attack_images(model.eval(), images, labels, "pgd", "uniform", **budget)
    assert 0 < (attacked - images).abs().max() <= 8 / 255 + 1e-6
