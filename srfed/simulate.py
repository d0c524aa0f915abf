"""Simulate a federation on this machine: ``python -m srfed.simulate --clients 10``."""

from collections.abc import Sequence

from srfed.systems import told_of_system


def main(arguments: Sequence[str] | None = None) -> int:
    """As ``srfed simulate``."""
    if status := told_of_system():
        return status
    from srfed.commands.train import simulate

    return simulate(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
