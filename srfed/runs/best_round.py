"""The best round of a run by its owners' validation images, found while it is trained."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

from srfed.observer import Observer
from srfed.records import ResultRound, ValidationRecord
from srfed.storage.server_checkpoints import BestRound, RunState


def hold_to_owners(state: RunState, tell: Observer) -> RunState:
    """Let the best round begin anew where an owner has a θ_i that had none in it; says so."""
    best = state.best
    if best is None or not (new := sorted(state.attempts.keys() - best.attempts.keys())):
        return state
    return _anew(state, f"earlier rounds have no θ_i of {', '.join(new)}", tell)


def judge_round(
    state: RunState,
    losses: Mapping[str, float],
    tell: Observer,
    *,
    refused: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
) -> tuple[RunState, ValidationRecord]:
    """Compare a state with the best so far.

    The mean is over all owners whose loss was ever told: one that is silent now counts with its
    last. Of equal rounds the first is the best. A mean over more owners than that of the best round
    cannot be compared with it, so the best begins anew.

    Args:
        state: after the round.
        losses: what was told after it, by client.
        tell: told where the best begins anew, or nobody has told a loss.
        refused, missing: whose loss was not taken, or not told, and why.

    Returns:
        The state with its best round, and what goes on record.
    """
    if losses:
        known = {**state.validation, **losses}
        state = replace(state, validation=dict(sorted(known.items())))
        best = state.best
        if best is not None and (new := sorted(known.keys() - best.losses.keys())):
            state = _anew(state, f"there was no loss of {', '.join(new)} before", tell)
        loss = fmean(state.validation.values())
        if state.best is None or loss < state.best.loss:
            best = BestRound(state.round, loss, state.validation, dict(state.attempts))
            state = replace(state, best=best)
    else:
        tell.on_notice(f"round {state.round}: no owner has told its validation loss")
    return state, ValidationRecord(
        loss=fmean(losses.values()) if losses else None,
        loss_by_client=dict(losses),
        result=result_of(state),
        refused=dict(refused or {}),
        missing=dict(missing or {}),
    )


def result_of(state: RunState) -> ResultRound | None:
    """Which round is the best so far; None where there is none."""
    if state.best is None:
        return None
    return ResultRound(state.best.round, state.best.loss, fmean(state.validation.values()))


def _anew(state: RunState, why: str, tell: Observer) -> RunState:
    tell.on_notice(f"round {state.round}: the best round by validation begins anew: {why}")
    return replace(state, best=None)
