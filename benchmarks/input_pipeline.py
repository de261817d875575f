"""Augmented training batches, ours against torchvision's transforms in a DataLoader.

Both crop (4 pixels of padding), flip and rotate (up to 15 degrees) the same images in random
order. Everything runs on one thread, as the DataLoader's workers do.
"""

from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

import torch
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.sides import ratios, take_turns
from immunity_lib.data import ImageSet, load_dataset
from immunity_lib.data.batches import training_batches

BATCH_SIZE = 32  # the paper's
IMAGES = 2000
ROUNDS = 5


class TransformedImages(torch.utils.data.Dataset):
    """Images as torchvision's data sets hold and transform them: one at a time, by Pillow."""

    def __init__(self, image_set: ImageSet):
        self.pixels = image_set.images.permute(0, 2, 3, 1).numpy()
        self.labels = image_set.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(15),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pixels[row]), self.labels[row]


def main() -> None:
    image_set = load_dataset("parts10", train_images=IMAGES, test_images=1).splits["train"]
    generator = torch.Generator().manual_seed(0)
    transformed = TransformedImages(image_set)

    def loader(workers: int) -> Iterable:
        return DataLoader(transformed, BATCH_SIZE, shuffle=True, num_workers=workers, generator=generator)

    ours = "immunity_lib"
    epochs: dict[str, Callable[[], Iterable]] = {
        ours: lambda: training_batches(image_set, BATCH_SIZE, generator),
        "DataLoader, 0 workers": lambda: loader(0),
        "DataLoader, 2 workers": lambda: loader(2),
    }

    def run(epoch: Callable[[], Iterable]) -> None:
        for _ in epoch():
            pass

    seconds = take_turns({name: partial(run, epoch) for name, epoch in epochs.items()}, ROUNDS)
    for name, measured in seconds.items():
        ratio = ratios(measured, seconds[ours])
        print(f"{name:24}{IMAGES / median(measured):10,.0f} images/s, {ratio} our time")
