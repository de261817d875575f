"""Tables for reading: laid out, rounded, and with what their numbers rest on.

A table is kept as a tidy frame, one line a cell, in the units that it is printed in: what labels
the row, then `FIELDS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from immunity_lib.settings import Settings

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

FIELDS = (
    "column",
    "unit",
    "value",  # the mean of
    "count",  # so many numbers, one a seed or one a network, and their
    "standard_deviation",  # empty if there is only one
    "images",  # test images behind each of the numbers
    "paper",  # the number that the paper reports, empty where it is not known,
    "paper_data",  # and the data it is for; empty where the paper has no such cell
)
DECIMALS = {"%": 1, "points": 1, "1e-3": 2, "pixels^4": 0, "nats": 3}
UNKNOWN = "not in our source"
DATA = {
    "parts10": "Parts-10",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "images": "own images",
}
NETWORKS = {
    "resnet18": "ResNet18",
    "densenet121": "DenseNet121",
    "googlenet": "GoogLeNet",
    "googlenet-kuangliu": "GoogLeNet-kuangliu",
    "pdarts": "P-DARTS",
    "advrush": "AdvRush",
    "robnet-free": "RobNet-free",
    "robnet-large-v1": "RobNet-large-v1",
    "robnet-large-v2": "RobNet-large-v2",
}
ATTACK_TITLES = {
    "fgsm": "FGSM",
    "bim": "BIM",
    "mim": "MIM",
    "pgd": "PGD",
    "cw": "C&W",
    "apgd": "APGD",
}


def printed(frame: pd.DataFrame) -> pd.DataFrame:
    """A table as text, one line a row of ours and, where the paper has that row, one of its own.

    Several numbers are printed as "mean ± standard deviation (count)".
    """
    labels = [field for field in frame.columns if field not in FIELDS]
    rows: dict[tuple, dict[str, str]] = {}
    for cell in frame.to_dict("records"):
        label = tuple(cell[field] for field in labels)
        header = f"{cell['column']} ({cell['unit']})"
        rows.setdefault((*label, "ours"), {})[header] = _ours(cell)
        if cell["paper_data"]:
            known = not pd.isna(cell["paper"])
            text = f"{cell['paper']:g}" if known else UNKNOWN
            if known and cell["unit"] != "%":  # the paper does not say the units of its scores
                text += " as printed"
            rows.setdefault((*label, "paper"), {})[header] = text
    lines = [dict(zip([*labels, "source"], row, strict=True)) | rows[row] for row in rows]
    text = pd.DataFrame(lines).fillna("")
    return text if (frame["paper_data"] != "").any() else text.drop(columns="source")


def readable(text: pd.DataFrame) -> Styler:
    """A table of sentences for a notebook: lines are broken, and begin on the left."""
    left = "text-align: left; white-space: normal; vertical-align: top"
    styles = [{"selector": selector, "props": left} for selector in ("th", "td")]
    return text.style.hide(axis="index").set_table_styles(styles)


def evidence(settings: Settings, frame: pd.DataFrame) -> str:
    """What a table rests on, in words: data, seeds, images and the error that those leave."""
    seeds = "one seed" if len(settings.seeds) == 1 else f"{len(settings.seeds)} seeds"
    data = " and ".join(DATA[name] for name in settings.datasets)
    text = f"Preset {settings.preset}, {data}, {seeds}"
    if (frame["count"] > 1).any():
        text += "; mean ± standard deviation (number of networks)"
    sentences = [f"{text}."]
    for images, group in frame.groupby("images", sort=False):
        shares = group.loc[group["unit"] == "%", "value"] / 100
        half_width = max(100 * binomial_half_width(share, int(images)) for share in shares)
        sentences.append(
            f"{', '.join(group['column'].unique())}: {images} images "
            f"(95 % interval at most ± {half_width:.1f} points)."
        )
    paper_data = [data for data in frame["paper_data"].unique() if data]
    if paper_data:
        sentences.append(f"The rows marked paper are {', '.join(paper_data)} at full scale.")
    return " ".join(sentences)


def binomial_half_width(share: float, images: int) -> float:
    """Half the width of the 95 % Wilson interval of a share of images, all in 0 .. 1.

    For an expectation over gates it is an upper bound, as each image then varies less.
    """
    z = 1.959964
    spread = (share * (1 - share) / images + (z / (2 * images)) ** 2) ** 0.5
    return z * spread / (1 + z**2 / images)


def _ours(cell: dict) -> str:
    decimals = DECIMALS[cell["unit"]]
    text = f"{round(cell['value'], decimals) + 0.0:.{decimals}f}"  # no "-0.0"
    if cell["count"] > 1:
        text += f" ± {cell['standard_deviation']:.{decimals}f} ({cell['count']})"
    return text
