"""The table of commands."""

from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": ("srfed.commands.train:train", "train on images of your own: proposes the rest"),
    "simulate": ("srfed.commands.train:simulate", "train over n simulated clients"),
    "centralise": ("srfed.commands.train:centralise", "train a baseline with all images"),
    "sample": ("srfed.commands.sample:main", "generate images with a trained run"),
    "evaluate": ("srfed.commands.evaluate:main", "score a trained run in every way there is"),
    "adapt": ("srfed.commands.adapt:main", "fit a new task to a trained run"),
    "partition": ("srfed.commands.partition:main", "show what is shared and what is exclusive"),
    "runs": ("srfed.commands.runs:main", "list runs, their state and their headline"),
    "report": ("srfed.commands.report:main", "make a run's page, report.html, again"),
    "watch": ("srfed.commands.watch:main", "see a run's page while it goes on"),
    "compare": ("srfed.commands.compare:main", "set runs beside each other"),
    "export": ("srfed.commands.export:main", "write a task's model as a folder for diffusers"),
    "share": ("srfed.commands.share:main", "copy a run without what is its owners' alone"),
    "deploy": ("srfed.commands.deploy:main", "run a federation on real machines"),
    "schema": ("srfed.commands.schema:main", "print the settings as a JSON schema, for editors"),
    "completion": ("srfed.commands.completion:main", "print a script that completes in the shell"),
}
"""What each command is, and where."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command with these arguments, loading no other; returns its exit code."""
    module, function = COMMANDS[name][0].split(":")
    return int(getattr(import_module(module), function)(arguments))
