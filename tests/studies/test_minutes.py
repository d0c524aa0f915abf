"""A study ends in time, for who has a machine by the piece."""

import signal
import time

import pytest

from simulations import table1
from srfed.interrupts import run_command


def test_a_study_ends_when_its_minutes_are_over(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGALRM)
    assert run_command(lambda: time.sleep(60), 0.001) == 3
    assert capsys.readouterr().err == "stopped after 0.001 minutes: the same command goes on\n"
    assert run_command(lambda: None, 100) == 0
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "soon"])
def test_impossible_minutes_are_refused(capsys: pytest.CaptureFixture[str], minutes: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        table1.main([f"--minutes={minutes}"])
    assert f"{minutes} is impossible; allowed: above 0" in capsys.readouterr().err
