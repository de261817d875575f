"""Attacks: within their budget, true to their closed form, to enumeration over the gates and to
torchattacks, and leaving no trace in the model."""

import copy
from itertools import permutations

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from immunity_lib import ImmunityMoE, build_expert
from immunity_lib.attacks import (
    ATTACKS,
    arc,
    ascent_path,
    attack_images,
    attack_path,
    auto_attack,
    check_budget,
    cross_entropy_by_gate,
    exact_pgd,
    fold,
    margin,
)
from immunity_lib.experts import BASELINES, EXPERT_NAMES
from immunity_lib.moe import GATES, ConstantGate, verdicts

EPS, STEP = 8 / 255, 2 / 255
BUDGET = {"eps": EPS, "step_size": STEP, "steps": 10}
FROM_IMAGES = BUDGET | {"random_start": False}


def attack(model, images, labels, name, gate="trained", **changes):
    return attack_images(model, images, labels, name, gate, **BUDGET | changes)


def path_of(model, images, labels, eps=EPS, steps=4, gate="uniform"):
    eps = eps if isinstance(eps, torch.Tensor) else torch.full((len(images),), eps)
    return attack_path(model, images, labels, gate, eps=eps, step_size=STEP, steps=steps)


def assert_same_points(found, expected):
    """Up to a few pixels: where two gradients round differently near zero, a sign may differ."""
    assert ((found - expected).abs() < 1e-6).double().mean() > 0.999


def move_uphill(model, images, labels, distance=EPS):
    """Along the sign of the gradient of either label's loss: the other class's weights less own."""
    weight = model.experts[0].linear.weight.detach().view(2, 3, 32, 32)
    return (images + distance * (weight[1 - labels] - weight[labels]).sign()).clamp(0, 1)


@pytest.mark.parametrize("name", [*ATTACKS, "exact", "arc"])
@settings(max_examples=15)
@given(
    gate=st.sampled_from([*GATES, (1, 0)]), eps=st.floats(0, 1), step_size=st.floats(1e-4, 1)
)  # fmt: skip
def test_budget_is_kept(make_linear_model, images, labels, name, gate, eps, step_size):
    budget = {"eps": eps, "step_size": step_size, "steps": 3}
    if name in ATTACKS:
        adversarial = attack(make_linear_model(2), images, labels, name, gate, **budget)
    else:
        perturb = {"exact": exact_pgd, "arc": arc}[name]
        adversarial = perturb(make_linear_model(2), images, labels, **budget)
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    distance = (adversarial - images).abs().max().item()
    assert distance <= eps + 1e-6
    with pytest.raises(ValueError, match="an adversarial image is .* away from its image; eps is"):
        check_budget(images, adversarial, distance - 2e-6)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("bim", 1), ("bim", 3), ("bim", 10), ("mim", 3), ("fgsm", 1), ("pgd", 8), ("cw", 8),
     ("apgd", 8)],
)  # fmt: skip
def test_attacks_walk_uphill_until_the_border(make_linear_model, images, name, steps):
    """FGSM in one step; from a random start, 8 steps of 2/255 cross the whole ball."""
    model, labels = make_linear_model(1, classes=2), torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    with torch.no_grad():  # a caller who wants no gradients gets the attack all the same
        adversarial = attack(model, images, labels, name, steps=steps)
    distance = EPS if name == "fgsm" else min(steps * STEP, EPS)
    torch.testing.assert_close(adversarial, move_uphill(model, images, labels, distance))
    if name == "pgd":
        for perturb in (exact_pgd, arc):
            other = perturb(model, images, labels, **BUDGET)
            torch.testing.assert_close(other, adversarial)


@pytest.mark.parametrize("name", ["fgsm", "cw"])
def test_a_step_is_along_the_gradient_of_the_mixture(make_linear_model, images, labels, name):
    """Of five experts under a permuted gate, against the gradient of eq (1)'s cross entropy by
    hand; for C&W, of its margin, at the random start."""
    model, order = make_linear_model(5), (3, 1, 4, 0, 2)
    torch.manual_seed(0)
    start = images.clone()
    if name == "cw":
        start = (start + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    start.requires_grad_()
    outputs = model.expert_outputs(start)
    mixture = (outputs.gate[:, order, None] * outputs.logits.softmax(-1)).sum(1).log()
    raised = -mixture[torch.arange(len(labels)), labels]
    if name == "cw":
        others = mixture.masked_fill(functional.one_hot(labels, 10).bool(), -100)
        raised = others.max(1).values + raised
    (gradient,) = torch.autograd.grad(raised.sum(), start)
    length = EPS if name == "fgsm" else STEP
    moved = (start.detach() + length * gradient.sign()).clamp(images - EPS, images + EPS)
    torch.manual_seed(0)
    found = attack(model, images, labels, name, gate=order, steps=1)
    assert_same_points(found, moved.clamp(0, 1))


def test_apgd_fools_what_that_of_torchattacks_fools(make_distant_images):
    """Which keeps the last point that fools, where ours is the point of the highest loss."""
    model, images, labels = make_distant_images([(k + 0.5) / 255 for k in range(4)])
    found = attack(model, images, labels, "apgd", eps=2 / 255)
    expected = torchattacks.APGD(model, eps=2 / 255, steps=10)(images, labels)
    for adversarial in (found, expected):
        assert (model(adversarial).argmax(1) != labels).tolist() == [True, True, False, False]


def test_apgd_starts_where_the_random_state_says(model, images, labels):
    """torchattacks' own would set the seed itself, the same for every batch."""
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(attack(model, images, labels, "apgd", steps=2))
    assert torch.equal(found[0], found[1])
    assert (found[0] != found[2]).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("gate", ["trained", "switch"])
def test_images_that_are_misclassified_anyway_are_attacked_too(model, images, name, gate):
    """Another state of the gate may get them right, and all states judge the same images."""
    with torch.no_grad():
        wrong = model(images, gate="trained").argmin(1)
    adversarial = attack(model, images, wrong, name, gate, steps=3)
    assert (adversarial - images).abs().flatten(1).amax(1).min() > EPS / 4


@pytest.mark.parametrize("name", [*ATTACKS, "path", "that fails"])
def test_an_attack_leaves_no_trace_in_the_model(model, images, labels, name):
    """Some modules are in train mode, some in eval mode: what a fine-tuning caller may have."""
    model.train()
    model.experts[1].eval()
    model.experts[0].stages[1].eval()
    modes = [module.training for module in model.modules()]
    state, before = copy.deepcopy(model.state_dict()), images.clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def fail(module, arguments):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt

    if name == "path":
        path_of(model, images, labels, steps=2)
    elif name in ATTACKS:
        attack(model, images, labels, name, steps=2)
    else:
        model.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            attack(model, images, labels, "pgd", gate="uniform")
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert model.evaluation_gate == "switch" and torch.equal(images, before)


# Each as a caller would use it, on a mixture of ten classes
CALLS = {
    "attack_images": lambda *batch: attack(*batch, "pgd"),
    "attack_path": path_of,
    "exact_pgd": lambda *batch: exact_pgd(*batch, **BUDGET),
    "arc": lambda *batch: arc(*batch, **BUDGET),
    "auto_attack": lambda *batch: auto_attack(*batch, "uniform", eps=EPS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_A9_images_and_labels_that_the_model_cannot_have_are_refused(model, images, labels, call):
    for spoilt, found in (
        (images * 255, r"found \S+ to 2\d\d\S*: divide 8-bit images by 255"),
        ((images - 0.5) / 0.25, "do not normalise them"),
        (images * float("nan"), "found nan to nan"),
    ):
        with pytest.raises(ValueError, match=found):
            call(model, spoilt, labels)
    for label in (-1, 10):
        with pytest.raises(ValueError, match=f"0 to 9, found .*{label}"):
            call(model, images, torch.where(labels == labels[0], label, labels))
    for wrong in (labels[:1], labels[:7], labels[:, None]):
        with pytest.raises(ValueError, match=r"labels of shape \(.* for 8 images; give each"):
            call(model, images, wrong)


def test_unknown_names_are_refused_with_the_valid_ones(model, images, labels):
    with pytest.raises(ValueError, match="'deepfool'; valid names: fgsm, bim, .*, apgd"):
        attack(model, images, labels, "deepfool")
    with pytest.raises(ValueError, match="trained, uniform, switch"):
        attack(model, images, labels, "fgsm", gate="swtich")
    with pytest.raises(ValueError, match="unknown aim 'mean'; choose expected or weakest"):
        exact_pgd(model, images, labels, aim="mean", **BUDGET)


# PGD of our own: along a path, on the margin, and exact over the gate


@pytest.mark.parametrize("loss", ["cross entropy", "expected", "weakest"])
def test_to_the_last_step_it_is_the_pgd_of_torchattacks(model, images, labels, loss):
    """In float64, so that the order of operations turns no sign of a gradient. Under a gate of
    equal weights all permutations are one, so the exact attack is that on this gate, too."""
    model, images = model.double(), images.double()

    def cross_entropy(points):
        return functional.cross_entropy(model(points, "trained"), labels, reduction="none")

    if loss != "cross entropy":
        model.gate = ConstantGate(3).double()
    torch.manual_seed(0)
    with model.evaluated_with("trained"):
        expected = torchattacks.PGD(model, EPS, STEP, 10)(images, labels)
    torch.manual_seed(0)
    if loss == "cross entropy":
        *_, found = ascent_path(cross_entropy, images, **BUDGET)
    else:
        found = exact_pgd(model, images, labels, aim=loss, **BUDGET)
    assert_same_points(found, expected)


def test_a_path_begins_at_the_images_and_ends_where_torchattacks_ends(model, images, labels):
    model, images = model.double(), images.double()
    path = path_of(model, images, labels)
    assert path.shape == (5, *images.shape) and torch.equal(path[0], images)
    # BIM is PGD without a random start
    assert_same_points(path[-1], attack(model, images, labels, "bim", "uniform", steps=4))
    for steps in (1, 3):  # every point is where a shorter attack ends
        assert torch.equal(path[steps], path_of(model, images, labels, steps=steps)[-1])
    assert not torch.equal(path[-1], path_of(model, images, labels, gate="trained")[-1])


def test_budgets_side_by_side_are_those_of_separate_attacks(model, images, labels):
    """Each image keeps to its own eps, and 0 leaves it where it is."""
    model, images = model.double(), images.double()
    budgets = torch.tensor([0.0, 1 / 255, 3 / 255, 8 / 255], dtype=torch.float64)
    same, label = images[:1].repeat(4, 1, 1, 1), labels[:1].repeat(4)
    together = path_of(model, same, label, budgets)
    for row, eps in enumerate(budgets):
        alone = path_of(model, images[:1], labels[:1], eps[None])
        assert_same_points(together[:, row : row + 1], alone)
        assert (together[-1, row] - images[0]).abs().max() <= eps + 1e-6
    assert torch.equal(together[-1, 0], images[0])


def test_margin_is_the_best_wrong_class_less_the_label():
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
    with torch.no_grad():
        certain = model(images, "trained").argmax(1)
    assert torch.equal(exact_pgd(model, images, certain, **FROM_IMAGES), images)
    expected = move_uphill(model, images, certain)
    torch.testing.assert_close(attack(model, images, certain, "cw"), expected)


def losses_one_by_one(model, images, labels):
    """The cross entropy under every gate, (N!, B), a pass for each."""
    gates = permutations(range(len(model.experts)))
    return torch.stack(
        [functional.cross_entropy(model(images, gate), labels, reduction="none") for gate in gates]
    )


@pytest.mark.parametrize(
    ("aim", "over_gates"),
    [("expected", lambda losses: losses.mean(0)), ("weakest", lambda losses: losses.amax(0))],
)
def test_an_exact_step_is_along_the_gradient_over_all_gates(
    make_linear_model, images, labels, aim, over_gates
):
    model, moved = make_linear_model(4), images.clone().requires_grad_()
    losses = losses_one_by_one(model, moved, labels)
    together = cross_entropy_by_gate(model.expert_outputs(images), labels)
    torch.testing.assert_close(together, losses.T)
    (gradient,) = torch.autograd.grad(over_gates(losses).sum(), moved)
    expected = (images + STEP * gradient.sign()).clamp(0, 1)
    found = exact_pgd(model, images, labels, aim=aim, **FROM_IMAGES | {"steps": 1})
    assert_same_points(found, expected)


def test_a_probability_of_zero_is_no_nan(make_linear_model, images, labels):
    model, moved = make_linear_model(3, sharpness=1e4), images.clone().requires_grad_()
    losses = cross_entropy_by_gate(model.expert_outputs(moved), labels)
    (gradient,) = torch.autograd.grad(losses.mean(1).sum(), moved)
    assert losses.isfinite().all() and gradient.isfinite().all()


# ARC, where the mean loss has no gradient to follow


@torch.no_grad()
def share_fooled(model, images, labels):
    return verdicts(model.expert_outputs(images), labels).failure


def test_arc_finds_what_pgd_on_the_mean_loss_misses(make_linear_model):
    """Two linear classifiers, one of which nearly has the whole gate, that any step within eps
    moves apart: it can fool one of them, and then makes the other surer."""
    model = make_linear_model(2, classes=2)
    pattern = torch.where(torch.arange(3 * 32 * 32) % 2 == 0, 1.0, -1.0) * 1e-3
    with torch.no_grad():
        for expert, sign in zip(model.experts, (1, -1), strict=True):
            expert.linear.weight.copy_(torch.stack([-sign * pattern, sign * pattern]))
            expert.linear.bias.copy_(torch.tensor([0.05, -0.05]))  # a grey image is of class 0
        model.gate = ConstantGate(2)
        model.gate.weights.copy_(torch.tensor([9.0, 0.0]))
    images, labels = torch.full((4, 3, 32, 32), 0.5), torch.zeros(4, dtype=torch.long)
    mean_loss = exact_pgd(model, images, labels, **FROM_IMAGES)
    assert share_fooled(model, images, labels).eq(0).all()
    assert share_fooled(model, mean_loss, labels).eq(0).all()
    assert share_fooled(model, arc(model, images, labels, **BUDGET), labels).eq(0.5).all()


def test_with_arc_no_image_fools_fewer_gates_than_before(make_linear_model, images):
    model = make_linear_model(4)
    with torch.no_grad():
        labels = model(images, gate="uniform").argmax(1)
    shares = [share_fooled(model, images, labels)]
    for eps, steps in ((EPS / 20, 1), (EPS / 20, 3), (EPS / 20, 6), (EPS, 6)):
        found = arc(model, images, labels, eps=eps, step_size=eps / 8, steps=steps)
        shares.append(share_fooled(model, found, labels))
    for before, after in zip(shares, shares[1:], strict=False):
        assert (after >= before).all()
    assert shares[-1].mean() > shares[0].mean()  # EPS crosses the boundary of any expert


# The copy that evaluation attacks, with batch norms folded into convolutions


def count_norms(module):
    return sum(isinstance(one, nn.BatchNorm2d) for one in module.modules())


def draw_norms(module):
    """Every batch norm with statistics and weights of its own, as after training."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, -1.5, 1.5)
                nn.init.normal_(norm.bias, 0, 0.2)
    return module.eval()


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_folded_copy_is_the_same_function_with_fewer_norms(name, images):
    """What stays: in DenseNet those before convolutions, in cells those of two halves at once."""
    layers = 4 if name in BASELINES else None
    model = ImmunityMoE([build_expert(name, 10, 0.0625, layers=layers) for _ in range(2)])
    model = draw_norms(model).double()
    folded, found = fold(model), []
    for one in (model, folded):
        moved = images[:2].double().requires_grad_()
        log_probs = one(moved, gate="trained")
        (gradient,) = torch.autograd.grad(log_probs[:, 0].sum(), moved)
        found.append((log_probs, gradient))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)
    assert found[0][0].std(0).max() > 1e-6  # the images are told apart: the test is not vacuous
    before, after = count_norms(model), count_norms(folded)
    if name == "densenet121":
        assert after == before - 2 * 58  # one before a convolution in each dense layer
    elif name in BASELINES:
        halves = [one for one in model.modules() if type(one).__name__ == "FactorizedReduce"]
        assert after == len(halves) < before
    else:
        assert after == 0 < before


def test_each_norm_is_folded_into_its_own_convolution_or_stays(images):
    """A convolution that is used twice has two norms. What stays: a norm of the batch's own
    statistics, one behind an activation, and one before the convolution."""
    shared = nn.Conv2d(3, 3, 3, padding=1)
    twice = nn.Sequential(shared, nn.BatchNorm2d(3), nn.ReLU(), shared, nn.BatchNorm2d(3))
    staying = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False),
    )  # fmt: skip
    for network, norms in ((twice, 0), (staying, 3)):
        folded = fold(draw_norms(network))
        assert count_norms(folded) == norms
        torch.testing.assert_close(folded(images), network(images))


def test_folding_leaves_the_model_alone(model, images):
    model.train().to(memory_format=torch.channels_last)
    state = copy.deepcopy(model.state_dict())
    folded = fold(model)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    for one, training in ((model, True), (folded, False)):
        assert all(module.training == training for module in one.modules())
        assert all(parameter.requires_grad == training for parameter in one.parameters())
    weights = [one.weight for one in folded.modules() if isinstance(one, nn.Conv2d)]
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)
    before = folded(images, gate="uniform")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(folded(images, gate="uniform"), before)
