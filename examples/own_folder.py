"""A folder of one's own, an owner a sub-folder, as torch data sets.

    python examples/own_folder.py FOLDER [RUN_FOLDER] [section.key=value ...]

``srfed train --data FOLDER`` does the same without a line of Python. This is for whoever has a data
set already, with transforms of its own: anything with a length and an index will do.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

import srfed
from srfed.records import EvaluationRecord, RoundRecord

SIDE = 16


class Pictures(Dataset[Tensor]):
    """The pictures of one owner: float, C x H x W, from 0 to 1."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(file for file in folder.iterdir() if file.suffix in (".png", ".jpg"))
        self.transform = transforms.Compose(
            [transforms.Resize(SIDE), transforms.CenterCrop(SIDE), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as picture:
            tensor: Tensor = self.transform(picture.convert("RGB"))
        return tensor


class Print(srfed.Observer):
    """Says how each round went."""

    def on_round(self, record: RoundRecord) -> None:
        print(f"round {record.round}: loss {record.loss:.4f}")

    def on_evaluation(self, record: EvaluationRecord) -> None:
        print(f"round {record.round}: {record.score_name} {record.score:.3f}")


def main(arguments: Sequence[str]) -> None:
    settings = [word for word in arguments if "=" in word]
    folder, *rest = [word for word in arguments if "=" not in word]
    owners = {place.name: Pictures(place) for place in sorted(Path(folder).iterdir())}
    config = srfed.load_config(
        None, ["name=own-folder", "training.batch_size=8", "evaluation.every=0", *settings]
    )
    run_dir = rest[0] if rest else None
    run = srfed.train(config, owners, observers=[Print()], run_dir=run_dir)
    print(f"{run.path}: {', '.join(run.tasks)}; {run.sample(0, 4).shape} uint8")


if __name__ == "__main__":
    main(sys.argv[1:])
