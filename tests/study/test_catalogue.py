"""Names of models and what they stand for."""

from dataclasses import asdict, fields, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity_lib.data import DATASETS
from immunity_lib.experts import BASELINES, EXPERT_NAMES
from immunity_lib.train import Recipe
from study.catalogue import (
    METHODS,
    REGIMES,
    ModelName,
    adaptive_models,
    attacked_models,
    literal_model,
    members,
    own_recipe,
    recipe_of,
    surrogates,
    table1_models,
    table2_models,
    table3_models,
    trained_models,
)


@given(
    st.builds(
        ModelName,
        dataset=st.sampled_from(DATASETS), method=st.sampled_from(list(METHODS)),
        expert=st.sampled_from(EXPERT_NAMES), regime=st.sampled_from(list(REGIMES)),
        seed=st.integers(0, 10**6),
    )
)  # fmt: skip
def test_A3_a_name_says_everything(name):
    assert ModelName.parse(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        "", "parts10", "mnist-moe-resnet18-standard-seed0", "parts10-moe-resnet18-standard-seed",
        "parts10-moe-resnet18-standard-seed-1", "parts10-moe-resnet18-standard-seed0 ",
        "parts10-moe-vgg-standard-seed0", "../parts10-moe-resnet18-standard-seed0",
    ],
)  # fmt: skip
def test_what_is_no_name_is_told_what_a_name_is(text):
    with pytest.raises(ValueError, match="no model's name; one is <data>-<method>.*moe-mi"):
        ModelName.parse(text)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("standalone", (1, 0, 0, 0)),
        ("moe", (2, 0.5, 0, 0)),
        ("moe-mi", (2, 0.5, 3, 0)),
        ("moe-ps", (2, 0.5, 0, 4)),
        ("immunity", (2, 0.5, 3, 4)),
        ("immunity-literal", (2, 0.5, 3, 4)),
    ],
)
def test_methods_are_configurations_of_one_model(make_recipe, method, weights):
    found = make_recipe(method, alpha=0.5, beta=3, gamma=4, floor=0.2, warmup_epochs=2)
    assert (found.experts, found.alpha, found.beta, found.gamma) == weights
    literal = method == "immunity-literal"
    without_maps = method in ("standalone", "moe")
    expected = (0, 0) if literal else (0.1, 1) if without_maps else (0.2, 2)
    assert (found.floor, found.warmup_epochs) == expected


def test_regime_decides_on_the_adversary(make_recipe):
    assert make_recipe(regime="standard", adversary="ffgsm").adversary is None
    assert make_recipe(regime="adversarial", adversary="ffgsm").adversary == "ffgsm"


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    "change",
    [
        {"attacks": ["fgsm"]}, {"steps": 50}, {"test_images": 20}, {"attacked_images": 3},
        {"attack_gates": ["trained"]}, {"seeds": [0, 1]}, {"interactive": False},
    ],
)  # fmt: skip
def test_what_only_evaluation_needs_does_not_change_a_model(make_recipe, regime, change):
    assert make_recipe(regime=regime, **change) == make_recipe(regime=regime)


def test_D12_every_field_of_training_is_the_preset_s(make_settings, make_recipe):
    """But for those that the study sets for each model."""
    assert "seed" not in type(make_settings()).model_fields
    changed = {"rotation": 3.0, "precision": "bfloat16", "decayed": "convolutions and classifier"}
    found = make_recipe(**changed)
    assert {name: getattr(found, name) for name in changed} == changed


def test_ensembles_have_members_of_their_own(make_settings):
    settings = make_settings(experts=3, seeds=[0, 1])
    ensembles = [ModelName.parse(f"parts10-ensemble-resnet18-standard-seed{seed}") for seed in (0, 1)]
    seeds = [[one.seed for one in members(settings, ensemble)] for ensemble in ensembles]
    assert seeds == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="is not trained; its members are"):
        recipe_of(settings, ensembles[0])


def test_every_model_of_every_table_is_trained_once(make_settings):
    settings = make_settings(seeds=[0, 2], compared_experts=["resnet18", "densenet121"], expert="googlenet")
    trained = trained_models(settings)
    assert len(set(trained)) == len(trained)
    needed = [*table2_models(settings), *table3_models(settings), literal_model(settings)]
    for name in table1_models(settings):
        needed += members(settings, name) if name.method == "ensemble" else [name]
    assert set(trained) == set(needed)
    assert set(attacked_models(settings)) == {*table2_models(settings), *table3_models(settings)}


def test_table_2_crosses_methods_regimes_and_seeds(make_settings):
    settings = make_settings(seeds=[0, 2])
    found = {(name.method, name.regime, name.seed) for name in table2_models(settings)}
    assert found == set(product(("standalone", "moe", "immunity"), settings.regimes, (0, 2)))


def test_table_2_has_every_baseline_on_every_data_set_under_every_regime(make_settings):
    networks = ["pdarts", "robnet-free", "advrush"]
    settings = make_settings(baselines=networks, further_datasets=["cifar10"], regimes=["standard", "trades"])
    found = [(name.dataset, name.regime, name.expert) for name in table2_models(settings) if name.expert in BASELINES]
    assert found == list(product(("parts10", "cifar10"), ("standard", "trades"), networks))
    assert set(table2_models(settings)) <= set(trained_models(settings))
    for name in table2_models(settings):
        assert recipe_of(settings, name).dataset == name.dataset


def test_who_meets_adaptive_attacks_and_through_whom(make_settings):
    settings = make_settings()
    name = ModelName.parse("parts10-immunity-resnet18-standard-seed0")
    assert len(adaptive_models(settings)) == 4
    assert [one.method for one in surrogates(settings, name)] == ["moe", "moe-mi", "moe-ps"]
    adversarial = name.model_copy(update={"regime": "adversarial", "method": "moe"})
    assert [one.method for one in surrogates(settings, adversarial)] == ["immunity"]


@pytest.mark.parametrize("network", BASELINES)
@pytest.mark.parametrize("regime", REGIMES)
def test_published_recipes_are_whole_and_make_a_recipe(make_settings, network, regime):
    name = ModelName.parse(f"parts10-standalone-{network}-{regime}-seed0")
    settings = make_settings(baseline_layers=5)
    published = own_recipe(settings, name)
    assert published["source"] and published["gaps"]
    assert published["fields"].keys() <= {field.name for field in fields(Recipe)}
    own = recipe_of(settings, name)
    for field, value in published["fields"].items():
        if field not in ("adversary", "adversary_steps", "eps", "step_size"):
            assert getattr(own, field) == value
    assert (own.adversary is None) == (regime == "standard")
    assert (own.layers, own.experts, own.pairing_weight > 0) == (5, 1, regime in ("trades", "alp"))


def test_published_adversaries(make_settings):
    def inner_attack(network):
        name = ModelName.parse(f"cifar10-standalone-{network}-adversarial-seed0")
        found = recipe_of(make_settings(), name)
        return found.adversary, found.adversary_steps, str(found.eps), str(found.step_size)

    assert inner_attack("advrush") == inner_attack("pdarts") == ("pgd", 7, "31/1000", "1/100")
    assert inner_attack("robnet-free") == ("pgd", 7, "8/255", "2/255")


def test_baselines_can_be_trained_like_everything_else(make_settings):
    def made(expert, **changes):
        name = ModelName.parse(f"parts10-standalone-{expert}-standard-seed0")
        return recipe_of(make_settings(**changes), name)

    alike = made("pdarts", baseline_recipes="preset", baseline_layers=4)
    assert alike == replace(made("resnet18"), expert="pdarts", layers=4)
    assert made("pdarts", baseline_layers=4).auxiliary_weight == 0.4
    # As an expert of a mixture it is trained as the mixture is
    mixture = ModelName.parse("parts10-immunity-pdarts-standard-seed0")
    settings = make_settings(baseline_layers=4)
    assert recipe_of(settings, mixture).epochs == settings.recipe.epochs


def test_a_recipe_is_known_again_and_fields_of_later_stand_for_their_defaults(make_recipe):
    """A model that was trained before a field was thought of need not be trained anew."""
    wanted = make_recipe(regime="adversarial", eps="8/255")
    known = wanted.as_json()
    assert known["eps"] == "8/255" and wanted.is_that_of(known)
    defaults = {field.name: field.default for field in fields(Recipe)}
    short = {name: value for name, value in known.items() if asdict(wanted)[name] != defaults[name]}
    assert len(short) < len(known) and wanted.is_that_of(short)
    assert not wanted.is_that_of(known | {"beta": 3.0})
    assert not wanted.is_that_of(known | {"of another version": 1})


def test_what_a_model_does_not_use_is_not_in_its_recipe(make_recipe):
    """Attacking with another eps, say, must not train a standard model anew."""
    changed = {"eps": "4/255", "step_size": "1/255", "adversary_steps": 3}
    assert make_recipe("immunity", **changed) == make_recipe("immunity")
    assert make_recipe("moe", floor=0.5, warmup_epochs=3) == make_recipe("moe")
    assert make_recipe("immunity", floor=0.5) != make_recipe("immunity")
