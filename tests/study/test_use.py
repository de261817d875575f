"""Every recipe of docs/use.md does what the page says of it."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from immunity_lib import ImmunityMoE, expert_heatmaps
from immunity_lib.heatmaps import grad_cam, normalise_maps
from immunity_lib.losses import immunity_loss
from immunity_lib.train import train
from study import store
from study.settings import ROOT
from study.store import shipped_model

PAGE = (ROOT / "docs/use.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)$.*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))


def cook(title, **names):
    """What a recipe leaves behind, run as it stands on the page."""
    exec(compile(RECIPES[title], title, "exec"), names)
    return names


def test_each_recipe_has_at_most_ten_lines_and_a_test():
    assert PAGE.count("```python") == len(RECIPES) == 6
    assert all(len([line for line in one.splitlines() if line]) <= 10 for one in RECIPES.values())
    assert all(f'"{title}"' in Path(__file__).read_text() for title in RECIPES)


@pytest.mark.parametrize("network", ["plain", "mixture"])
def test_every_adaptive_attack_meets_my_model(network, images, make_linear_model, capsys):
    """The block wraps a plain network, and what follows takes any mixture."""
    title, images = "My model under the adaptive attacks", images[:3]
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    block = RECIPES[title] if network == "plain" else re.sub(r"model = .*\n", "", RECIPES[title])
    model = make_linear_model(2, 10)
    with torch.no_grad():
        labels = (plain.eval()(images * 4 - 2) if network == "plain" else model(images, "uniform")).argmax(-1)
    names = {"my_network": plain, "my_layer": "0", "model": model, "images": images, "labels": labels}
    exec(compile(block, title, "exec"), names)
    several = {"pgd-uniform", "autoattack-uniform", "eotpgd-1", "eotpgd-10", "pgd-expert-2"}
    common = {"fgsm", "bim", "mim", "pgd", "pgd-trained", "exact-expected", "exact-strongest"}
    common |= {"autoattack-trained", "square", "noise", "pgd-expert-1"}
    assert names["results"].keys() == (common if network == "plain" else common | several)
    assert len(names["failure"]) == 3 and len(names["summary"]["checks"]) == 8
    assert f"{1 - names['failure'].mean():.1%} left" in capsys.readouterr().out
    if network == "plain":
        assert all(found.switched.shape == (3, 1) for found, _ in names["results"].values())
        assert names["summary"]["agreement"]["unanimous"] == 1


def test_the_losses_train_a_loop_of_my_own(model, images, labels):
    """They reach the weights, and are the terms of eq (12)."""
    seen = []
    cook("The two losses in my training loop", model=model, my_batches=[(images, labels)],
         my_loss=functional.nll_loss, my_step=seen.append)  # fmt: skip
    outputs = model.expert_outputs(images)
    heat = grad_cam(outputs, labels, create_graph=True)
    maps = normalise_maps(heat, 0.1), normalise_maps(heat, 0.1, constant_share=True)
    torch.testing.assert_close(seen[0], immunity_loss(outputs, labels, *maps, alpha=0, beta=1, gamma=100).total)
    seen[0].backward()
    assert all(expert.stages[0][0].weight.grad.abs().sum() > 0 for expert in model.experts)


def test_a_network_of_torchvision_is_an_expert(images, labels):
    model = cook("A network of torchvision as an expert")["model"].eval()
    assert model.expert_outputs(images[:2]).activations[0].shape == (2, 64, 8, 8)
    assert expert_heatmaps(model, images[:2], labels[:2]).shape == (2, 3, 32, 32)


def test_a_model_that_ships_is_there_in_one_line(dataset):
    model, test = cook("A model that comes with the project")["model"], dataset.splits["test"]
    with torch.no_grad():
        right = model(test.images / 255, "uniform").argmax(-1) == test.labels
    assert right.float().mean() > 0.6 and not model.training
    valid = [f"{path.parts[-3]}/{path.parts[-2]}" for path in store.PRETRAINED.glob("*/*/model.safetensors")]
    for one in valid[::5]:
        assert isinstance(shipped_model(one), ImmunityMoE)
    with pytest.raises(ValueError, match="'nobody' names no models that come with the project") as error:
        shipped_model("nobody")
    assert all(one in str(error.value) for one in valid)


def test_a_name_that_two_presets_have_wants_the_preset_too(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PRETRAINED", tmp_path)
    for preset in ("one", "two"):
        (tmp_path / preset / "model").mkdir(parents=True)
        (tmp_path / preset / "model/model.safetensors").touch()
    with pytest.raises(ValueError, match="names 2 models .* one/model, two/model"):
        shipped_model("model")


def test_autoattack_s_own_entry_takes_a_mixture(images, make_linear_model):
    """The wrapper is all that RobustBench asks for, too."""
    model, images = make_linear_model(2, 10), images[:3]
    labels = model(images, "uniform").argmax(-1)
    names = cook("AutoAttack and RobustBench on a mixture", model=model, images=images, labels=labels)
    plain, attacked = names["Plain"](model).eval(), names["attacked"]
    assert isinstance(plain, nn.Module) and plain(images).shape == (3, 10) and plain(images).equal(plain(images))
    torch.testing.assert_close(plain(images).softmax(-1), model(images, "uniform").exp())
    assert (attacked - images).abs().max() <= 8 / 255 + 1e-6 and not attacked.equal(images)
    assert (plain(attacked).argmax(-1) != labels).any()


@pytest.fixture
def tensorboard(monkeypatch):
    """A module in place of TensorBoard's, and what its writer was given."""
    given, module = [], ModuleType("torch.utils.tensorboard")
    writer = {"__init__": lambda self, folder: None, "add_scalar": lambda self, *one: given.append(one)}
    module.SummaryWriter = type("SummaryWriter", (), writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return given


def test_a_logger_gets_every_epoch_once_and_the_log_stays_the_truth(make_recipe, dataset, tmp_path, tensorboard):
    told, recipe, title = [], make_recipe("moe"), "The training's log in my logger"

    def stop(entry):
        told.append(entry)
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, dataset, tmp_path, tell=stop)
    log = cook(title, recipe=recipe, dataset=dataset, folder=tmp_path)["log"]
    assert told == log[:2] and len(log) == 3  # the rest went to the writer
    assert tensorboard[0] == ("loss", log[2]["loss"], 3) and {one[2] for one in tensorboard} == {3}
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == log
