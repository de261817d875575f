"""The paper's claims, and what our records say of each.

The claims and the rule of the verdicts are data, in claims.yaml. Everything here is read from
records alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from immunity_lib.comparisons import (
    Accuracy,
    Network,
    NotTestable,
    Score,
    Switching,
    WorstCase,
    paired_differences,
)
from immunity_lib.intervals import Interval, paired_interval
from immunity_lib.settings import Settings

CLAIMS = Path(__file__).with_name("claims.yaml")
VERDICTS = ("holds", "does not hold", "undecided", "not testable at this scale")


class Claim(BaseModel):
    """A sentence of the paper and what it predicts; see claims.yaml for the rule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    sentence: str
    where: str
    measure: Accuracy | Score | Network | Switching | WorstCase | None = Field(
        None, discriminator="kind"
    )
    at_least: float | None = None
    at_most: float | None = None
    reading: str = ""
    untestable: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Claim:
        predictions = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if (self.measure is None) != bool(self.untestable) or (self.measure is None) == bool(
            predictions
        ):
            raise ValueError(
                f"claim {self.id} needs a measure and at_least or at_most, or else only why it is "
                "untestable"
            )
        return self

    def verdict(self, interval: Interval) -> str:
        """By the rule in claims.yaml; interval in the units of the prediction."""
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        if low <= interval.low and interval.high <= high:
            return "holds"
        if interval.high < low or interval.low > high:
            return "does not hold"
        return "undecided"


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims of the file; raises ValueError that names what is wrong in which claim."""
    claims = []
    for number, content in enumerate(yaml.safe_load(path.read_text()), start=1):
        try:
            claims.append(Claim.model_validate(content))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise ValueError(f"{path}, claim {number}, {where}: {problem['msg']}") from None
    names = [claim.id for claim in claims]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: each claim needs an id of its own; found {names}")
    return claims


def verdicts(settings: Settings, claims: Sequence[Claim]) -> pd.DataFrame:
    """One line a claim: claim (its id), sentence, where, predicted, effect, low, high (95 %), unit,
    against (what it was held against), seeds, images, verdict, and reason where there is none."""
    lines = []
    for claim in claims:
        line = {
            "claim": claim.id, "sentence": claim.sentence, "where": claim.where,
            "predicted": _predicted(claim), "reading": claim.reading,
        }  # fmt: skip
        try:
            if claim.measure is None:
                raise NotTestable(claim.untestable)
            differences, against = paired_differences(settings, claim.measure)
        except NotTestable as reason:
            line |= {"verdict": VERDICTS[-1], "reason": str(reason)}
        else:
            seeds, images = differences.shape
            interval = Interval(*(100 * value for value in paired_interval(differences)))
            line |= interval._asdict() | {
                "unit": "%" if claim.measure.kind == "score" else "points", "against": against,
                "seeds": seeds, "images": images, "verdict": claim.verdict(interval),
            }  # fmt: skip
        lines.append(line)
    columns = [
        "claim", "sentence", "where", "predicted", "reading", "effect", "low", "high", "unit",
        "against", "seeds", "images", "verdict", "reason",
    ]  # fmt: skip
    return pd.DataFrame(lines).reindex(columns=columns)


def _predicted(claim: Claim) -> str:
    if claim.measure is None:
        return ""
    unit = "%" if claim.measure.kind == "score" else "points"
    if claim.at_most is None:
        return f"at least {claim.at_least:+g} {unit}"
    return f"at most {claim.at_most:+g} {unit}"


def printed_verdicts(found: pd.DataFrame) -> pd.DataFrame:
    """Verdicts as text, one line a claim."""
    tested = found["effect"].notna()
    effects = [
        f"{row.effect:+.1f} [{row.low:+.1f}, {row.high:+.1f}] {row.unit}" if known else ""
        for row, known in zip(found.itertuples(index=False), tested, strict=True)
    ]
    reasons = found["reason"].astype(object).fillna("")  # all empty, they would be numbers
    return pd.DataFrame({
        "claim": found["claim"],
        "where": found["where"],
        "predicted": found["predicted"],
        "effect [95 % interval]": effects,
        "against": found["against"].fillna(""),
        "verdict": found["verdict"].where(tested, found["verdict"] + ": " + reasons),
    })  # fmt: skip
