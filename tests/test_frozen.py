"""PGD on a frozen copy: the copy is the same function, and stopping early fools no fewer images."""

import copy

import pytest
import torch
import torchattacks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from immunity_lib import ImmunityMoE, build_expert
from immunity_lib.attacks.folding import folded
from immunity_lib.attacks.frozen import FrozenPGD, cross_entropy, margin
from immunity_lib.experts import BASELINES, EXPERTS

EPS, STEP = 8 / 255, 2 / 255


def with_random_norms(module):
    """Every batch norm with statistics and weights of its own, as after training."""
    torch.manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, -1.5, 1.5)
                nn.init.normal_(norm.bias, 0, 0.2)
    return module.eval()


def count(module, kind):
    return sum(isinstance(one, kind) for one in module.modules())


@pytest.mark.parametrize("name", EXPERTS)
def test_folded_copy_is_the_same_function(name, images):
    layers = 4 if name in BASELINES else None
    model = ImmunityMoE([build_expert(name, 10, 0.0625, layers=layers) for _ in range(2)])
    model = with_random_norms(model).double()
    frozen = folded(model)
    found = []
    for one in (model, frozen):
        moved = images[:2].double().requires_grad_()
        log_probs = one(moved, gate="trained")
        (gradient,) = torch.autograd.grad(log_probs[:, 0].sum(), moved)
        found.append((log_probs, gradient))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-9)
    assert found[0][0].std(0).max() > 1e-5  # the images are told apart: the test is not vacuous


@pytest.mark.parametrize("name", EXPERTS)
def test_batch_norms_behind_convolutions_are_gone(name):
    """What stays: in DenseNet those before convolutions, in cells those of two halves at once."""
    expert = build_expert(name, 10, 0.0625, layers=4 if name in BASELINES else None)
    before, after = count(expert, nn.BatchNorm2d), count(folded(expert), nn.BatchNorm2d)
    if name == "densenet121":
        convolutions_before_norms = 58  # one in each dense layer
        assert after == before - convolutions_before_norms
    elif name in BASELINES:
        halves = [m for m in expert.modules() if type(m).__name__ == "FactorizedReduce"]
        assert after == len(halves) < before
    else:
        assert after == 0 < before


def test_folding_leaves_the_model_alone(model, images):
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = folded(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    before = frozen(images, gate="uniform")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(frozen(images, gate="uniform"), before)


def test_folded_weights_stay_channels_last(model):
    frozen = folded(model.to(memory_format=torch.channels_last))
    convolutions = [module for module in frozen.modules() if isinstance(module, nn.Conv2d)]
    assert all(one.weight.is_contiguous(memory_format=torch.channels_last) for one in convolutions)


def test_a_convolution_used_twice_is_folded_twice(images):
    shared = nn.Conv2d(3, 3, 3, padding=1)
    network = with_random_norms(
        nn.Sequential(shared, nn.BatchNorm2d(3), nn.ReLU(), shared, nn.BatchNorm2d(3, affine=False))
    )
    frozen = folded(network)
    assert count(frozen, nn.BatchNorm2d) == 0
    torch.testing.assert_close(frozen(images), network(images))


def test_what_cannot_be_folded_stays(images):
    """A norm of the batch's own statistics, one behind an activation, and one before."""
    network = with_random_norms(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    )
    network.append(nn.Conv2d(4, 4, 1)).append(nn.BatchNorm2d(4, track_running_stats=False))
    frozen = folded(network)
    assert count(frozen, nn.BatchNorm2d) == 3
    torch.testing.assert_close(frozen(images), network(images))


@given(
    gate=st.sampled_from(["trained", "uniform", (1, 0)]), eps=st.floats(0, 1),
    step=st.floats(1e-4, 1), loss=st.sampled_from([cross_entropy, margin]),
    stop_early=st.booleans(), random_start=st.booleans(),
)  # fmt: skip
def test_budget_is_kept(
    make_linear_model, images, labels, gate, eps, step, loss, stop_early, random_start
):
    model = make_linear_model(2)
    with model.evaluated_with(gate):
        attack = FrozenPGD(model, eps, step, 3, random_start, loss=loss, stop_early=stop_early)
    adversarial = attack(images, labels)
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (adversarial - images).abs().max() <= eps + 1e-6


@pytest.fixture(scope="module")
def victim(trained):
    """In double precision, so that the order of operations turns no sign of a gradient."""
    victim = copy.deepcopy(trained).double()
    victim.evaluation_gate = "trained"
    return victim


@pytest.fixture(scope="module")
def targets(dataset):
    split = dataset.splits["train"]
    return split.images[:24].double() / 255, split.labels[:24]


def is_fooled(model, images, labels):
    with torch.no_grad():
        return model(images, gate="trained").argmax(1) != labels


SMALL = {"eps": 2 / 255, "alpha": 0.5 / 255, "steps": 10}  # some images resist it, some do not


@pytest.fixture(scope="module")
def reference(victim, targets):
    """The adversarial images of torchattacks' PGD."""
    torch.manual_seed(0)
    return torchattacks.PGD(victim, **SMALL)(*targets)


def test_to_the_last_step_it_is_the_pgd_of_torchattacks(victim, targets, reference):
    torch.manual_seed(0)
    found = FrozenPGD(victim, **SMALL, stop_early=False)(*targets)
    assert ((found - reference).abs() < 1e-9).double().mean() > 0.999


def test_early_stopping_fools_what_torchattacks_fools(victim, targets, reference):
    torch.manual_seed(0)
    found = is_fooled(victim, FrozenPGD(victim, **SMALL)(*targets), targets[1])
    expected = is_fooled(victim, reference, targets[1])
    assert is_fooled(victim, *targets).sum() < expected.sum() < len(expected)
    assert (found | ~expected).all()
    assert found.sum() <= expected.sum() + 2  # few images are fooled on the way alone


def test_robust_accuracy_is_that_of_torchattacks(trained, dataset):
    """In single precision, as in use."""
    split = dataset.splits["train"]
    images, labels = split.images.float() / 255, split.labels
    with trained.evaluated_with("trained"):
        expected = torchattacks.PGD(trained, **SMALL)(images, labels)
        found = FrozenPGD(trained, **SMALL)(images, labels)
    robust = [(~is_fooled(trained, one, labels)).sum() for one in (expected, found)]
    assert 0 < robust[0] < (~is_fooled(trained, images, labels)).sum()  # the test is not vacuous
    assert abs(robust[0] - robust[1]) <= 2


def test_each_image_stops_where_it_first_fools(victim, targets):
    """Against PGD on one image at a time, on the model itself."""
    images, labels = targets
    found = FrozenPGD(victim, **SMALL, random_start=False)(images, labels)
    steps_taken = set()
    for image, label, stopped in zip(images, labels, found, strict=True):
        point, taken = image[None], 0
        while taken < SMALL["steps"] and not is_fooled(victim, point, label):
            point = point.clone().requires_grad_()
            functional.nll_loss(victim(point, gate="trained"), label[None]).backward()
            point = point.detach() + SMALL["alpha"] * point.grad.sign()
            point = point.clamp(image - SMALL["eps"], image + SMALL["eps"]).clamp(0, 1)
            taken += 1
        assert ((point[0] - stopped).abs() < 1e-9).double().mean() > 0.999
        steps_taken.add(taken)
    assert {0, SMALL["steps"]} < steps_taken  # misclassified anyway, resisting, and between


def test_only_images_that_resist_are_attacked(victim, targets):
    images, labels = targets
    labels = torch.where(torch.arange(len(labels)) % 2 > 0, labels, (labels + 1) % 10)
    misclassified = is_fooled(victim, images, labels)
    attack = FrozenPGD(victim, **SMALL)
    seen = []
    attack.model.register_forward_pre_hook(lambda module, arguments: seen.append(*arguments))
    adversarial = attack(images, labels)
    assert 0 < misclassified.sum() < len(images)
    assert torch.equal(adversarial[misclassified], images[misclassified])
    sizes = [len(batch) for batch in seen]
    assert sizes[:2] == [len(images), (~misclassified).sum()]
    assert sizes[1:] == sorted(sizes[1:], reverse=True) and sizes[-1] < sizes[1]


def test_nothing_is_computed_when_all_are_misclassified(victim, targets):
    images, labels = targets
    with torch.no_grad():
        wrong = victim(images, gate="trained").argmin(1)
    assert torch.equal(FrozenPGD(victim)(images, wrong), images)


def test_margin_is_the_best_wrong_class_less_the_label():
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 7), torch.randint(7, (20,))
    expected = [
        max(value for j, value in enumerate(row) if j != label) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(margin(logits, labels), torch.tensor(expected))
    torch.testing.assert_close(margin(logits.log_softmax(1), labels), torch.tensor(expected))
    assert torch.equal(margin(logits, labels) > 0, logits.argmax(1) != labels)


def test_margin_moves_images_that_the_cross_entropy_cannot(make_linear_model, images):
    """So certain that the cross entropy's gradient is exactly zero."""
    model = make_linear_model(1, classes=2, sharpness=1e6)
    model.evaluation_gate = "trained"
    with torch.no_grad():
        certain = model(images).argmax(1)
    weight = model.experts[0].linear.weight.detach().view(2, 3, 32, 32)
    uphill = (weight[1 - certain] - weight[certain]).sign()
    options = {"eps": EPS, "alpha": STEP, "steps": 4, "random_start": False, "stop_early": False}
    still = FrozenPGD(model, loss=cross_entropy, **options)(images, certain)
    assert torch.equal(still, images)
    moved = FrozenPGD(model, loss=margin, **options)(images, certain)
    torch.testing.assert_close(moved, (images + EPS * uphill).clamp(0, 1))


@pytest.mark.parametrize("gate", ["switch", "switch-per-image"])
def test_a_random_gate_is_attacked_to_the_last_step_alone(model, images, labels, gate):
    model.evaluation_gate = gate
    with pytest.raises(ValueError, match=f"'{gate}' is drawn anew.*set stop_early=False"):
        FrozenPGD(model)
    adversarial = FrozenPGD(model, EPS, STEP, 2, stop_early=False)(images, labels)
    assert (adversarial != images).flatten(1).any(1).all()


def test_the_attacked_gate_is_that_of_the_making(model, images, labels):
    with model.evaluated_with((2, 1, 0)):
        attack = FrozenPGD(model, steps=1)
    assert model.evaluation_gate == "switch"
    assert attack.model.evaluation_gate == (2, 1, 0)


def test_it_works_within_no_grad(victim, targets):
    with torch.no_grad():
        adversarial = FrozenPGD(victim, steps=2)(*targets)
    assert not adversarial.requires_grad and (adversarial != targets[0]).any()


def test_bad_input_is_refused(victim, targets):
    images, labels = targets
    with pytest.raises(ValueError, match="divide 8-bit images by 255"):
        FrozenPGD(victim)(images * 255, labels)
    with pytest.raises(ValueError, match="0 to 9, found"):
        FrozenPGD(victim)(images, labels + 9)
