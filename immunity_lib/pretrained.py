"""The small weights that come with the project, made from trained models: `make pretrained`.

They let a notebook show its models before anything is trained. Half precision halves their size;
each record says which weights they were rounded from and what that changed. Beside them lies the
record of their heat maps' scores.
"""

from __future__ import annotations

import sys
from tempfile import TemporaryDirectory

import torch

from immunity_lib.command_line import preset_parser
from immunity_lib.data import Dataset
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.models import (
    dataset_of,
    own_folder,
    pretrained_folder,
    trained_model,
    training_record,
)
from immunity_lib.moe import ImmunityMoE
from immunity_lib.recipes import ModelName, explored_models
from immunity_lib.records import read_tensors, write_atomically, write_record, write_tensors
from immunity_lib.results import record_path, score_record
from immunity_lib.settings import Settings, load_preset


def publish(settings: Settings, name: ModelName, dataset: Dataset) -> bool:
    """Write pretrained/<preset>/<name>/ from the model in runs/; False if it is not trained yet."""
    source, folder = own_folder(settings, name), pretrained_folder(settings, name)
    if not (source / "record.json").exists():
        return False
    own = settings.model_copy(update={"pretrained": False})
    model, record = trained_model(own, name, dataset), training_record(own, name)
    (folder / "scores.json").unlink(missing_ok=True)  # of the weights before
    tensors, notes = read_tensors(source / "model.safetensors", record["weights"])
    halves = {k: one.half() if one.is_floating_point() else one for k, one in tensors.items()}
    checksum = write_tensors(folder / "model.safetensors", halves, notes)
    before = _answers(model, dataset.splits["test"])
    model.load_state_dict(halves)
    kept = (_answers(model, dataset.splits["test"]) == before).float().mean().item()
    rounding = {"from": record["weights"], "to": "float16", "expert_answers_kept": kept}
    del record["selected"]  # that epoch's weights are not published
    write_record(folder / "record.json", record | {"weights": checksum, "rounding": rounding})
    with TemporaryDirectory() as elsewhere:
        published = settings.model_copy(update={"output_folder": elsewhere, "pretrained": True})
        score_record(published, name, dataset)
        scores = record_path(published, name, "scores").read_bytes()
    write_atomically(folder / "scores.json", scores)
    print(f"{folder}: {kept:.2%} of the experts' answers on test images are those before rounding")
    return True


@torch.no_grad()
def _answers(model: ImmunityMoE, images) -> torch.Tensor:
    """What each expert answers to each image, (B, N)."""
    device = next(model.parameters()).device
    batches = evaluation_batches(images, 250, device)
    return torch.cat([model.expert_outputs(batch).logits.argmax(-1) for batch, _ in batches])


def main(arguments: list[str] | None = None) -> int:
    """Publish every mixture of the preset's ablation that is trained, under each regime."""
    options = preset_parser("pretrained", __doc__, output=False).parse_args(arguments)
    try:
        settings = load_preset(options.preset, data_folder=options.data)
        dataset = dataset_of(settings)
        names = explored_models(settings)
        missing = [name for name in names if not publish(settings, name, dataset)]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in missing:
        print(f"{name} is not trained and was left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
