"""What training descends beside eq (12), against independent computations."""

import pytest
import torch
from torch.nn import functional

from immunity_lib.experts import CellNetwork
from immunity_lib.heatmaps import grad_cam, normalised
from immunity_lib.objective import adversarial_images, training_loss
from immunity_lib.training import build_model


@pytest.fixture(scope="module")
def batch(dataset):
    return dataset.splits["train"].images[:8].float() / 255, dataset.splits["train"].labels[:8]


@pytest.fixture(scope="module")
def other_images(batch):
    noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return (0.5 * batch[0] + 0.5 * noise).clamp(0, 1)


def eval_model(recipe, dataset):
    """With batch statistics and large logits, so that answers differ between images."""
    model = build_model(recipe, dataset)
    with torch.no_grad():
        for _ in range(20):
            model.train()(dataset.splits["train"].images[:32].float() / 255)
        for expert in model.experts:
            expert.classifier.weight.mul_(20)
    return model.eval()


@pytest.mark.parametrize("method", ["moe", "immunity"])
def test_trades_adds_the_divergence_of_the_answer_under_attack(
    make_recipe, dataset, batch, other_images, method
):
    recipe = make_recipe(method, "trades", trades_weight=3.0)
    model = eval_model(recipe, dataset)
    images, labels = batch
    loss = training_loss(model, images, labels, recipe, 5.0, other_images)
    plain = training_loss(model, images, labels, make_recipe(method), 5.0)
    assert loss.cross_entropy == plain.cross_entropy  # of the clean images
    clean = model(images, gate="trained").exp().double()
    attacked = model(other_images, gate="trained").exp().double()
    divergence = (clean * (clean / attacked).log()).sum(1).mean()
    assert divergence > 1e-3
    assert (loss.total - plain.total).item() == pytest.approx(3 * divergence.item(), rel=1e-3)


def test_logit_pairing_adds_the_distance_of_the_answers(make_recipe, dataset, batch, other_images):
    recipe = make_recipe("moe", "alp", pairing_weight=0.5)
    model = eval_model(recipe, dataset)
    images, labels = batch
    loss = training_loss(model, images, labels, recipe, 5.0, other_images)
    plain = training_loss(model, other_images, labels, make_recipe("moe"), 5.0)
    assert loss.cross_entropy == plain.cross_entropy  # of the attacked images
    difference = model(images, gate="trained") - model(other_images, gate="trained")
    expected = 0.5 * difference.double().square().mean()
    assert (loss.total - plain.total).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("regime", ["trades", "alp"])
def test_a_pair_of_equal_images_costs_nothing(make_recipe, dataset, batch, regime):
    recipe = make_recipe("moe", regime)
    model = eval_model(recipe, dataset)
    loss = training_loss(model, *batch, recipe, 5.0, batch[0].clone())
    assert loss.total.item() == pytest.approx(loss.cross_entropy.item(), abs=1e-5)


@pytest.mark.parametrize("adversary", ["pgd", "ffgsm"])
def test_inner_attack_of_trades_raises_the_divergence(make_recipe, dataset, batch, adversary):
    recipe = make_recipe("moe", "trades", adversary=adversary)
    model = eval_model(recipe, dataset)
    images, labels = batch
    attacked = adversarial_images(model, images, labels, recipe)
    distance = (attacked - images).abs().amax()
    assert 0.5 * float(recipe.eps) < distance <= float(recipe.eps) + 1e-6

    def divergence(other):
        answers = model(other, gate="trained")
        clean = model(images, gate="trained")
        return functional.kl_div(answers, clean, reduction="batchmean", log_target=True)

    torch.manual_seed(1)
    noise = images + float(recipe.eps) * (2 * torch.rand_like(images) - 1).sign()
    assert divergence(attacked) > 2 * divergence(noise.clamp(0, 1))


def test_auxiliary_classifier_adds_its_cross_entropy(make_recipe, dataset, batch):
    changes = {"expert": "pdarts", "layers": 3, "auxiliary_weight": 0.4}
    recipe = make_recipe("standalone").model_copy(update=changes)
    model = eval_model(recipe, dataset)
    images, labels = batch
    loss = training_loss(model, images, labels, recipe, 5.0)
    network = model.experts[0]
    assert isinstance(network, CellNetwork)
    logits, auxiliary = network.forward_with_auxiliary(images)
    assert loss.cross_entropy == functional.cross_entropy(logits, labels)
    expected = loss.cross_entropy + 0.4 * functional.cross_entropy(auxiliary, labels)
    torch.testing.assert_close(loss.total, expected)


def test_mixed_precision_is_close_and_ends_before_probabilities(make_recipe, dataset, batch):
    """bfloat16 keeps 8 bits: the losses agree to a few per cent, the maps still sum to 1."""
    images, labels = batch
    losses, gradients = [], []
    for precision in ("float32", "bfloat16"):
        recipe = make_recipe("immunity", precision=precision, gamma=10.0)
        torch.manual_seed(0)
        model = build_model(recipe, dataset).train()
        loss = training_loss(model, images, labels, recipe, 5.0)
        loss.total.backward()
        losses.append(loss)
        gradients.append(torch.cat([one.grad.flatten() for one in model.experts.parameters()]))
        assert all(one.grad.dtype == torch.float32 for one in model.experts.parameters())
    for part in ("cross_entropy", "mutual_information", "total"):
        exact, mixed = (getattr(loss, part).item() for loss in losses)
        assert mixed == pytest.approx(exact, rel=0.05) and mixed != exact
    assert functional.cosine_similarity(*gradients, dim=0) > 0.9
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.expert_outputs(images)
    assert outputs.activations[0].dtype == torch.bfloat16
    assert outputs.log_probs.dtype == torch.float32
    maps = normalised(grad_cam(outputs, labels))
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(8, 2))
