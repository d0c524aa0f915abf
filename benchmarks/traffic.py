"""Bytes of a round along the partition's dial, with steps on the update, and with φ in codes:
``python -m benchmarks.traffic``.

Runs one real round in process for each setting and prints what the messages held, beside the least
possible (4 bytes a parameter of φ), per client and direction.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from srfed.commands.options import Parser
from srfed.data import load_task
from srfed.federation.flower.in_process import run_in_process
from srfed.model import build_model, build_partition
from srfed.runs.requested import requested_config
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder

CASES = {
    **{
        f"exclusive {stages}": [f"model.exclusive_stages={stages}"]
        for stages in ("none", "io", "1", "2", "3", "4", "all")
    },
    "clip": ["updates.steps=[clip]"],
    "quantise, 8 bits": ["updates.steps=[quantise]"],
    "quantise, 4 bits": ["updates.steps=[quantise]", "updates.quantise_bits=4"],
    "8 bits down": ["updates.shared_bits=8"],
    "8 bits both ways": ["updates.shared_bits=8", "updates.steps=[quantise]"],
    "4 up, 8 down": [
        "updates.shared_bits=8",
        "updates.steps=[quantise]",
        "updates.quantise_bits=4",
    ],
    "4 bits both ways": [
        "updates.shared_bits=4",
        "updates.steps=[quantise]",
        "updates.quantise_bits=4",
    ],
}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="default: the embedded digits")
    parser.add_argument("--data-dir", help="where the images are")
    options = parser.parse_args()
    print(
        f"{'case':<17} {'φ, parameters':>14} {'down, bytes':>12} {'up, bytes':>12} "
        f"{'up / (4 |φ|)':>13}"
    )
    for case, settings in CASES.items():
        overrides = [
            *settings,
            "federation.clients=1",
            "federation.rounds=1",
            "training.local_steps=1",
            "training.local_epochs=null",
            "evaluation={every: 0, samples: 2, ssim_images: 0}",
            "sampling={sampler: ddim, steps: 1}",
        ]
        data_dir = None if options.data_dir is None else json.dumps(options.data_dir)
        config = requested_config(options.config, overrides, {"data.dir": data_dir})
        model = build_model(config, load_task(config.data, 0).train.shape[-1])
        shared = sum(
            model.state_dict()[name].numel() for name in build_partition(config, model).shared
        )
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            run = RunFolder.create(Path(folder) / "run", config)
            run_in_process(run)
            (line,) = MetricsLog(run.metrics).rounds()
        ratio = f"{line['bytes_up'] / (4 * shared):.4f}" if shared else "-"
        print(
            f"{case:<17} {shared:>14,} {line['bytes_down']:>12,} {line['bytes_up']:>12,} "
            f"{ratio:>13}"
        )


if __name__ == "__main__":
    main()
