"""The paper's attacks: within their budget, true to their closed form, and leaving no trace."""

import pytest
import torch
import torchattacks
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from immunity_lib.attacks import ATTACKS, attack_images, check_budget
from immunity_lib.heatmaps import expert_heatmaps
from immunity_lib.moe import GATES

EPS = 8 / 255


def attack(model, images, labels, name, gate="trained", eps=EPS, step_size=2 / 255, steps=10):
    return attack_images(
        model, images, labels, name, gate, eps=eps, step_size=step_size, steps=steps
    )


@pytest.fixture(scope="module")
def binary_labels():
    return torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])


@pytest.fixture
def linear_model(make_linear_model):
    """A single linear expert of two classes: its loss rises along one fixed sign pattern."""
    return make_linear_model(1, classes=2)


def ascent_direction(model, labels):
    """Sign of the gradient of either label's cross entropy: the other class's weights less own."""
    weight = model.experts[0].linear.weight.detach().view(2, 3, 32, 32)
    return (weight[1 - labels] - weight[labels]).sign()


@pytest.mark.parametrize("name", ATTACKS)
@given(
    gate=st.sampled_from([*GATES, (1, 0)]), eps=st.floats(0, 1), step=st.floats(1e-4, 1)
)  # fmt: skip
def test_budget_is_kept(make_linear_model, images, labels, name, gate, eps, step):
    model = make_linear_model(2)
    adversarial = attack(model, images, labels, name, gate, eps, step, steps=3)
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (adversarial - images).abs().max() <= eps + 1e-6


def test_fgsm_is_one_step_along_the_sign(linear_model, images, binary_labels):
    expected = (images + EPS * ascent_direction(linear_model, binary_labels)).clamp(0, 1)
    adversarial = attack(linear_model, images, binary_labels, "fgsm")
    torch.testing.assert_close(adversarial, expected)


@pytest.mark.parametrize("name", ["bim", "mim"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_iterative_attacks_walk_until_the_border(linear_model, images, binary_labels, name, steps):
    distance = min(steps * 2 / 255, EPS)
    expected = (images + distance * ascent_direction(linear_model, binary_labels)).clamp(0, 1)
    adversarial = attack(linear_model, images, binary_labels, name, steps=steps)
    torch.testing.assert_close(adversarial, expected)


@pytest.mark.parametrize("name", ["pgd", "cw", "apgd"])
def test_the_border_is_reached_from_any_start(linear_model, images, binary_labels, name):
    """8 steps of 2/255 cross the whole ball."""
    expected = (images + EPS * ascent_direction(linear_model, binary_labels)).clamp(0, 1)
    adversarial = attack(linear_model, images, binary_labels, name, steps=8)
    torch.testing.assert_close(adversarial, expected)


@pytest.mark.parametrize("name", ["pgd", "ffgsm", "cw"])
def test_random_starts_differ(linear_model, images, binary_labels, name):
    one, other = (attack(linear_model, images, binary_labels, name, steps=1) for _ in range(2))
    assert (one - other).abs().max() > EPS / 4


def test_ffgsm_moves_every_free_pixel_uphill(linear_model, images, binary_labels):
    """From anywhere in the ball, a step of 1.25 eps ends at least eps / 4 beyond the centre."""
    direction = ascent_direction(linear_model, binary_labels)
    adversarial = attack(linear_model, images, binary_labels, "ffgsm")
    free = (images > EPS) & (images < 1 - EPS)
    assert ((adversarial - images) * direction)[free].min() >= EPS / 4 - 1e-6


def test_cw_raises_the_margin_of_the_mixture(make_linear_model, images, labels):
    """One step is along the gradient of the margin, by hand, at the random start."""
    model, order = make_linear_model(5), (3, 1, 4, 0, 2)
    torch.manual_seed(0)
    start = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1).requires_grad_()
    outputs = model.expert_outputs(start)
    mixture = (outputs.gate[:, order, None] * outputs.logits.softmax(-1)).sum(1).log()
    others = mixture.masked_fill(functional.one_hot(labels, 10).bool(), -100)
    margins = others.max(1).values - mixture[torch.arange(len(labels)), labels]
    (gradient,) = torch.autograd.grad(margins.sum(), start)
    moved = (start.detach() + 2 / 255 * gradient.sign()).clamp(images - EPS, images + EPS)
    torch.manual_seed(0)
    found = attack(model, images, labels, "cw", gate=order, steps=1)
    assert ((found - moved.clamp(0, 1)).abs() < 1e-6).double().mean() > 0.999


def test_gradient_is_that_of_the_mixture(make_linear_model, images, labels):
    """FGSM of five experts under a permuted gate, against the gradient of eq (1) by hand."""
    model, order = make_linear_model(5), (3, 1, 4, 0, 2)
    moved = images.clone().requires_grad_()
    outputs = model.expert_outputs(moved)
    mixture = (outputs.gate[:, order, None] * outputs.logits.softmax(-1)).sum(1)
    loss = functional.nll_loss(mixture.log(), labels)
    (gradient,) = torch.autograd.grad(loss, moved)
    found = attack(model, images, labels, "fgsm", gate=order)
    expected = (images + EPS * gradient.sign()).clamp(0, 1)
    agree = (found - expected).abs() < 1e-6  # the two gradients round differently near zero
    assert agree.double().mean() > 0.999


def test_more_steps_find_a_higher_loss(trained, dataset):
    split = dataset.splits["train"]
    images, labels = split.images.float() / 255, split.labels

    def loss(images):
        return functional.nll_loss(trained(images, gate="trained"), labels).item()

    torch.manual_seed(0)
    found = {name: loss(attack(trained, images, labels, name)) for name in ATTACKS}
    for iterative in ("bim", "mim", "pgd", "apgd"):
        assert found[iterative] >= found["fgsm"] - 1e-4
    assert found["fgsm"] > loss(images) + 0.1


def test_apgd_fools_as_many_as_that_of_torchattacks(trained, dataset):
    """Which keeps the last point that fools, where ours is the point of the highest loss."""
    split = dataset.splits["train"]
    images, labels = split.images.float() / 255, split.labels
    torch.manual_seed(0)
    found = attack(trained, images, labels, "apgd", eps=2 / 255)
    with trained.evaluated_with("trained"):
        expected = torchattacks.APGD(trained, eps=2 / 255, steps=10)(images, labels)
        robust = [(trained(one).argmax(1) == labels).sum() for one in (expected, found)]
    assert 0 < robust[0] < len(images)
    assert abs(robust[0] - robust[1]) <= 2


def test_apgd_starts_where_the_random_state_says(trained, images, labels):
    """torchattacks' own would set the seed itself, the same for every batch."""
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(attack(trained, images, labels, "apgd", steps=2))
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


@pytest.mark.parametrize("gate", ["trained", "uniform", "switch-per-image", (2, 1, 0)])
def test_attacker_sees_the_given_gate_and_the_model_keeps_its_own(model, images, labels, gate):
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.evaluation_gate))
    attack(model, images, labels, "pgd", gate, steps=3)
    assert seen == [gate] * 3
    assert model.evaluation_gate == "switch"


def with_mixed_modes(model):
    """Some modules in train mode, some in eval mode: what a fine-tuning caller may have."""
    model.train()
    model.experts[1].eval()
    model.experts[0].stages[1].eval()
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_no_trace_in_the_model(model, images, labels, name):
    modes = with_mixed_modes(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = images.clone()
    attack(model, images, labels, name, steps=2)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert torch.equal(images, before)


def test_model_is_restored_when_an_attack_fails(model, images, labels):
    modes = with_mixed_modes(model)

    def fail(module, arguments):
        assert not any(module.training for module in module.modules())
        raise KeyboardInterrupt

    model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        attack(model, images, labels, "pgd", gate="uniform")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.evaluation_gate == "switch"


def test_attack_works_within_no_grad(linear_model, images, binary_labels):
    with torch.no_grad():
        adversarial = attack(linear_model, images, binary_labels, "fgsm")
    assert (adversarial != images).any()


@pytest.mark.parametrize("name", ATTACKS)
def test_images_that_the_model_is_certain_of_are_attacked_or_left_alone(
    make_linear_model, images, binary_labels, name
):
    """So certain that the gradient is exactly zero: there is no direction to go."""
    model = make_linear_model(1, classes=2, sharpness=1e4)
    with torch.no_grad():
        certain = model(images, gate="trained").argmax(-1)
    adversarial = attack(model, images, certain, name)
    assert (adversarial - images).abs().max() <= EPS + 1e-6


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda images: images * 255, r"found \S+ to 2\d\d\S*: divide 8-bit images by 255"),
        (lambda images: (images - 0.5) / 0.25, "do not normalise them"),
        (lambda images: images * float("nan"), "found nan to nan"),
    ],
)
def test_images_outside_their_range_are_refused(model, images, labels, spoil, found):
    with pytest.raises(ValueError, match=found):
        attack(model, spoil(images), labels, "fgsm")


def test_budget_check_names_the_distance(images):
    check_budget(images, (images + EPS).clamp(0, 1), EPS)
    moved = images.clone()
    moved[0, 0, 0, 0] = 1 - moved[0, 0, 0, 0].round()
    with pytest.raises(ValueError, match=r"is 0\.\d+ away from its image; eps is 0\.0313"):
        check_budget(images, moved, EPS)


def test_unknown_attack_names_the_valid_ones(model, images, labels):
    with pytest.raises(ValueError, match="'deepfool'; valid names: fgsm, bim, .*, apgd"):
        attack(model, images, labels, "deepfool")


def test_unknown_gate_is_refused_and_the_model_restored(model, images, labels):
    with pytest.raises(ValueError, match="trained, uniform, switch"):
        attack(model, images, labels, "fgsm", gate="swtich")
    assert model.evaluation_gate == "switch"


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_the_model_does_not_have_are_refused(model, images, labels, label):
    wrong = labels.clone()
    wrong[0] = label
    budget = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 1}
    with pytest.raises(ValueError, match=f"0 to 9, found .*{label}"):
        attack_images(model, images, wrong, "pgd", "uniform", **budget)
    with pytest.raises(ValueError, match=f"0 to 9, found .*{label}"):
        expert_heatmaps(model, images, wrong)
