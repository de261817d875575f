"""The library on tensors of a device that is not the CPU: nothing mixes the two, and little waits for the device.

Tensors of the "meta" device, which have no contents, stand for a GPU's: whatever is made on the CPU by mistake meets
them. What is sent to the GPU is not counted. PyTorch's own pretended CUDA tensors (FakeTensorMode) know what mixed
precision does on CUDA, and go forward; without a GPU its autograd refuses to go back through them, and they cannot be
copied, as `fold` does."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from immunity_lib import ImmunityMoE, attacks, evaluate, heatmaps, moe, scores, train
from immunity_lib.attacks import ATTACKS, Effort, adaptive_attacks, attack_images, exact_pgd, fold, random_noise
from immunity_lib.heatmaps import expert_heatmaps
from immunity_lib.moe import GATES, GateVerdicts, verdicts

aten = torch.ops.aten
BUDGET = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 2}


class PretendedGpu(TorchDispatchMode):
    """Tensors of "meta" as a GPU's: an error where an operation takes them together with the CPU's, as CUDA has it,
    and a count of what waits for the GPU. All numbers read from it are 0; truths are what `true` says."""

    def __init__(self, true: bool = False) -> None:
        super().__init__()
        self.true, self.waits = true, Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options, packet = options or {}, function.overloadpacket
        tensors = [one for one in tree_leaves((arguments, options)) if isinstance(one, torch.Tensor)]
        there = [one for one in tensors if one.is_meta]
        # A number of the CPU may meet a GPU's tensor; its indices and copies too, and are sent there
        here = [one for one in tensors if not one.is_meta and one.ndim]
        if there and here and packet not in (aten.index, aten.copy_, aten._to_copy):
            raise AssertionError(f"{function} takes tensors of the CPU and of the GPU")
        if there and packet is aten._local_scalar_dense:
            self.waits[packet] += 1
            (one,) = there
            return self.true if one.dtype == torch.bool else 0.0 if one.is_floating_point() else 0
        if there and packet in (aten.nonzero, aten.equal):
            self.waits[packet] += 1
            (one, *_) = there
            return self.true if packet is aten.equal else one.new_zeros(len(one), one.ndim, dtype=torch.long)
        if there and packet is aten.index and arguments[1][0] is not None and arguments[1][0].dtype == torch.bool:
            self.waits[packet] += 1
            (mask,) = arguments[1]
            return arguments[0].flatten(0, mask.ndim - 1).clone()  # as if it were true everywhere
        if there and packet is aten._to_copy and str(options.get("device", "meta")) == "cpu":
            self.waits[packet] += 1
            return torch.zeros(there[0].shape, dtype=options.get("dtype") or there[0].dtype)
        if there and packet is aten.copy_ and not arguments[0].is_meta:
            self.waits[packet] += 1
            return arguments[0]
        return function(*arguments, **options)


@pytest.fixture(autouse=True)
def forget():
    """What is kept from call to call has contents, or none, as the first call had it."""
    kept = moe.permutations, heatmaps._interpolation
    for one in kept:
        one.cache_clear()
    yield
    for one in kept:
        one.cache_clear()


@pytest.fixture
def batch():
    images = torch.rand(4, 3, 32, 32, device="meta").contiguous(memory_format=torch.channels_last)
    return images, torch.zeros(4, dtype=torch.long, device="meta")


@pytest.fixture
def make_model(make_recipe, dataset):
    def make(method="immunity", **changes) -> tuple[ImmunityMoE, train.Recipe]:
        recipe = make_recipe(method, experts=3, **changes)
        return train.build_model(recipe, dataset).to("meta"), recipe

    return make


def test_what_this_test_relies_on(batch):
    images, _ = batch
    with PretendedGpu() as gpu:
        with pytest.raises(AssertionError, match="of the CPU and of the GPU"):
            images + torch.zeros(3, 1, 1)
        assert images.max().item() == 0.0 and images.cpu().shape == images.shape
    assert gpu.waits.total() == 2


@pytest.mark.parametrize("method", ["moe", "immunity"])
def test_a_training_step_stays_on_the_gpu_and_waits_for_nothing(make_model, batch, method):
    model, recipe = make_model(method)
    with PretendedGpu() as gpu:
        loss = train.training_loss(model.train(), *batch, recipe, epochs_done=10.0)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        train.make_optimiser(model, recipe).step()
    assert {one.device.type for one in vars(loss).values()} == {"meta"}
    gradients = [one.grad for one in model.parameters()]
    assert {(one.device.type, one.dtype) for one in gradients} == {("meta", torch.float32)}
    assert not gpu.waits


def test_an_epoch_waits_once_a_step_and_once_at_its_end(make_model, dataset):
    """For the losses of a step, read together, and for whether all weights are finite."""
    model, recipe = make_model(batch_size=24, gradient_clip=1.0)
    optimiser = train.make_optimiser(model, recipe)
    with PretendedGpu(true=True) as gpu:
        train._train_epoch(model, train.training_loss, optimiser, recipe, dataset, 1, "tiny")
    assert gpu.waits.total() <= len(dataset.splits["train"]) // 24 + 1


def test_every_gate_is_on_the_gpu(make_model, batch):
    model, _ = make_model()
    with PretendedGpu() as gpu:
        assert all(model(batch[0], gate).is_meta for gate in (*GATES, (2, 0, 1)))
    assert not gpu.waits


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_stay_on_the_gpu(make_model, batch, attack):
    """What waits: the checks of the batch, the budget and the gradient, 8 times; a library's attack has them of the
    one step that looks for NaN, too; and Auto-PGD's own book, on the CPU."""
    model, _ = make_model()
    with PretendedGpu() as gpu:
        points = attack_images(fold(model), *batch, attack, "switch", **BUDGET)
    assert points.is_meta
    assert gpu.waits.total() <= 8 + 8 * (attack in attacks.OF_LIBRARY) + 20 * (attack == "apgd")


def test_measuring_stays_on_the_gpu(make_model, dataset, batch):
    model, recipe = make_model(regime="adversarial")
    images, labels = batch
    with PretendedGpu():
        maps = expert_heatmaps(model, images, labels)
        for score in (scores.independence_score, scores.causality_score, scores.mutual_information):
            assert score(maps).is_meta
        found = verdicts(model.expert_outputs(images), labels)
        assert found.failure.is_meta and GateVerdicts.join([found, found]).accuracy.every == 0.0
        assert random_noise(model, images, labels, eps=8 / 255, draws=2).is_meta
        assert exact_pgd(model, images, labels, **BUDGET).is_meta
        assert set(train.diagnose(model, dataset.splits["validation"], recipe)) >= {"accuracy", "robust_accuracy"}
        assert evaluate.agreement(model, images)


def test_G1_adaptive_attacks_stay_on_the_gpu(make_model, batch):
    """Through every expert alone, too. All but AutoAttack, whose loops end by what they read."""
    model, _ = make_model()
    with PretendedGpu():
        for attack in adaptive_attacks(model, Effort(8 / 255, 2 / 255, 1, (2,), 1), {"moe": model}):
            if attack.family != "judges" and attack.name != "square":
                assert attack.perturb(*batch)[0].is_meta, attack.name


def test_mixed_precision_on_pretended_cuda(make_recipe, dataset, monkeypatch):
    """Convolutions are in bfloat16, and what comes of them is float32, forward."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    recipe = make_recipe("moe", precision="bfloat16")
    model, seen = train.build_model(recipe, dataset), set()

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function.overloadpacket is aten.convolution:
                seen.update((one.device.type, one.dtype) for one in arguments[:2])
            return function(*arguments, **options or {})

    with FakeTensorMode() as mode:
        for module in model.modules():
            for name, one in module._parameters.items():
                module._parameters[name] = one if one is None else nn.Parameter(mode.from_tensor(one).cuda().detach())
            for name, one in module._buffers.items():
                module._buffers[name] = mode.from_tensor(one).cuda()
        images, labels = torch.rand(4, 3, 32, 32, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        with Seeing():
            loss = train.training_loss(model.train(), images, labels, recipe, epochs_done=10.0)
            found = verdicts(model.expert_outputs(images), labels)
    assert seen == {("cuda", torch.bfloat16), ("cuda", torch.float32)}  # outside of the loss, nothing is mixed
    assert {(one.device.type, one.dtype) for one in vars(loss).values()} == {("cuda", torch.float32)}
    assert found.failure.device.type == "cuda"


def test_a_training_on_the_cpu_leaves_a_gpu_alone(make_recipe, dataset, tmp_path, monkeypatch):
    recipe = make_recipe("moe", epochs=1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda *_: pytest.fail("the GPU was asked"))
    model = train.build_model(recipe, dataset)
    train._save(tmp_path, {}, model, train.make_optimiser(model, recipe))
