"""Verdicts on the paper's claims: from records whose answer is known beforehand."""

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from immunity_lib.adaptive_tables import suite_table, worth_of_the_gate
from immunity_lib.claims import (
    CLAIMS,
    VERDICTS,
    Claim,
    printed_verdicts,
    read_claims,
    verdicts,
)
from immunity_lib.comparisons import NotTestable, paired_differences
from immunity_lib.intervals import Interval, paired_interval
from immunity_lib.loss_weights import weight_sweep
from immunity_lib.recipes import (
    attacked_models,
    judged_models,
    swept_models,
    table1_models,
    table3_models,
)
from immunity_lib.records import write_record
from immunity_lib.results import record_path

IMAGES, GATES = 60, 2
EDGES = {"immunity": 0.2, "moe-mi": 0.1, "moe": 0.0, "moe-ps": 0.0, "standalone": -0.3}


def line(values) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def entry(generator, share: float, **fields) -> dict:
    """Of images that are right under all gates or none, with this probability."""
    right = (generator.random(IMAGES) < share) * GATES
    by_gate = {"gates": line(right), "uniform": line(right / GATES), "trained": line(right * 0)}
    return {
        "gates": GATES, "images": IMAGES, "switched": float(right.mean() / GATES),
        "uniform": float(right.mean() / GATES), "trained": 0.0, "every": 0.0,
        "per_image": by_gate,
    } | fields  # fmt: skip


def write_records(settings) -> None:
    """A world in which Immunity is 20 points above the mixture and 50 above the baselines under
    attack, and all are alike on clean images."""
    generator = np.random.default_rng(0)
    common = {"provenance": {"commit": "abc", "finished": "2024-01-01T00:00:00+00:00"}}
    for name in attacked_models(settings):
        share = 0.5 + EDGES[name.method]
        result = {
            "clean": {"test": entry(np.random.default_rng(1), 0.8)},
            "attacks": [
                entry(generator, share, attack=attack, attacked_gate=gate)
                for gate in settings.attack_gates
                for attack in settings.attacks
            ],
        }
        write_record(record_path(settings, name, "attacks"), {"result": result} | common)
    scored = [*table1_models(settings), *table3_models(settings), *swept_models(settings)]
    for number, name in enumerate(dict.fromkeys(scored)):
        level = {"immunity": 2.0, "moe-mi": 1.5}.get(name.method, 1.0)
        values = level + 0.1 * generator.random(IMAGES)
        scores = ("independence_score", "causality_score", "mutual_information")
        clean = entry(generator, 0.8)
        per_image = {score: line(values) for score in scores} | {
            "experts": line(generator.integers(0, 3, IMAGES)), "gates": clean["per_image"]["gates"],
        }  # fmt: skip
        result = {"accuracy": clean, "expert_accuracy": [0.5, 0.5], "empty_maps": number / 100,
                  "per_image": per_image}  # fmt: skip
        result |= {score: float(values.mean()) for score in scores}
        write_record(record_path(settings, name, "scores"), {"result": {"test": result}} | common)
    for name in judged_models(settings):
        attacks = [
            entry(generator, 0.9 + EDGES[name.method] / 2, attack=attack, family=family, sees="-")
            for attack, family in (("pgd", "paper"), ("exact-expected", "exact"))
        ]
        agreement = entry(generator, 0.8) | {"unanimous": 0.5, "pairs": 0.6}
        result = {"attacks": attacks, "agreement": agreement}
        write_record(record_path(settings, name, "adaptive"), {"result": result} | common)


@pytest.fixture(params=[[0], [0, 1, 2]], ids=["one seed", "three seeds"])
def settings(request, make_settings, tmp_path):
    made = make_settings(
        output_folder=str(tmp_path), seeds=request.param, baselines=["pdarts", "advrush"],
        weight_factors=[3], attacked_images=30,
    )  # fmt: skip
    write_records(made)
    return made


def test_verdicts_of_a_world_that_is_known(settings):
    found = verdicts(settings, read_claims()).set_index("claim")
    assert set(found["verdict"]) <= set(VERDICTS)
    holding = ["standard-attacked", "adversarial-attacked", "iscore", "experts-differ"]
    assert (found.loc[holding, "verdict"] == "holds").all(), found.loc[holding]
    assert found.loc["cscore", "verdict"] == "does not hold"  # it doubles, and should fall
    assert found.loc["switching-standard", "verdict"] == "undecided"  # it adds nothing
    untestable = found[found["verdict"] == VERDICTS[-1]]
    assert {"cifar100", "poisoning", "best-network-alone"} <= set(untestable.index)
    assert untestable["effect"].isna().all() and untestable["reason"].notna().all()
    tested = found[found["effect"].notna()]
    assert (tested["seeds"] == len(settings.seeds)).all() and (tested["images"] == IMAGES).all()
    assert ((tested["low"] <= tested["effect"]) & (tested["effect"] <= tested["high"])).all()


def test_an_effect_is_the_difference_of_means_to_the_strongest(settings):
    measure = next(one.measure for one in read_claims() if one.id == "mutual-information-attacked")
    differences, against = paired_differences(settings, measure)
    assert differences.shape == (len(settings.seeds), IMAGES)
    claim = Claim(id="-", sentence="-", where="-", measure=measure, at_least=0)
    effect = verdicts(settings, [claim])["effect"].item()
    assert effect == pytest.approx(100 * differences.mean())
    assert against in ("MoE", "MoE+PS")
    other = "MoE+PS" if against == "MoE" else "MoE"
    single = {"MoE": "moe", "MoE+PS": "moe-ps"}
    means = {
        title: paired_differences(settings, measure.model_copy(update={"against": [method]}))
        for title, method in single.items()
    }
    assert means[against][0].mean() <= means[other][0].mean()


def test_relative_scores_are_in_shares_of_the_other_s(settings):
    measure = next(one.measure for one in read_claims() if one.id == "experts-differ")
    differences, _ = paired_differences(settings, measure)
    assert 0.4 < differences.mean() < 0.55  # 1.5 against 1.0, each with 0.05 more on average


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((3, 2.1, 4), "holds"), ((3, 1, 5), "undecided"), ((1, 0, 1.9), "does not hold")],
)
def test_the_rule(interval, verdict):
    measure = read_claims()[0].measure
    claim = Claim(id="-", sentence="-", where="-", measure=measure, at_least=2)
    assert claim.verdict(Interval(*interval)) == verdict
    upside_down = claim.model_copy(update={"at_least": None, "at_most": -2})
    mirrored = Interval(-interval[0], -interval[2], -interval[1])
    assert upside_down.verdict(mirrored) == verdict


def test_a_missing_model_is_no_verdict(settings):
    without = settings.model_copy(update={"baselines": []})
    measure = next(one.measure for one in read_claims() if one.id == "standard-attacked")
    with pytest.raises(NotTestable, match="no baselines"):
        paired_differences(without, measure)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"at_least": None}, "claim standard-clean needs a measure and at_least or at_most"),
     ({"measure": {"kind": "accuracy", "regime": "fast"}}, "regime"),
     ({"sentense": "x"}, "sentense")],
)  # fmt: skip
def test_a_faulty_claim_is_named(tmp_path, change, told):
    content = yaml.safe_load(CLAIMS.read_text())
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump([content[0] | change]))
    with pytest.raises(ValueError, match=f"claim 1.*{told}"):
        read_claims(path)
    path.write_text(yaml.safe_dump([content[0], content[0]]))
    with pytest.raises(ValueError, match="id of its own"):
        read_claims(path)


def test_with_one_seed_the_interval_is_that_of_a_paired_t_test():
    generator = np.random.default_rng(0)
    first, second = generator.normal(0.3, 1, 200), generator.normal(0, 1, 200)
    found = paired_interval((first - second)[None])
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-3), pytest.approx(high, abs=2e-3))


def test_seeds_that_differ_widen_the_interval():
    generator = np.random.default_rng(0)
    by_image = generator.normal(0, 1, (3, 300))
    apart = by_image + np.array([[-1.0], [0.0], [1.0]])
    same, differing = paired_interval(by_image), paired_interval(apart)
    assert differing.high - differing.low > 5 * (same.high - same.low)
    assert differing.effect == pytest.approx(same.effect)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        seeds, images = generator.normal(0, 0.3, (5, 1)), generator.normal(0, 1, (1, 40))
        found = paired_interval(seeds + images + generator.normal(0, 1, (5, 40)))
        covered += found.low <= 0 <= found.high
    assert covered >= 88


def test_equal_differences_are_not_certain():
    found = paired_interval(np.zeros((1, 100)))
    assert found.low == -found.high and 0.02 < found.high < 0.05


def test_text_has_a_line_for_every_claim(settings):
    claims = read_claims()
    text = printed_verdicts(verdicts(settings, claims))
    assert len(text) == len(claims)
    shown = text.set_index("claim").loc["poisoning", "verdict"]
    assert shown == f"{VERDICTS[-1]}: the paper shows no experiment with poisoning"


def test_the_headline_is_the_worst_case_of_the_images(settings):
    names = judged_models(settings)
    cells = worth_of_the_gate(settings, names)
    own = cells[(cells["model"] == "Immunity") & (cells["training"] == "standard")]
    value = own.set_index("column")["value"]
    suite = suite_table(settings, names)
    single = suite[(suite["model"] == "Immunity") & (suite["training"] == "standard")]
    expected = single[single["column"] == "expected over switches"]["value"]
    assert value["all attacks"] <= expected.min()
    assert value["switching"] == pytest.approx(value["all attacks"] - value["plain ensemble"])
    # Images that all gates get right or wrong alike: more tries bring nothing
    assert value["success in 1"] == pytest.approx(value["success in 20"])
    assert value["success in 1"] == pytest.approx(100 - value["all attacks"])


def test_the_sweep_has_the_ablation_at_its_factors_zero_and_one(settings):
    sweep = weight_sweep(settings)
    assert sorted(sweep["factor"].unique()) == [0, 1, 3]
    assert len(sweep) == 6 * len(settings.seeds)
    at_zero = sweep[sweep["factor"] == 0].groupby("loss")["mutual_information"].mean()
    assert at_zero.nunique() == 1, "without either loss, both sweeps start at the same models"


def test_verdicts_can_be_printed_where_every_claim_was_tested():
    """Their reasons are then all empty, which pandas takes for numbers."""
    tested = pd.DataFrame(
        {
            "claim": ["one"], "where": ["section 1"], "predicted": ["at or above 0"],
            "effect": [1.0], "low": [0.5], "high": [1.5], "unit": ["points"], "against": [None],
            "verdict": ["holds"], "reason": [np.nan],
        }
    )  # fmt: skip
    assert list(printed_verdicts(tested)["verdict"]) == ["holds"]
