"""Attacks: within their budget, true to their closed form, to enumeration over the gates and to
torchattacks, and leaving no trace in the model."""

import copy
import math
from contextlib import nullcontext
from functools import partial
from itertools import permutations

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from immunity_lib import ImmunityMoE, attacks, build_expert, expert_heatmaps
from immunity_lib.attacks import AIMS, ATTACKS, attack_images, cross_entropy_by_gate, exact_pgd, fold, strongest_points
from immunity_lib.evaluate import agreement
from immunity_lib.experts import BASELINES, EXPERT_NAMES
from immunity_lib.moe import GATES, ConstantGate, verdicts

EPS, STEP = 8 / 255, 2 / 255
BUDGET = {"eps": EPS, "step_size": STEP, "steps": 10}


def attack(model, images, labels, name, gate="trained", **changes):
    return attack_images(model, images, labels, name, gate, **BUDGET | changes)


def path_of(model, images, labels, eps, steps=4):
    """PGD on the cross entropy of the plain ensemble, without random start: its points, (steps + 1, B, 3, 32, 32)."""
    raised = lambda points, rows: attacks.cross_entropy(model(points, "uniform"), labels[rows])  # noqa: E731
    eps = torch.tensor(eps, dtype=images.dtype).view(-1, 1, 1, 1)
    path = attacks.ascent_path(raised, images, eps=eps, step_size=STEP, steps=steps, random_start=False)
    return torch.stack(list(path))


def assert_same_points(found, expected):
    """Up to a few pixels: where two gradients round differently near zero, a sign may differ."""
    assert ((found - expected).abs() < 1e-6).double().mean() > 0.999


def by_hand(aim, mixtures, labels):
    """Of log-probabilities (G, B, C), one of each image's mixtures after the other."""
    raised = []
    for image, label in enumerate(labels.tolist()):
        of_gates = []
        for mixture in mixtures[:, image]:
            largest = mixture.sort(descending=True).values
            wrong = max(one for number, one in enumerate(mixture) if number != label)
            apart = wrong - mixture[label]
            of_gates.append(1 / (1 + (-apart).exp()) if aim == "fooled" else apart / (largest[0] - largest[2]))
        raised.append(sum(of_gates) / len(of_gates))
    return torch.stack(raised)


@pytest.mark.parametrize("name", [*ATTACKS, exact_pgd, strongest_points])
@settings(max_examples=15)
@given(gate=st.sampled_from([*GATES, (1, 0)]), eps=st.floats(0, 1), step_size=st.floats(1e-4, 1))
def test_budget_is_kept(make_linear_model, images, labels, name, gate, eps, step_size):
    batch, budget = (make_linear_model(2), images, labels), {"eps": eps, "step_size": step_size}
    if name is strongest_points:
        del budget["step_size"]
    perturb = name if callable(name) else partial(attack, name=name, gate=gate)
    adversarial = perturb(*batch, **budget, steps=3)
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    distance = (adversarial - images).abs().max().item()
    assert distance <= eps + 1e-6
    with pytest.raises(ValueError, match="an adversarial image is .* away from its image; eps is"):
        attacks.check_budget(images, adversarial, distance - 2e-6)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("bim", 1), ("bim", 3), ("bim", 10), ("mim", 3), ("fgsm", 1), ("pgd", 8), ("cw", 8), ("apgd", 8)],
)
def test_attacks_walk_uphill_until_the_border(make_linear_model, images, name, steps):
    """FGSM in one step; from a random start, 8 steps of 2/255 cross the whole ball. The gradient of either label's
    loss has the sign of the other class's weights less own."""
    model, labels = make_linear_model(1, classes=2), torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    weight = model.experts[0].linear.weight.detach().view(2, 3, 32, 32)
    with torch.no_grad():  # a caller who wants no gradients gets the attack all the same
        adversarial = attack(model, images, labels, name, steps=steps)
    distance = EPS if name == "fgsm" else min(steps * STEP, EPS)
    uphill = (images + distance * (weight[1 - labels] - weight[labels]).sign()).clamp(0, 1)
    torch.testing.assert_close(adversarial, uphill)
    if name == "pgd":
        torch.testing.assert_close(exact_pgd(model, images, labels, **BUDGET), adversarial)


@pytest.mark.parametrize("name", ["fgsm", "cw", *AIMS])
def test_a_step_is_along_the_gradient_of_what_is_raised(make_linear_model, images, labels, name):
    """From a random start, save FGSM's; under a permuted gate, or exactly over all of them."""
    model, order, gates = make_linear_model(4), (3, 1, 0, 2), list(permutations(range(4)))
    torch.manual_seed(0)
    start = images.clone()
    if name != "fgsm":
        start = (start + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    outputs = model.expert_outputs(start.requires_grad_())
    shares = [outputs.gate[:, gate, None] * outputs.logits.softmax(-1) for gate in gates]
    mixtures = torch.stack([share.sum(1).log() for share in shares])
    losses, own = -mixtures[:, torch.arange(8), labels], gates.index(order)
    torch.testing.assert_close(cross_entropy_by_gate(outputs, labels), losses.T)
    others = mixtures[own].masked_fill(functional.one_hot(labels, 10).bool(), -100).amax(1)
    torch.testing.assert_close(attacks.margin(mixtures[own], labels), others + losses[own])
    raised = {
        "fgsm": lambda: losses[own], "cw": lambda: others + losses[own], "expected": lambda: losses.mean(0),
    }.get(name, lambda: by_hand(name, mixtures, labels))()  # fmt: skip
    (gradient,) = torch.autograd.grad(raised.sum(), start)
    length = EPS if name == "fgsm" else STEP
    moved = (start.detach() + length * gradient.sign()).clamp(images - EPS, images + EPS)
    torch.manual_seed(0)
    one = partial(attack, name=name, gate=order) if name in ATTACKS else partial(exact_pgd, aim=name)
    assert_same_points(one(model, images, labels, **BUDGET | {"steps": 1}), moved.clamp(0, 1))


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


OVER_ALL_GATES = {
    "exact": lambda *batch, steps: exact_pgd(*batch, **BUDGET | {"steps": steps}),
    "strongest": lambda *batch, steps: strongest_points(*batch, eps=EPS, steps=steps),
    "noise": lambda *batch, steps: attacks.random_noise(*batch, eps=EPS, draws=steps),
    "agreement": lambda model, images, _, steps: agreement(model, images),
}


def test_a_compiled_model_keeps_its_gate(model, images, labels):
    """Whatever is set of a compiled model is set of the one behind it."""
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(
        attack(compiled, images, labels, "bim", "uniform"), attack(model, images, labels, "bim", "uniform")
    )
    assert model.evaluation_gate == compiled.evaluation_gate == "switch"


@pytest.mark.parametrize("name", [*ATTACKS, *OVER_ALL_GATES, "that fails"])
def test_an_attack_leaves_no_trace_in_the_model(model, images, labels, name):
    """Some modules are in train mode, some in eval mode: what a fine-tuning caller may have."""
    model.train()
    model.experts[1].eval()
    model.experts[0].stages[1].eval()
    modes = [module.training for module in model.modules()]
    state, before = copy.deepcopy(model.state_dict()), images.clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def look(module, arguments):
        assert not any(module.training for module in model.modules())
        if name == "that fails":
            raise KeyboardInterrupt

    model.gate.register_forward_pre_hook(look)
    run = OVER_ALL_GATES.get(name) or partial(attack, name=name if name in ATTACKS else "pgd")
    with pytest.raises(KeyboardInterrupt) if name == "that fails" else nullcontext():
        run(model, images, labels, steps=2)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert model.evaluation_gate == "switch" and torch.equal(images, before)


CALLS = {
    "attack_images": lambda *batch: attack(*batch, "pgd"),
    "exact_pgd": lambda *batch: exact_pgd(*batch, **BUDGET),
    "strongest_points": lambda *batch: strongest_points(*batch, eps=EPS, steps=2),
    "auto_attack": lambda *batch: attacks.auto_attack(*batch, "uniform", eps=EPS),
    "random_noise": lambda *batch: attacks.random_noise(*batch, eps=EPS, draws=1),
    "expert_heatmaps": expert_heatmaps,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_A9_images_and_labels_that_the_model_cannot_have_are_refused(model, images, labels, call):
    for spoilt, found in (
        (images * 255, r"found \S+ to 2\d\d\S*: divide 8-bit images by 255"),
        ((images - 0.5) / 0.25, "do not normalise them"),
        (images * float("nan"), "found nan to nan"),
        (images[:, :1], r"images of shape \(8, 1, 32, 32\) .*; give \(B, 3, 32, 32\)"),
        (images[0], r"images of shape \(3, 32, 32\) "),
        (images[:0], r"images of shape \(0, 3, 32, 32\) .*; give .*, B >= 1"),
        (images.bfloat16(), "are torch.bfloat16; give .* torch.float32"),  # it cannot tell 8/255 from 8.5/255
    ):
        with pytest.raises(ValueError, match=found):
            call(model, spoilt, labels[: len(spoilt)])
    for label in (-1, 10):
        with pytest.raises(ValueError, match=f"0 to 9, found .*{label}"):
            call(model, images, torch.where(labels == labels[0], label, labels))
    for wrong in (labels[:1], labels[:7], labels[:, None], labels.int()):
        with pytest.raises(ValueError, match=r"labels of shape \(.* for 8 images are .*; give each .* torch.int64"):
            call(model, images, wrong)


def test_unknown_names_are_refused_with_the_valid_ones(model, images, labels):
    with pytest.raises(ValueError, match="'deepfool'; valid names: fgsm, .*, pgd, cw"):
        attack(model, images, labels, "deepfool")
    with pytest.raises(ValueError, match="trained, uniform, switch"):
        attack(model, images, labels, "fgsm", gate="swtich")
    with pytest.raises(ValueError, match="unknown aim 'mean'; choose one of expected, fooled, ratio"):
        exact_pgd(model, images, labels, aim="mean", **BUDGET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"eps": 8}, "eps is 8; .*0 to 1, as images do: write 8/255"), ({"eps": -0.1}, "eps is -0.1; "),
     ({"eps": float("nan")}, "eps is nan; "), ({"steps": 0}, "s is 0; it must be at least 1: an attack without"),
     *[({"step_size": one}, f"step_size is {one}; .* finite and above 0") for one in (0.0, -STEP, math.nan, math.inf)]],
)  # fmt: skip
def test_a_budget_that_no_attack_can_have_is_refused(model, images, labels, changes, message):
    """An eps of 8, meant as 8/255, would be one of all images; and of no step, robustness."""
    batch, budget = (model, images, labels), BUDGET | changes
    few, steps = {"eps": budget["eps"], "steps": budget["steps"]}, budget["steps"]
    runs = (
        lambda: strongest_points(*batch, **few), lambda: attacks.auto_attack(*batch, "uniform", **few),
        lambda: attacks.random_noise(*batch, eps=budget["eps"], draws=steps),
        lambda: attacks.Effort(budget["eps"], 1.0, 1, (1,), auto_attack_steps=steps),
        lambda: attacks.Effort(budget["eps"], 1.0, 1, (1, steps), 1),
        lambda: attacks.Effort(budget["eps"], 1.0, 1, (1,), 1, auto_attack_images=steps),
    )  # fmt: skip
    for run in (
        lambda: attack(*batch, "pgd", **budget), lambda: attack(*batch, "tpgd", **budget),
        lambda: exact_pgd(*batch, **budget), lambda: attacks.Effort(**budget, samples=(1,), auto_attack_steps=1),
        *(() if "step_size" in changes else runs),  # which have no step of the caller's
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run()


# Climbs of our own: as a library's, along a path, until nothing is left to win, and over the gates


@pytest.mark.parametrize("name", ["bim", "mim", "pgd"])
def test_a_climb_ends_where_that_of_torchattacks_does(model, images, labels, name):
    model, images = model.double(), images.double()
    model.evaluation_gate = "uniform"
    library = {"bim": torchattacks.BIM, "mim": torchattacks.MIFGSM, "pgd": torchattacks.PGD}[name](model, EPS, STEP, 10)
    points = []
    for run in (lambda: library(images, labels), lambda: attack(model, images, labels, name, "uniform")):
        torch.manual_seed(0)
        points.append(run())
    assert_same_points(*points)


def test_the_mean_over_draws_is_that_of_a_pass_for_each(make_linear_model, images, labels):
    model, gates = make_linear_model(4), list(permutations(range(4)))
    torch.manual_seed(0)
    found = attacks.mean_over_draws(model.expert_outputs(images), labels, draws=3)
    torch.manual_seed(0)
    passes = [attacks.cross_entropy(model(images, gates[k]), labels) for k in torch.randint(24, (3,))]
    torch.testing.assert_close(found, torch.stack(passes).mean(0))


@pytest.mark.parametrize("run", [*attacks.CLIMBS, "exact"])
def test_an_early_exit_leaves_images_alone_that_nothing_gets_right_and_no_others(make_linear_model, images, run):
    model, seen = make_linear_model(3), []
    model.gate.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    mixture = model(images, "uniform")
    labels = torch.cat((mixture[:2].argmin(1), mixture[2:].argmax(1)))  # two are wrong already
    perturb = exact_pgd if run == "exact" else partial(attack_images, attack=run, gate="uniform")
    ends, passed = [], []
    for early in (False, True):
        seen.clear()
        torch.manual_seed(0)
        ends.append(perturb(model, images, labels, **BUDGET | {"eps": EPS / 4}, early_exit=early))
        passed.append(sum(seen))
    right = [verdicts(model.expert_outputs(points), labels).any_right for points in ends]
    same = (ends[0] == ends[1]).flatten(1).all(1)
    assert (same | ~right[1]).all() and torch.equal(right[0], right[1])
    assert 0 < right[1].sum() < len(images) and passed[1] < passed[0]


def test_images_leave_by_the_verdict_of_the_model_that_is_judged(make_linear_model, images):
    """What a surrogate gets wrong the model may get right, so that it is climbed to the end."""
    model = make_linear_model(2)
    labels = model.expert_outputs(images).logits[:, 0].argmin(1)  # expert 1 has them all wrong
    suite = {one.name: one for one in attacks.adaptive_attacks(model, attacks.Effort(EPS, STEP, 8, (1,), 1), {})}
    moved, _ = suite["pgd-expert-1"].perturb(images, labels)
    inside = (images > EPS) & (images < 1 - EPS)
    assert ((moved - images).abs()[inside] > EPS - 1e-6).double().mean() > 0.95


def test_a_path_has_every_shorter_attack_and_each_image_its_own_budget(model, images, labels):
    """It begins at the images and ends where BIM does, PGD without random start."""
    model, images = model.double(), images.double()
    budgets = [0.0, 1 / 255, EPS / 2, EPS] * 2
    path = path_of(model, images, labels, budgets)
    assert path.shape == (5, *images.shape) and torch.equal(path[0], images)
    for steps in (1, 3):
        assert torch.equal(path[steps], path_of(model, images, labels, budgets, steps)[-1])
    for row, eps in enumerate(budgets):
        one = slice(row, row + 1)
        alone = attack(model, images[one], labels[one], "bim", "uniform", eps=eps, steps=4)
        assert_same_points(path[-1, one], alone)


def test_a_probability_of_zero_is_no_nan(make_linear_model, images, labels):
    moved = images.clone().requires_grad_()
    losses = cross_entropy_by_gate(make_linear_model(3, sharpness=1e4).expert_outputs(moved), labels)
    (gradient,) = torch.autograd.grad(losses.mean(1).sum(), moved)
    assert losses.isfinite().all() and gradient.isfinite().all()


# The strongest point of all, where the mean loss has no gradient to follow too


@torch.no_grad()
def share_fooled(model, images, labels):
    return verdicts(model.expert_outputs(images), labels).failure


def test_the_strongest_point_is_found_where_pgd_on_the_mean_loss_misses_it(make_linear_model):
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
    mean_loss = attacks.climb(model, images, labels, AIMS["expected"], **BUDGET, random_start=False)
    assert share_fooled(model, images, labels).eq(0).all()
    assert share_fooled(model, mean_loss, labels).eq(0).all()
    assert share_fooled(model, strongest_points(model, images, labels, eps=EPS, steps=10), labels).eq(0.5).all()


def test_at_its_strongest_point_no_image_fools_fewer_gates_than_before(make_linear_model, images):
    model = make_linear_model(4)
    labels = model(images, gate="uniform").argmax(1)
    shares = [share_fooled(model, images, labels)]
    for eps, steps in ((EPS / 20, 1), (EPS / 20, 3), (EPS / 20, 6), (EPS, 6)):
        found = strongest_points(model, images, labels, eps=eps, steps=steps)
        shares.append(share_fooled(model, found, labels))
        assert (shares[-1] >= shares[0]).all()
    assert shares[-1].mean() > shares[0].mean()  # EPS crosses the boundary of any expert


def test_a_network_that_takes_no_empty_batch_is_searched_until_every_image_has_fallen(make_linear_model, images):
    """As one with `view(len(images), -1)`. All fall within the first climb, or have fallen before it."""
    model = make_linear_model(2)
    model.experts[0].linear.register_forward_pre_hook(lambda _, inputs: inputs[0].view(len(inputs[0]), -1))
    with pytest.raises(RuntimeError, match="0 elements"):
        model(images[:0])
    outputs = model.expert_outputs(images)
    for labels in (outputs.mixture("uniform").argmax(1), outputs.mixture("uniform").argmin(1)):
        found = strongest_points(model, images, labels, eps=0.5, steps=3)
        assert share_fooled(model, found, labels).eq(1).all()


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


def answer_and_gradient(network, images):
    moved = images.clone().requires_grad_()
    answer = network(moved)
    return answer, *torch.autograd.grad(answer.square().sum(), moved)


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_folded_copy_is_the_same_function_with_fewer_norms(name, images):
    """What stays: in DenseNet those before convolutions, in cells those of two halves at once."""
    layers = 4 if name in BASELINES else None
    model = ImmunityMoE([build_expert(name, 10, 0.0625, layers=layers) for _ in range(2)], evaluation_gate="trained")
    model = draw_norms(model).double()
    state, folded = copy.deepcopy(model.state_dict()), fold(model)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    found = [answer_and_gradient(one, images[:2].double()) for one in (model, folded)]
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)
    assert found[0][0].std(0).max() > 1e-6  # the images are told apart: the test is not vacuous
    halves = sum(type(one).__name__ == "FactorizedReduce" for one in model.modules())
    # In DenseNet, one in each dense layer is folded
    stay = count_norms(model) - 2 * 58 if name == "densenet121" else halves
    assert count_norms(folded) == stay < count_norms(model)


class Residual(nn.Sequential):
    def forward(self, images):
        activations = self[0](images)
        return self[1](activations) + activations


class Doubled(nn.Conv2d):
    def forward(self, images):
        return 2 * super().forward(images)


class Shifted(nn.ReLU):
    def forward(self, images):
        return super().forward(images) - 0.3


def hooked(module, kind):
    """Twice what the module gives, or of its gradient."""
    double = lambda _, *passed: 2 * passed[-1] if kind == "forward" else (2 * passed[0][0],)  # noqa: E731
    getattr(module, f"register_{kind}_hook")(double)
    return module


PAIR = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
FOLDED = {  # and how many norms stay
    "used twice": (lambda one, norm: nn.Sequential(one, norm, nn.ReLU(), one, nn.BatchNorm2d(3)), 0),
    "norm first": (lambda one, norm: nn.Sequential(norm, one), 1),
    "behind an activation": (lambda one, norm: nn.Sequential(one, nn.ReLU(), norm), 1),
    "the batch's own": (lambda one, _: nn.Sequential(one, nn.BatchNorm2d(3, track_running_stats=False)), 1),
    "own forward": (lambda one, norm: Residual(one, norm), 1),
    "own convolution": (lambda _, norm: nn.Sequential(Doubled(3, 3, 3), norm), 1),
    "hooks": (lambda one, norm: nn.Sequential(nn.utils.spectral_norm(one), norm), 1),
    "parametrized": (lambda one, norm: nn.Sequential(nn.utils.parametrizations.weight_norm(one), norm), 1),
    "own activation": (lambda one, norm: nn.Sequential(one, norm, Shifted()), 0),
    "hook on activation": (lambda one, norm: nn.Sequential(one, norm, hooked(nn.ReLU(), "forward")), 0),
    "backward hook": (lambda one, norm: nn.Sequential(hooked(one, "full_backward"), norm), 1),
    "backward pre-hook": (lambda one, norm: nn.Sequential(hooked(one, "full_backward_pre"), norm), 1),
    "pruned": (lambda one, norm: nn.Sequential(torch.no_grad()(prune.l1_unstructured)(one, "weight", 0.5), norm), 1),
}


@pytest.mark.parametrize(("make", "stay"), FOLDED.values(), ids=FOLDED)
def test_a_norm_is_folded_into_its_own_plain_convolution_or_stays(images, make, stay):
    network = draw_norms(make(*copy.deepcopy(PAIR)))
    assert count_norms(folded := fold(network)) == stay
    found = [answer_and_gradient(one, images) for one in (folded, network)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_folded_copy_is_its_own_and_for_evaluation_alone(model, images):
    model.train().to(memory_format=torch.channels_last)
    folded = fold(model)
    for one, training in ((model, True), (folded, False)):
        assert all(module.training == training for module in one.modules())
        assert all(parameter.requires_grad == training for parameter in one.parameters())
    weights = [one.weight for one in folded.modules() if isinstance(one, nn.Conv2d)]
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)
    before = folded(images, gate="uniform")
    model.requires_grad_(False).apply(lambda one: [p.zero_() for p in one.parameters()])
    assert torch.equal(folded(images, gate="uniform"), before)
