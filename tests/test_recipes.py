"""Names of models and what they stand for."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity_lib.baselines.published import published_recipe
from immunity_lib.data import DATASETS
from immunity_lib.experts import BASELINES, EXPERTS
from immunity_lib.recipes import (
    METHODS,
    REGIMES,
    ModelName,
    Recipe,
    attacked_models,
    literal_model,
    members,
    recipe,
    table1_models,
    table2_models,
    table3_models,
    trained_models,
)


@given(
    st.builds(
        ModelName,
        dataset=st.sampled_from(DATASETS), method=st.sampled_from(list(METHODS)),
        expert=st.sampled_from(list(EXPERTS)), regime=st.sampled_from(list(REGIMES)),
        seed=st.integers(0, 10**6),
    )
)  # fmt: skip
def test_a_name_says_everything(name):
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


def test_a_recipe_survives_its_json(make_recipe):
    found = make_recipe(regime="adversarial", eps="8/255")
    assert Recipe.model_validate_json(found.model_dump_json()) == found


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


def test_ensembles_have_members_of_their_own(make_settings):
    settings = make_settings(experts=3, seeds=[0, 1])
    ensembles = [
        ModelName.parse(f"parts10-ensemble-resnet18-standard-seed{seed}") for seed in (0, 1)
    ]
    seeds = [[one.seed for one in members(settings, ensemble)] for ensemble in ensembles]
    assert seeds == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="is not trained; its members are"):
        recipe(settings, ensembles[0])


def test_every_model_of_every_table_is_trained_once(make_settings):
    settings = make_settings(
        seeds=[0, 2], compared_experts=["resnet18", "densenet121"], expert="googlenet"
    )
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
    settings = make_settings(
        baselines=networks, further_datasets=["cifar10"], regimes=["standard", "trades"]
    )
    found = [
        (name.dataset, name.regime, name.expert)
        for name in table2_models(settings)
        if name.expert in BASELINES
    ]
    assert found == list(product(("parts10", "cifar10"), ("standard", "trades"), networks))
    assert set(table2_models(settings)) <= set(trained_models(settings))


@pytest.mark.parametrize("network", BASELINES)
@pytest.mark.parametrize("regime", REGIMES)
def test_published_recipes_are_whole_and_make_a_recipe(make_settings, network, regime):
    name = ModelName.parse(f"parts10-standalone-{network}-{regime}-seed0")
    published = published_recipe(network, regime)
    assert published.source and published.gaps
    assert set(published.fields) <= set(Recipe.model_fields)
    own = recipe(make_settings(baseline_layers=5), name)
    for field, value in published.fields.items():
        if field not in ("adversary", "adversary_steps", "eps", "step_size"):
            assert getattr(own, field) == value
    assert (own.adversary is None) == (regime == "standard")
    assert (own.layers, own.experts, own.pairing_weight > 0) == (5, 1, regime in ("trades", "alp"))


def test_published_adversaries(make_settings):
    def inner_attack(network):
        found = recipe(
            make_settings(), ModelName.parse(f"cifar10-standalone-{network}-adversarial-seed0")
        )
        return found.adversary, found.adversary_steps, str(found.eps), str(found.step_size)

    assert inner_attack("advrush") == inner_attack("pdarts") == ("pgd", 7, "31/1000", "1/100")
    assert inner_attack("robnet-free") == ("pgd", 7, "8/255", "2/255")


def test_baselines_can_be_trained_like_everything_else(make_settings):
    def made(expert, **changes):
        return recipe(
            make_settings(**changes), ModelName.parse(f"parts10-standalone-{expert}-standard-seed0")
        )

    changed = {"expert": "pdarts", "layers": 4}
    alike = made("pdarts", baseline_recipes="preset", baseline_layers=4)
    assert alike == made("resnet18").model_copy(update=changed)
    assert made("pdarts", baseline_layers=4).auxiliary_weight == 0.4
    # As an expert of a mixture it is trained as the mixture is
    mixture = ModelName.parse("parts10-immunity-pdarts-standard-seed0")
    assert recipe(make_settings(baseline_layers=4), mixture).epochs == make_settings().epochs


def test_records_of_before_stand_for_the_defaults(make_recipe):
    """A model that was trained before a field was thought of need not be trained anew."""
    wanted = make_recipe()
    known = wanted.model_dump(mode="json")
    for field in Recipe.model_fields:
        if not Recipe.model_fields[field].is_required():
            del known[field]
    assert Recipe.model_validate(known) == wanted


def test_what_a_model_does_not_use_is_not_in_its_recipe(make_recipe):
    """Attacking with another eps, say, must not train a standard model anew."""
    changed = {"eps": "4/255", "step_size": "1/255", "adversary_steps": 3}
    assert make_recipe("immunity", **changed) == make_recipe("immunity")
    assert make_recipe("moe", floor=0.5, warmup_epochs=3) == make_recipe("moe")
    assert make_recipe("immunity", floor=0.5) != make_recipe("immunity")
