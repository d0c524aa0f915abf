"""Run a federation on real machines: ``python -m srfed.deploy COMMAND``."""

from srfed.commands.deploy import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
