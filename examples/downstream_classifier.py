"""Are the samples of use? A classifier that has seen nothing else, tested on real images.

    python examples/downstream_classifier.py RUN [SAMPLES]

For every owner as many images are generated as are asked for (100), a classifier learns to tell the
owners apart from these alone, and its accuracy on the owners' held-out real images is printed
beside that of the same classifier trained on as many real ones. For a simulation's run, whose
images are where its configuration says.
"""

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

import srfed
from srfed.data import load_tasks
from srfed.data.images import Images


def accuracy(train: Sequence[Images], test: Sequence[Images]) -> float:
    """Of logistic regression on pixels, that tells apart what lies at the same places."""

    def flat(groups: Sequence[Images]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        pixels = np.concatenate([group.reshape(len(group), -1) for group in groups]) / 255
        return pixels, np.repeat(np.arange(len(groups)), [len(group) for group in groups])

    classifier = LogisticRegression(max_iter=1000).fit(*flat(train))
    return float(classifier.score(*flat(test)))


def main(arguments: Sequence[str]) -> None:
    run = srfed.open_run(arguments[0])
    count = int(arguments[1]) if len(arguments) > 1 else 100
    tasks = load_tasks(run.config.data, len(run.tasks))
    generated = [run.sample(task.name, count) for task in tasks]
    test = [task.test for task in tasks]
    real = accuracy([task.train[:count] for task in tasks], test)
    print(f"accuracy on {sum(map(len, test))} held-out images of {len(tasks)} owners")
    print(f"trained on up to {count} real images each: {real:.3f}")
    print(f"trained on {count} generated images each:  {accuracy(generated, test):.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
