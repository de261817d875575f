"""What comes with the project of a preset's results, made from those in runs/: `make pretrained`.

Small weights let a notebook show its models before anything is trained. Half precision halves their size; each record
says which weights they were rounded from and what that changed, and each card what is known of them (--cards writes
these alone, from the records and tables that are there). Of a study too long to be repeated for a look, notebooks draw
tables and verdicts from all training records and measurements: --measurements writes these alone.
"""

import torch
from cards import write_cards

from immunity_lib.data import Dataset
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.files import read_tensors, write_tensors
from immunity_lib.moe import ImmunityMoE
from study.catalogue import ModelName, explored_models, measured_models, trained_models
from study.graph import parse_options, preset_parser
from study.settings import Settings
from study.store import (
    ASKED,
    WEIGHTS,
    checksum,
    load_data,
    own_folder,
    pretrained_folder,
    read_if_answered,
    read_record,
    record_path,
    trained_model,
    write_atomically,
    write_json,
)


def publish_measurements(settings: Settings, name: ModelName) -> None:
    """Write what was measured of a model, and how it was trained, to pretrained/<preset>/<name>/."""
    folder = pretrained_folder(settings, name)
    for kind in ["training"] * (not (folder / WEIGHTS).exists()) + [*ASKED]:
        found, called = record_path(settings, name, kind), "record" if kind == "training" else kind
        files = [found] if kind == "training" else [found.with_suffix(".parquet"), found]
        if not all(path.exists() for path in files):
            continue
        if not read_if_answered(found, settings, name, kind):
            print(f"{found} is of other settings or weights and was left out")
            continue
        for path in files:  # the record last, so that it speaks of a frame that is there
            write_atomically(folder / f"{called}{path.suffix}", path.read_bytes())


def publish_weights(settings: Settings, name: ModelName, dataset: Dataset) -> None:
    """Write a model's weights and record to pretrained/<preset>/<name>/ from runs/, if it is trained."""
    source, folder = own_folder(settings, name), pretrained_folder(settings, name)
    if not (source / "record.json").exists():
        print(f"{name} is not trained and was left out")
        return
    own = settings.model_copy(update={"pretrained": False})
    model, record = trained_model(own, name, dataset), read_record(own, name, "training")
    tensors, notes = read_tensors(source / WEIGHTS)
    halves = {k: one.half() if one.is_floating_point() else one for k, one in tensors.items()}
    write_tensors(folder / WEIGHTS, halves, notes)
    before = _answers(model, dataset)
    model.load_state_dict(halves)
    kept = (_answers(model, dataset) == before).float().mean().item()
    rounding = {"from": record["weights"], "to": "float16", "expert_answers_kept": kept}
    weights = {"weights": checksum(folder / WEIGHTS), "rounding": rounding}
    write_json(folder / "record.json", record | weights)
    print(f"{folder}: {kept:.2%} of the experts' answers on test images are those before rounding")


@torch.no_grad()
def _answers(model: ImmunityMoE, dataset: Dataset) -> torch.Tensor:
    """What each expert answers to each test image, (B, N)."""
    device = next(model.parameters()).device
    batches = evaluation_batches(dataset.splits["test"], 250, device)
    return torch.cat([model.expert_outputs(batch).logits.argmax(-1) for batch, _ in batches])


def publish_all(settings: Settings) -> None:
    """Publish every mixture of the preset's ablation, under each regime."""
    dataset = load_data(settings)
    for name in explored_models(settings):
        publish_weights(settings, name, dataset)
    write_cards(settings)


def publish_all_measurements(settings: Settings) -> None:
    """Publish what was measured of all models, and how they were trained."""
    measured = [name for kind in ASKED for name in measured_models(settings, kind)]
    for name in dict.fromkeys([*trained_models(settings), *measured]):
        publish_measurements(settings, name)


if __name__ == "__main__":
    parser = preset_parser("pretrained/publish.py", __doc__)
    parser.add_argument("--measurements", action="store_true", help="training records and measurements alone")
    parser.add_argument("--cards", action="store_true", help="the cards alone, of the weights that are there")
    options, settings = parse_options(parser)
    publish = publish_all_measurements if options.measurements else write_cards if options.cards else publish_all
    publish(settings)
