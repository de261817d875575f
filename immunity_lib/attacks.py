"""Attacks in l_inf on images in [0, 1]: the paper's, and those that know the random switch gate.

An attack takes a model, images (B, 3, 32, 32) in [0, 1] and labels (B,), raises ValueError on others, and gives
adversarial images, each pixel within eps of its image's. eps and step sizes are in units of [0, 1]. gate: what the
attacker's forward passes use, see `ImmunityMoE`; libraries call a bare `model(images)`, whose gate it then is.
"""

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from immunity_lib.moe import (
    ROUNDING,
    ConstantGate,
    ExpertOutputs,
    Gate,
    ImmunityMoE,
    check_batch,
    check_images,
    in_eval_mode,
    permutations,
    switched_probabilities,
    verdicts,
)


def margin(log_probs: Tensor, labels: Tensor) -> Tensor:
    """(..., ): max_{j != y} z_j - z_y, positive where the model is fooled (Carlini & Wagner 2017, arXiv 1608.04644).
    Log-probabilities z (..., C) have the margins of logits."""
    own = labels[..., None]
    return log_probs.scatter(-1, own, -torch.inf).amax(-1) - log_probs.gather(-1, own).squeeze(-1)


cross_entropy = partial(functional.cross_entropy, reduction="none")
# What each climbs, of the mixture's log-probabilities and the labels, and how, see `ascent_path`. PGD starts at a
# random point of the ball and BIM at the image, their one difference; MIM's momentum decays by 1.0. FGSM is one step.
CLIMBS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict]] = {
    "bim": (cross_entropy, {"random_start": False}),
    "mim": (cross_entropy, {"random_start": False, "decay": 1.0}),
    "pgd": (cross_entropy, {}),
    # As Madry et al. (2018, arXiv 1706.06083) use the Carlini-Wagner margin; torchattacks' own CW is in l_2
    "cw": (margin, {}),
}
# Of torchattacks: from a model and a budget to what attacks (images, labels)
OF_LIBRARY: dict[str, Callable] = {
    # PGD on the divergence from the clean answer, which TRADES trains on
    "tpgd": lambda library, model, eps, step, steps: library.TPGD(model, eps, step, steps),
    # FGSM from a random start with a step of 1.25 eps: adversarial training on small machines
    "ffgsm": lambda library, model, eps, step, steps: library.FFGSM(model, eps, 1.25 * eps),
    # Auto-PGD (Croce & Hein 2020, arXiv 2003.01690) on the cross entropy, from one start: each image's point of the
    # highest loss. A plain call would hand back unmoved what it did not fool or what was misclassified anyway: right
    # for one fixed gate, but too weak for the others.
    "apgd": lambda library, model, eps, step, steps: (
        lambda *batch: library.APGD(model, eps=eps, steps=steps).perturb(*batch, best_loss=True)[1]
    ),
}
ATTACKS = ("fgsm", *OF_LIBRARY, *CLIMBS)


def attack_images(
    model: ImmunityMoE, images: Tensor, labels: Tensor, attack: str, gate: Gate, *,
    eps: float, step_size: float, steps: int, early_exit: bool = False, strict: bool = True,
) -> Tensor:  # fmt: skip
    """Adversarial images by one of ATTACKS, checked to keep their budget. The model is attacked in eval mode, and the
    mode of each of its modules is as before afterwards. early_exit: see `climb`; for those of CLIMBS. strict: raise
    ValueError where a gradient is NaN, for OF_LIBRARY at the images alone. Training is not strict: until its batch
    norms have seen enough, a network in eval mode may give NaN."""
    if attack not in ATTACKS:
        raise ValueError(f"unknown attack {attack!r}; valid names: {', '.join(ATTACKS)}")
    if attack == "fgsm":
        attack, step_size, steps, early_exit = "bim", eps, 1, False  # an exit after the only step saves nothing
    if attack in CLIMBS:
        raised, how = CLIMBS[attack]
        adversarial = climb(
            model, images, labels, lambda outputs, labels: raised(outputs.mixture(gate), labels),
            eps=eps, step_size=step_size, steps=steps, early_exit=early_exit, strict=strict, **how,
        )  # fmt: skip
    else:
        check_effort(eps, step_size, steps=steps)
        check_batch(model, images, labels)
        if strict:  # at the trained gate, which draws nothing that the attack would then draw otherwise
            attack_images(model, images, labels, "fgsm", "trained", eps=eps, step_size=eps, steps=1)
        import torchattacks  # costs a second, which only attackers should pay

        before, model.evaluation_gate = model.evaluation_gate, gate
        try:
            with in_eval_mode(model), torch.enable_grad():  # torchattacks would leave some of the model in train mode
                adversarial = OF_LIBRARY[attack](torchattacks, model, eps, step_size, steps)(images, labels)
        finally:
            model.evaluation_gate = before
    check_budget(images, adversarial, eps)
    return adversarial


def climb(
    model: ImmunityMoE, images: Tensor, labels: Tensor, raised: Callable[[ExpertOutputs, Tensor], Tensor], *,
    eps: float, step_size: float, steps: int, early_exit: bool = False, **how,
) -> Tensor:  # fmt: skip
    """Adversarial images where an `ascent_path` ends, on the model in eval mode.

    raised: of the experts' outputs and the labels, (B,). early_exit: an image that is wrong under every gate and by
    every expert alone stays where it is, since nothing is left to win; for judging a model, not for training it.
    how: the path's options, as strict.
    """
    check_effort(eps, step_size, steps=steps)
    check_batch(model, images, labels)

    def objective(points: Tensor, rows: Tensor) -> Tensor:
        outputs = model.expert_outputs(points)
        found = raised(outputs, labels[rows])
        return found.masked_fill(~verdicts(outputs, labels[rows]).any_right, torch.inf) if early_exit else found

    with in_eval_mode(model):
        return ascend(objective, images, eps=eps, step_size=step_size, steps=steps, early_exit=early_exit, **how)


def ascent_path(
    objective: Callable[[Tensor, Tensor], Tensor], images: Tensor, *,
    eps: float | Tensor, step_size: float, steps: int, random_start: bool = True, falling: bool = False,
    decay: float = 0.0, early_exit: bool = False, strict: bool = True,
) -> Iterator[Tensor]:  # fmt: skip
    """PGD (Madry et al. 2018, arXiv 1706.06083): where it starts, and where it is after each step.

    objective: from points (b, 3, 32, 32) of some of the images, and their rows (b,), to what is raised, (b,).
    eps: a float, or each image's own as (B, 1, 1, 1), then without a random start. falling: the step falls from
    step_size to 0 by a cosine. decay: of the momentum of MIM (Dong et al. 2018, arXiv 1710.06081). early_exit: images
    whose objective is infinite stay where they are, and cost no more; the path ends where none is left. strict: raise
    ValueError at its end if a gradient was NaN, or too large for momentum.
    """
    points = images = images.detach()
    astray = torch.zeros((), dtype=torch.bool, device=images.device)
    if random_start:
        points = (points + torch.empty_like(points).uniform_(-eps, eps)).clamp(0, 1)
    yield points
    # Of the images that go on
    left, centres, momentum = points, images, torch.zeros_like(images)
    rows = torch.arange(len(images), device=images.device)
    reach = torch.as_tensor(eps, dtype=images.dtype, device=images.device).expand(len(images), 1, 1, 1)
    for step in range(steps):
        start = left.clone().requires_grad_()
        with torch.enable_grad():
            raised = objective(start, rows)
            (gradient,) = torch.autograd.grad(raised.sum(), start)
        astray |= gradient.isnan().any()
        if early_exit and (done := raised.isposinf()).any():
            of_all = rows, left, centres, reach, gradient, momentum
            rows, left, centres, reach, gradient, momentum = (one[~done] for one in of_all)
            if not len(rows):
                break
        if decay:
            size = gradient.abs().mean((1, 2, 3), keepdim=True)
            astray |= size.isinf().any()
            momentum = gradient = gradient / size.clamp(min=torch.finfo(size.dtype).tiny) + decay * momentum
        length = step_size * (1 + math.cos(math.pi * step / steps)) / 2 if falling else step_size
        left = within_budget(left + length * gradient.sign(), centres, reach)
        points = left if len(left) == len(images) else points.index_copy(0, rows, left)
        yield points
    if strict and astray:  # read but once, since a GPU is waited for
        raise ValueError(
            "the model's gradient in its images is NaN, or too large for momentum, where an attack stands still, which "
            "would look like robustness; mend the model, where it takes a root or logarithm of 0 for instance"
        )


def ascend(objective: Callable[[Tensor, Tensor], Tensor], images: Tensor, **options) -> Tensor:
    """Where an `ascent_path` ends."""
    return deque(ascent_path(objective, images, **options), maxlen=1).pop()


# What an attack on all gates raises for each image, from the experts' outputs and the labels, (B,): the mean over a
# uniform permutation of the cross entropy; of sigmoid(margin), a smooth share of gates that are fooled; and of the
# difference-of-logits ratio (Croce & Hein 2020, arXiv 2003.01690), which the scale of the logits masks less: only where
# probabilities are too small for the precision
AIMS: dict[str, Callable[[ExpertOutputs, Tensor], Tensor]] = {
    "expected": lambda outputs, labels: cross_entropy_by_gate(outputs, labels).mean(1),
    "fooled": lambda outputs, labels: margin(*_by_gate(outputs, labels)).sigmoid().mean(-1),
    "ratio": lambda outputs, labels: difference_of_logits_ratio(*_by_gate(outputs, labels)).mean(-1),
}


def exact_pgd(
    model: ImmunityMoE, images: Tensor, labels: Tensor, *,
    eps: float, step_size: float, steps: int, aim: str = "expected", early_exit: bool = False,
) -> Tensor:  # fmt: skip
    """PGD on an exact expectation over all permutations of the gate.

    The N! gates share the experts' outputs, so the loss under each of them, its expectation and its gradient cost one
    pass; averaging the loss of sampled gates ("expectation over transformation", Athalye et al. 2018, arXiv
    1802.00420) costs one for every sample.
    aim: what is raised, one of `AIMS`. Raises ValueError for others. early_exit: see `climb`.
    """
    if aim not in AIMS:
        raise ValueError(f"unknown aim {aim!r}; choose one of {', '.join(AIMS)}")
    return climb(model, images, labels, AIMS[aim], eps=eps, step_size=step_size, steps=steps, early_exit=early_exit)


@torch.no_grad()
def strongest_points(model: ImmunityMoE, images: Tensor, labels: Tensor, *, eps: float, steps: int) -> Tensor:
    """Of all points on the way of PGD on each of the `AIMS`, the one that the most gates get wrong.

    The step falls from eps to 0 by a cosine: a long search and a fine one need both (as Auto-PGD halves its own).
    Images that every gate gets wrong are let be."""
    check_effort(eps, eps, steps=steps)
    check_batch(model, images, labels)

    def look_at(points: Tensor, rows: Tensor, aim: str, left: Tensor) -> Tensor:
        """What the aim raises at points of some of the images that are left; the best points are kept."""
        outputs, rows = model.expert_outputs(points), left[rows]
        share = verdicts(outputs, labels[rows]).failure
        better = share > fooled[rows]
        best[rows[better]], fooled[rows[better]] = points[better].detach(), share[better]
        return AIMS[aim](outputs, labels[rows]).masked_fill(share == 1, torch.inf)

    with in_eval_mode(model):
        best, fooled = images.clone(), verdicts(model.expert_outputs(images), labels).failure
        for aim in AIMS:
            left = (fooled < 1).nonzero().squeeze(1)
            if len(left):  # some networks cannot take a batch of no images
                raised = partial(look_at, aim=aim, left=left)
                how = {"eps": eps, "step_size": eps, "steps": steps, "falling": True, "early_exit": True}
                raised(ascend(raised, images[left], **how), torch.arange(len(left), device=left.device))
    return best


def mean_over_draws(outputs: ExpertOutputs, labels: Tensor, draws: int) -> Tensor:
    """The mean cross entropy over so many gates drawn at random, (B,): what "expectation over transformation" raises.
    Libraries run one pass for every draw."""
    by_gate = cross_entropy_by_gate(outputs, labels)
    return by_gate[:, torch.randint(by_gate.shape[1], (draws,), device=by_gate.device)].mean(1)


def _by_gate(outputs: ExpertOutputs, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the mixture under every permutation of its gate, (B, N!, C), and the label for each."""
    probabilities = switched_probabilities(outputs)
    # Far below what any mixture of float32 probabilities gives, and the logarithm stays finite
    return probabilities.clamp(min=1e-30).log(), labels[:, None].expand(probabilities.shape[:2])


def cross_entropy_by_gate(outputs: ExpertOutputs, labels: Tensor) -> Tensor:
    """The mixture's cross entropy under every permutation of its gate, (B, N!)."""
    own = outputs.log_probs.gather(2, labels[:, None, None].expand(-1, outputs.logits.shape[1], 1))
    gates = outputs.log_gate[:, permutations(own.shape[1]).to(labels.device)]
    # Eq. (1) for all gates, of the label's probability alone: (B, N!, N) + (B, 1, N)
    return -(gates + own.mT).logsumexp(-1)


def difference_of_logits_ratio(log_probs: Tensor, labels: Tensor) -> Tensor:
    """(..., ): the margin over the distance of the first to the third largest, of log-probabilities (..., C); of two
    classes the margin alone, since over the distance of the two it would be 1 or -1, without a slope."""
    if log_probs.shape[-1] < 3:
        return margin(log_probs, labels)
    largest = log_probs.topk(3, dim=-1).values
    return margin(log_probs, labels) / (largest[..., 0] - largest[..., -1]).clamp(min=1e-12)


@torch.no_grad()
def random_noise(model: ImmunityMoE, images: Tensor, labels: Tensor, *, eps: float, draws: int) -> Tensor:
    """Of so many corners of the eps-ball around each image, drawn at random, the one that the most gates get wrong.
    It uses no gradient: if it finds what gradients miss, they mislead (Carlini et al. 2019, arXiv 1902.06705,
    sections 4.3 and 4.11)."""
    check_effort(eps, eps, draws=draws)
    check_batch(model, images, labels)
    best, most = images.clone(), torch.full((len(images),), -1.0, dtype=torch.double, device=images.device)
    with in_eval_mode(model):
        for _ in range(draws):
            points = within_budget(images + eps * torch.randint_like(images, 2).mul_(2).sub_(1), images, eps)
            failure = verdicts(model.expert_outputs(points), labels).failure
            better = failure > most
            best[better], most[better] = points[better], failure[better]
    return best


QUERIES_PER_STEP = 50  # of Square: 5,000 beside 100 steps of the gradient attacks, as published
DRAWS_PER_STEP = 5  # of random noise: 500 points beside 100 steps
PARTS_OF_AUTO_ATTACK = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
FEWEST_CLASSES = 4  # that the targeted loss of AutoAttack can tell apart


def auto_attack(
    model: ImmunityMoE, images: Tensor, labels: Tensor, gate: Gate, *,
    eps: float, steps: int = 100, only: tuple[str, ...] = (),
) -> tuple[Tensor, list[str]]:  # fmt: skip
    """AutoAttack (Croce & Hein 2020, arXiv 2003.01690): adversarial images, and its warnings.

    A fixed gate gets the "standard" version (APGD on the cross entropy, targeted APGD and FAB, Square), a random one
    "rand" (APGD on cross entropy and DLR, gradients averaged over 20 draws). It stops at the first point that fools
    the gate it sees, and under a random gate one lucky draw counts, so its images want judging under all gates.
    steps: of each gradient attack; 100 is AutoAttack as published. only: some of PARTS_OF_AUTO_ATTACK, as ("square",).
    Raises ValueError for others, and for fewer than four classes where an attack needs them. It draws from a seed of
    its own, without touching the caller's random state.
    """
    if isinstance(only, str) or not set(only) <= set(PARTS_OF_AUTO_ATTACK):
        raise ValueError(f"only is {only!r}; give a tuple of some of {', '.join(PARTS_OF_AUTO_ATTACK)}")
    check_effort(eps, eps, steps=steps)
    from pyautoattack import AutoAttack  # costs a second, which only attackers should pay

    check_batch(model, images, labels)
    classes = model.experts[0].num_classes
    if classes < FEWEST_CLASSES and tuple(only) != ("square",):
        raise ValueError(
            f"AutoAttack needs at least {FEWEST_CLASSES} classes, the model has {classes}; attacks "
            "that work: those of attack_images, exact_pgd, strongest_points, and Square alone"
        )
    target = fold(model)
    target.evaluation_gate = gate
    # It views gradients as lines, which this puts in order: the model's own layout is faster inside
    target.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(1).unflatten(1, inputs[0].shape[1:]),))
    version = "rand" if gate in ("switch", "switch-per-image") else "standard"
    judge = AutoAttack(target, eps=eps, version=version, seed=0, device=images.device)
    judge.attacks_to_run = list(only) or judge.attacks_to_run
    for attack in (judge.apgd, judge.apgd_targeted):
        attack.n_iter = attack.n_iter_orig = steps
    judge.fab.n_iter = steps
    judge.square.n_queries = QUERIES_PER_STEP * steps
    judge.apgd_targeted.n_target_classes = judge.fab.n_target_classes = min(9, classes - 1)
    warnings, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    judge.logger.addHandler(handler)
    try:
        with torch.random.fork_rng():  # it sets the seed of all that draws
            adversarial, _ = judge.run_standard_evaluation(images.contiguous(), labels, batch_size=len(images))
    finally:
        judge.logger.removeHandler(handler)
    # What they refer to is a file of AutoAttack's own repository
    told = dict.fromkeys(one.replace(" See flags_doc.md for details.", "") for one in warnings)
    return adversarial.detach(), list(told)


FAMILIES = {
    "paper": "the paper's setting",
    "frozen": "one frozen gate",
    "sampled": "expectation by sampling",
    "exact": "exact over all gates",
    "judges": "standard judges",
    "black box": "without gradients",
    "transfer": "from other models",
}
# AutoAttack is in neither: it ends with Square, which needs no gradient
WHITE_BOX, BLACK_BOX = ("paper", "frozen", "sampled", "exact"), ("black box", "transfer")


@dataclass(frozen=True)
class Effort:
    """How hard the adaptive attacks try."""

    eps: float
    step_size: float
    steps: int  # of PGD and its kin
    samples: tuple[int, ...]  # of the gate for each gradient of EOTPGD, an attack for each
    auto_attack_steps: int  # its Square has 50 queries for each, Square alone 10, random noise 5 draws
    auto_attack_images: int | None = None  # the first ones, for AutoAttack and what needs no gradient; None: all

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("steps", "auto_attack_steps", "auto_attack_images")}
        check_effort(self.eps, self.step_size, samples=min(self.samples, default=1), **counts)


@dataclass(frozen=True)
class AdaptiveAttack:
    """One attack by its name in a report."""

    name: str
    family: str  # one of FAMILIES
    sees: str  # the gate, or the other model, through which it looks
    # Of images and labels: adversarial images, and what the attack says of the model, if anything
    perturb: Callable[[Tensor, Tensor], tuple[Tensor, list[str]]]


def adaptive_attacks(model: ImmunityMoE, effort: Effort, surrogates: Mapping[str, ImmunityMoE]) -> list[AdaptiveAttack]:
    """Every attack that knows the defence, on the model's folded copy, in the order of a report: from the paper's
    setting over sampled gates to their exact expectation, and standard judges, on the gates that are not random (on a
    random one, AutoAttack takes its first lucky draw for a success).

    surrogates: other trained models by name, through whose plain ensembles it is attacked too. AutoAttack is left out
    for fewer than four classes. To add an attack, add it here. Raises ValueError for a model that cannot give what
    they need, a mixture's experts and gate, and for a surrogate with the name of what another attack sees.
    """
    if not isinstance(model, ImmunityMoE):
        raise ValueError(
            f"the attacks on all gates need a mixture with a gate (ImmunityMoE), and got a {type(model).__name__}; "
            "attacks that work on any model that gives gradients: torchattacks' FGSM, BIM, MIFGSM and PGD, and without "
            "gradients: its Square"
        )
    target, device, several = fold(model), next(model.parameters()).device, len(model.experts) > 1
    budget = {"eps": effort.eps, "step_size": effort.step_size, "steps": effort.steps}
    slow = {"eps": effort.eps, "steps": effort.auto_attack_steps}
    attacks: list[AdaptiveAttack] = []

    def add(name: str, family: str, sees: str, perturb: Callable[[Tensor, Tensor], Tensor]) -> None:
        attacks.append(AdaptiveAttack(name, family, sees, lambda *batch: (perturb(*batch), [])))

    def seeing(attack: str, gate: str, through: ImmunityMoE = target) -> Callable:
        early = {"early_exit": through is target}  # what another model gets wrong, this one may get right
        return lambda images, labels: attack_images(through, images, labels, attack, gate, **budget, **early)

    for name in ("fgsm", "bim", "mim", "pgd"):
        add(name, "paper", "switch", seeing(name, "switch"))
    for gate in ("trained", "uniform")[: 1 + several]:  # a single expert has one gate
        add(f"pgd-{gate}", "frozen", gate, seeing("pgd", gate))
    for draws in effort.samples * several:
        raised = partial(mean_over_draws, draws=draws)
        add(f"eotpgd-{draws}", "sampled", "switch", partial(climb, target, raised=raised, early_exit=True, **budget))
    add("exact-expected", "exact", "all gates", partial(exact_pgd, target, early_exit=True, **budget))
    search = partial(strongest_points, target, eps=effort.eps, steps=2 * effort.steps)
    add("exact-strongest", "exact", "all gates", search)
    if target.experts[0].num_classes >= FEWEST_CLASSES:
        for gate in ("trained", "uniform")[: 1 + several]:
            perturb = partial(auto_attack, target, gate=gate, **slow)
            attacks.append(AdaptiveAttack(f"autoattack-{gate}", "judges", gate, perturb))
    # Square (Andriushchenko et al. 2020, arXiv 1912.00049) on the margin, as AutoAttack ends with it
    few = slow | {"steps": max(effort.auto_attack_steps // 5, 1)}
    square = partial(auto_attack, target, gate="uniform", only=("square",), **few)
    add("square", "black box", "uniform", lambda *batch: square(*batch)[0])
    noise = partial(random_noise, target, eps=effort.eps, draws=DRAWS_PER_STEP * effort.auto_attack_steps)
    add("noise", "black box", "all gates", noise)
    for number, expert in enumerate(target.experts, start=1):
        alone = ImmunityMoE([expert], ConstantGate(1), "uniform").to(device)
        add(f"pgd-expert-{number}", "transfer", f"expert {number} alone", seeing("pgd", "uniform", alone))
    for name, surrogate in surrogates.items():
        if f"pgd-{name}" in [attack.name for attack in attacks]:
            raise ValueError(f"a surrogate is called {name!r}, as what an attack here sees; give it another name")
        add(f"pgd-{name}", "transfer", name, seeing("pgd", "uniform", fold(surrogate)))
    return attacks


def fold(model: nn.Module) -> nn.Module:
    """A copy for evaluation: the same function within rounding, computed faster.

    It is in eval mode, and its parameters take no gradients. A model under evaluation no longer changes, so every
    batch norm right behind a convolution in an `nn.Sequential` becomes part of that convolution; others stay, as do
    those of classes of one's own, and with hooks or parametrizations, which may do anything. What happens to the model
    later does not reach the copy.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for sequence in [module for module in model.modules() if type(module).forward is nn.Sequential.forward]:
        for index, (convolution, norm) in enumerate(pairwise(list(sequence))):
            if _is_plain(convolution, nn.Conv2d) and _is_plain(norm, nn.BatchNorm2d) and norm.track_running_stats:
                sequence[index] = fuse_conv_bn_eval(convolution, norm)
                sequence[index + 1] = nn.Identity()
                if index + 2 < len(sequence) and _is_plain(sequence[index + 2], nn.ReLU):
                    # Nothing else reads what the convolution puts out, its own gradient included
                    sequence[index + 2] = nn.ReLU(inplace=True)
    return model.eval()  # the layers that are new, too


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module and its gradient are what this class says, of its weights as they are. Pruning and the older
    norms of weights are hooks; a parametrized module is of a class of its own."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return type(module) is kind and not any(hooks)


def within_budget(points: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
    """The points, each pixel brought to within eps of its image's and to [0, 1]."""
    return (images + (points - images).clamp(-eps, eps)).clamp(0, 1)


def check_effort(eps: float, step_size: float, **counts: int | None) -> None:
    """Raise ValueError unless eps is in the units of images, 0 .. 1, a step has a length (or eps none either), and each
    of the counts, given by their names, is at least 1, or None for all."""
    if not 0 <= eps <= 1:  # so phrased that NaN fails
        raise ValueError(f"eps is {eps}; it must lie in 0 to 1, as images do: write 8/255 for 8 of 255 levels")
    if not (0 < step_size < math.inf or step_size == eps == 0):
        raise ValueError(f"step_size is {step_size}; it must be finite and above 0: write 2/255 for 2 of 255 levels")
    for name, count in counts.items():
        if count is not None and not count >= 1:
            raise ValueError(f"{name} is {count}; it must be at least 1: an attack without one leaves images unmoved")


def check_budget(images: Tensor, adversarial: Tensor, eps: float) -> None:
    """Raise ValueError unless adversarial images lie in [0, 1] and within eps of the images."""
    check_images(adversarial)
    moved = (adversarial - images).abs().max().item()
    if not moved <= eps + ROUNDING:
        raise ValueError(f"an adversarial image is {moved:g} away from its image; eps is {eps:g}")
