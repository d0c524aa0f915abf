"""Show a configuration's partition: ``srfed partition --preset mnist``."""

import argparse
import json
from collections.abc import Sequence

from srfed.commands.options import Parser, add_configuration
from srfed.interrupts import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed partition",
        description="Print which of the network's modules are shared and which exclusive, with "
        "parameters and bytes.",
    )
    add_configuration(parser, "model.exclusive_stages=io")
    parser.add_argument("--data-dir", metavar="DIR", help="where the images are (data.dir)")
    parser.add_argument(
        "--image-channels",
        type=int,
        metavar="C",
        help="channels of the images; default: looked up in the data",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _show(options))


def _show(options: argparse.Namespace) -> None:
    from srfed.config.model import exclusive_in_words
    from srfed.data import load_task
    from srfed.errors import UserError
    from srfed.runs.requested import requested_config
    from srfed.units import bytes_in_words

    channels = options.image_channels
    if channels is not None and channels < 1:
        raise UserError(f"--image-channels {channels} is impossible; allowed: 1 or more")
    if channels is not None and options.data_dir is not None:
        raise UserError(
            "--data-dir would be ignored, as --image-channels says all that it is looked up for"
        )
    data_dir = None if options.data_dir is None else json.dumps(options.data_dir)
    config = requested_config(options.config, options.overrides, {"data.dir": data_dir})
    if channels is None:
        channels = load_task(config.data, 0).train.shape[-1]
    # Importing torch takes seconds: what is wrong with settings and images is said before.
    from srfed.federation.contract import Contract
    from srfed.federation.layout import value_bytes
    from srfed.model import build_model, build_partition
    from srfed.networks.partition import describe_modules

    model = build_model(config, channels)
    partition = build_partition(config, model)
    tensors = model.state_dict()

    print(f"{exclusive_in_words(config.model.exclusive_stages, config.model.owned)}\n")
    rows = describe_modules(tensors, partition)
    width = max(len(name) for name, _, _ in rows)
    print(f"{'module':<{width}}  {'part':<9}  {'parameters':>12}")
    for name, part, count in rows:
        print(f"{name:<{width}}  {part:<9}  {count:>12,}")
    shared, exclusive = (
        sum(tensors[name].numel() for name in names)
        for names in (partition.shared, partition.exclusive)
    )
    contract = Contract.of(config, partition.take_shared(tensors))
    down, up = (
        sum(map(value_bytes, records.values()))
        for records in (contract.training_request, {**contract.update, **contract.control})
    )
    clients = config.federation.clients_per_round or config.federation.clients
    print(f"\nshared     (φ)   {shared:>12,} parameters in {len(partition.shared)} tensors")
    print(f"exclusive  (θ_i) {exclusive:>12,} parameters in {len(partition.exclusive)} tensors")
    print(
        f"a round carries {bytes_in_words(down)} to each client and "
        f"{'as much' if up == down else bytes_in_words(up)} back; with {clients} clients "
        f"{bytes_in_words((down + up) * clients)} in all"
    )
