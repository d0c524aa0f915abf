"""Do the samples belong to their tasks? ``python -m simulations.class_agreement --run RUN``.

An independent judge, a 3-nearest-neighbour classifier on the pixels of real images, is asked for the
task of each generated image. Its own accuracy on held-out real images is printed first: where it cannot
tell the tasks of real images apart (CIFAR), its verdict on generated ones means nothing.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from srfed.checkpoints.trained_run import TrainedRun
from srfed.command import run_command
from srfed.config import ResourcesConfig
from srfed.data import Task, load_tasks
from srfed.data.images import Images
from srfed.evaluation.generation import generate


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--n", type=int, default=100, help="samples of each task (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return run_command(lambda: _judge(options))


def class_agreement(tasks: Sequence[Task], samples: Mapping[str, Images]) -> dict[str, float]:
    """Share of each task's samples that the judge, trained on all real images, gives to that task."""
    judge = _train([(task.name, np.concatenate([task.train, task.test])) for task in tasks])
    return {name: float((judge.predict(_flat(images)) == name).mean()) for name, images in samples.items()}


def accuracy_on_real_images(tasks: Sequence[Task]) -> float:
    """The judge's accuracy on the tasks' test images when trained on their training images alone."""
    judge = _train([(task.name, task.train) for task in tasks])
    right = [judge.predict(_flat(task.test)) == task.name for task in tasks]
    return float(np.concatenate(right).mean())


def _train(classes: Sequence[tuple[str, Images]]) -> KNeighborsClassifier:
    labels = [name for name, images in classes for _ in images]
    return KNeighborsClassifier(3).fit(_flat(np.concatenate([images for _, images in classes])), labels)


def _flat(images: Images) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


def _judge(options: argparse.Namespace) -> None:
    run = TrainedRun(options.run, ResourcesConfig())
    tasks = load_tasks(run.config.data, run.config.federation.clients)
    print(f"the judge on held-out real images: {accuracy_on_real_images(tasks):.3f}")
    samples = {
        info.task: generate(
            run.model_of(info),
            run.diffusion,
            run.config.sampling,
            count=options.n,
            shape=run.shape,
            seed=options.seed,
            task=info.client,
        ).images
        for info in run.tasks
    }
    agreement = class_agreement(tasks, samples)
    for name, share in agreement.items():
        print(f"{name:<20} {share:.2f}")
    print(f"{'all tasks':<20} {np.mean(list(agreement.values())):.3f}  ({options.n} samples each, seed {options.seed})")


if __name__ == "__main__":
    raise SystemExit(main())
