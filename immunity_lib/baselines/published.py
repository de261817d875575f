"""The published recipes of the baselines, kept as data in recipes.yaml."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict


class PublishedRecipe(BaseModel):
    """How the authors of a network train it; fields: of a `Recipe`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    gaps: str
    fields: dict[str, Any]


def published_recipe(network: str, regime: str) -> PublishedRecipe:
    """The recipe for one of `BASELINES` under a regime; all but "standard" share one."""
    content = _content()
    chosen = content["networks"][network]["standard" if regime == "standard" else "adversarial"]
    return PublishedRecipe(**content["recipes"][chosen])


@lru_cache
def _content() -> dict:
    return yaml.safe_load((Path(__file__).parent / "recipes.yaml").read_text())
