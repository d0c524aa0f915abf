"""Stateless randomness: every draw comes from a generator derived from what it is for.

A generator is named by (seed, purpose, parts...), for example (0, "noise", "digit-3", 12): the
same name gives the same draws in whichever process, after whichever restart. So nothing of a
generator's state is ever stored.
"""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *parts: str | int) -> int:
    """Derive a 63-bit seed from a run's seed and the name of what the draws are for.

    Args:
        seed: the run's seed, any integer.
        purpose: what is drawn ("batch order", "noise", "initialisation", ...).
        parts: what tells two uses of one purpose apart: task, round, step, block.

    Returns:
        An integer in [0, 2^63), the head of a SHA-256 over the parts and their types, so that
        ("a", 1) and ("a", "1") differ.
    """
    name = repr((int(seed), purpose, *parts)).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1


def derive_generator(seed: int, purpose: str, *parts: str | int) -> torch.Generator:
    """Return a fresh ``torch.Generator``, seeded by :func:`derive_seed`.

    It is the CPU's, whose draws are the same wherever they are then used; a GPU's own would give
    others.
    """
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *parts))
