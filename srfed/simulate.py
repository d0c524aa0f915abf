"""Simulate a federation on this machine: ``python -m srfed.simulate --clients 10``."""

from srfed.commands.train import simulate as main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
