"""Run a federation on real machines: ``python -m srfed.deploy COMMAND``."""

from collections.abc import Sequence

from srfed.systems import told_of_system


def main(arguments: Sequence[str] | None = None) -> int:
    """As ``srfed deploy``."""
    if status := told_of_system():
        return status
    from srfed.commands.deploy import main as deploy

    return deploy(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
