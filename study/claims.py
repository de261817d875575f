"""The paper's claims, and what our records say of each.

They and the rule of the verdicts are data, in claims.yaml. A claim is about a difference between two models on the
same images, or between the two sides of one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from study import catalogue
from study.catalogue import DATA, METHODS, MIXTURES, NETWORKS
from study.settings import Settings
from study.tables import SCORES, read_rows

CLAIMS = Path(__file__).with_name("claims.yaml")
VERDICTS = ("holds", "does not hold", "undecided", "not testable at this scale")
KINDS = {  # of measures: the frame that they are read from, and whose models
    "accuracy": ("attacks", (catalogue.table2_models, catalogue.table3_models)),
    "network": ("scores", (catalogue.table1_models,)),
    "worst-case": ("adaptive", (catalogue.adaptive_models,)),
    **dict.fromkeys(SCORES, ("scores", (catalogue.table1_models, catalogue.table3_models))),
}

Method = Annotated[str, Field(pattern=f"^({'|'.join(METHODS)})$")]


class NotTestable(Exception):
    """Why a preset cannot say anything about a claim."""


class Measure(BaseModel, extra="forbid", frozen=True):
    """A model minus the strongest of those it is held against; claims.yaml lists the kinds."""

    kind: Annotated[str, Field(pattern=f"^({'|'.join(KINDS)})$")]
    model: Method
    against: Literal["baselines", "other networks", "its plain ensemble"] | list[Method]
    data: str = ""  # another data set than the preset's first
    regime: Literal["standard", "adversarial"] = "standard"
    under: Literal["clean", "attacks"] = "clean"
    network: str = ""  # of Table 1; empty: the preset's

    @property
    def unit(self) -> str:
        return "%" if self.kind in SCORES else "points"


class Claim(BaseModel, extra="forbid", frozen=True):
    """A sentence of the paper and what it predicts; see claims.yaml for the rule."""

    id: str
    sentence: str
    where: str
    measure: Measure | None = None
    at_least: float | None = None
    at_most: float | None = None
    reading: str = ""
    untestable: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        bounds, testable = (self.at_least, self.at_most), self.measure is not None
        if testable == bool(self.untestable) or testable == (bounds == (None, None)):
            raise ValueError(f"claim {self.id} needs a measure and at_least or at_most, or only why it is untestable")
        return self

    @property
    def prediction(self) -> str:
        if self.measure is None:
            return ""
        bound = f"at least {self.at_least:+g}" if self.at_most is None else f"at most {self.at_most:+g}"
        return f"{bound} {self.measure.unit}"

    def verdict(self, low: float, high: float) -> str:
        """By the rule in claims.yaml, for an interval in the units of the prediction."""
        least = -np.inf if self.at_least is None else self.at_least
        most = np.inf if self.at_most is None else self.at_most
        if least <= low and high <= most:
            return "holds"
        return "does not hold" if high < least or low > most else "undecided"


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims of the file; raises ValueError that names what is wrong in which claim."""
    claims: dict[str, Claim] = {}
    for number, content in enumerate(yaml.safe_load(path.read_text()), start=1):
        try:
            claim = Claim.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{path}, claim {number}, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if claims.setdefault(claim.id, claim) is not claim:
            raise ValueError(f"{path}: two claims are called {claim.id}; give each its own id")
    return list(claims.values())


def verdicts(settings: Settings, claims: Sequence[Claim]) -> pd.DataFrame:
    """One line a claim: claim (its id), sentence, where, predicted, reading, effect, low, high (95 %), unit, against
    (what it was held against), seeds, images, verdict, and reason where there is none."""
    columns = [
        "claim", "sentence", "where", "predicted", "reading", "effect", "low", "high", "unit", "against", "seeds",
        "images", "verdict", "reason",
    ]  # fmt: skip
    lines = []
    for claim in claims:
        line = claim.model_dump(include={"sentence", "where", "reading"})
        line |= {"claim": claim.id, "predicted": claim.prediction}
        try:
            if claim.measure is None:
                raise NotTestable(claim.untestable)
            differences, against = paired_differences(settings, claim.measure)
            effect, low, high = (100 * one for one in paired_interval(differences))
            line |= {"effect": effect, "low": low, "high": high, "unit": claim.measure.unit, "against": against}
            line |= {"seeds": len(differences), "images": differences.shape[1], "verdict": claim.verdict(low, high)}
        except NotTestable as reason:
            line |= {"verdict": VERDICTS[-1], "reason": str(reason)}
        lines.append(line)
    return pd.DataFrame(lines).reindex(columns=columns)


def verdict_text(found: pd.DataFrame) -> pd.DataFrame:
    """Verdicts as text, one line a claim."""
    text = found.astype(object).where(found.notna(), "")
    effect = "{effect:+.1f} [{low:+.1f}, {high:+.1f}] {unit}"
    text["effect [95 % interval]"] = [effect.format(**one) if one["unit"] else "" for one in text.to_dict("records")]
    text["verdict"] += text["reason"].where(text["reason"] == "", ": " + text["reason"])
    return text[["claim", "where", "predicted", "effect [95 % interval]", "against", "verdict"]]


def paired_differences(settings: Settings, measure: Measure) -> tuple[np.ndarray, str]:
    """Differences (S, B) for S seeds and B images, in shares of 1, and whom they are held against.

    Raises NotTestable where the preset has no such models."""
    network = measure.network or settings.recipe.expert
    column = measure.kind if measure.kind in SCORES else "switched"
    if (measure.kind, measure.model) == ("network", "ensemble"):
        column = "experts"  # each of the networks alone
    if measure.against == "baselines":
        others = {NETWORKS[one]: ("standalone", one, column) for one in settings.baselines}
    elif measure.against == "other networks":
        compared = settings.compared_experts
        if network not in compared or len(compared) == 1:
            raise NotTestable(f"the preset does not compare {NETWORKS[network]} with others")
        others = {NETWORKS[one]: (measure.model, one, column) for one in compared if one != network}
    elif measure.against == "its plain ensemble":
        others = {measure.against: (measure.model, network, "uniform")}
    else:
        titles = {one: MIXTURES.get(one, f"independent {NETWORKS[network]}s") for one in METHODS}
        others = {titles[one]: (one, network, column) for one in measure.against}
    own = by_image(settings, measure, measure.model, network, column)
    if not others:
        raise NotTestable(f"the preset has no {measure.against}")
    values = {title: by_image(settings, measure, *one) for title, one in others.items()}
    best = max(values, key=lambda title: values[title].mean())
    scale = values[best].mean() if measure.kind in SCORES else 1
    return (own - values[best]) / scale, best


def by_image(settings: Settings, measure: Measure, method: str, network: str, column: str) -> np.ndarray:
    """A column of the long frame of a method with a network, (S, B): clean, the mean over the attacks on the first of
    the preset's gates, or the worst case over adaptive attacks."""
    data = measure.data or settings.recipe.dataset
    if data not in settings.datasets:
        raise NotTestable(f"the preset has no {DATA[data]}")
    kind, tables = KINDS[measure.kind]
    names = dict.fromkeys(name for table in tables for name in table(settings))
    wanted = {"dataset": data, "method": method, "expert": network, "regime": measure.regime}
    names = [name for name in names if wanted.items() <= name.model_dump().items()]
    if not names:
        raise NotTestable(f"the preset has no {MIXTURES.get(method, NETWORKS[network])} for it")
    rows = read_rows(settings, names, kind)
    if kind == "adaptive":
        rows = rows[rows["family"] != "clean"]
    else:
        rows = rows[rows["sees"] == ("" if measure.under == "clean" else settings.attack_gates[0])]
    groups = rows.groupby(["seed", "image"])[column]
    return (groups.min() if kind == "adaptive" else groups.mean()).unstack().to_numpy(float)


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of differences (S, B) between two models on the same B images, for S pairs of seeds, and the ends of its
    95 % interval.

    By statsmodels: the differences on a constant, with a covariance clustered by image and, with more than one seed,
    by seed too (Cameron, Gelbach & Miller 2011), and Student's t with as many degrees of freedom as the smaller of
    the two numbers allows. With one seed the interval tells what other images would do, and not what another training
    would. Where all differences are equal, so that none of the images says how far others may differ, the interval is
    widened by what is compatible with no deviation in so many images (Wilson's).
    """
    import statsmodels.api as statsmodels  # costs seconds
    from scipy.stats import binomtest

    seeds, images = differences.shape
    values = differences.ravel()
    effect = float(values.mean())
    if np.ptp(values) < 1e-12:
        rest = float(binomtest(0, images).proportion_ci(method="wilson").high)
        return effect, effect - rest, effect + rest
    by_image, by_seed = np.tile(np.arange(images), seeds), np.repeat(np.arange(seeds), images)
    ways = [by_image] if seeds == 1 else [np.column_stack((by_image, by_seed)), by_seed]
    for groups in ways:  # with few seeds the variance of two ways can come out negative
        model = statsmodels.OLS(values, np.ones(len(values)))
        fit = model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
        with np.errstate(invalid="ignore"):
            low, high = fit.conf_int()[0]
        if np.isfinite([low, high]).all():
            break
    return effect, float(low), float(high)
