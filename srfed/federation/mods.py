"""An owner's own mods: functions of installed packages, named in the agreement by hash, that stand
between the guard and what answers a message.

A mod is Flower's: ``mod(message, context, call_next)`` gives the reply. The guard stands outside,
so that whatever a mod makes of a reply is checked as a reply without mods is.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from srfed.errors import UserError
from srfed.federation.agreement import COMMAND, AgreedMod, not_agreed

Handler = Callable[..., Any]
"""Answers a message; takes Flower's message and context."""
COMPILED = "__pycache__"


def agreed_mod(name: str) -> AgreedMod:
    """A mod as an agreement has it, "module:function" with the fingerprint of what is installed.

    Raises:
        UserError: it is not installed, or no function.
    """
    fingerprint = package_fingerprint(name)
    _load(name)
    return AgreedMod(name=name, fingerprint=fingerprint)


def with_mods(mods: Sequence[AgreedMod], handler: Handler) -> Handler:
    """A handler with an agreement's mods around it, the first one outermost.

    Raises:
        RequestRefusedError: what is installed is not what was agreed to.
        UserError: it is not installed, or no function.
    """
    # Before any is imported: what was not agreed to does not run.
    if said := changed_mod(mods):
        raise not_agreed("a mod of this site", f"{said}; agree again with: {COMMAND}")
    for mod in reversed(mods):
        handler = partial(_called, _load(mod.name), handler)
    return handler


def changed_mod(mods: Sequence[AgreedMod]) -> str | None:
    """The first mod whose package is not the one that was agreed to, in words; None where all are.

    Raises:
        UserError: one is not installed.
    """
    for mod in mods:
        if (found := package_fingerprint(mod.name)) != mod.fingerprint:
            return (
                f"the package of {mod.name} has the SHA-256 {found[:12]}, agreed was "
                f"{mod.fingerprint[:12]}"
            )
    return None


def package_fingerprint(name: str) -> str:
    """SHA-256 over the names and contents of all files of the package, or the one module, that a
    mod's "module:function" begins with; what it imports from elsewhere is not in it.

    Raises:
        UserError: no such package is installed, or it cannot be read.
    """
    module, separator, function = name.partition(":")
    if not (module and separator and function):
        raise UserError(f"mod {name!r} is impossible; allowed: module:function")
    package = module.partition(".")[0]
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    if spec is not None and not folders and spec.has_location and spec.origin is not None:
        return _hash_of({Path(spec.origin).name: Path(spec.origin)})
    if not folders:
        raise UserError(f"mod {name!r}: there is no installed package {package!r}")
    return _hash_of(
        {
            file.relative_to(folder).as_posix(): file
            for folder in folders
            for file in folder.rglob("*")
            if file.is_file() and COMPILED not in file.parts
        }
    )


def _hash_of(files: dict[str, Path]) -> str:
    try:
        contents = {
            name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in sorted(files)
        }
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from error
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _load(name: str) -> Handler:
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"mod {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise UserError(f"mod {name!r}: {module} has no function {function!r}")
    return found  # type: ignore[no-any-return]


def _called(mod: Handler, call_next: Handler, message: Any, context: Any) -> Any:
    return mod(message, context, call_next)
