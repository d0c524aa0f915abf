"""Real processes killed in the middle of a run: the end has the bits of a run that nobody
disturbed.
"""

from pathlib import Path

import pytest

from benchmarks.soak import Episode, bits, soak_config, undisturbed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kills", [("client", "serverapp", "superlink")], ids="-".join)
def test_a_run_that_loses_processes_ends_in_the_undisturbed_bits(
    tmp_path: Path, kills: tuple[str, ...]
) -> None:
    config = soak_config(clients=2, rounds=4, on_missing="wait")
    expected = undisturbed(tmp_path / "undisturbed", config)
    said: list[str] = []
    episode = Episode(tmp_path / "episode", config, kills, seed=0, say=said.append)
    run = episode.run()
    assert sum(episode.killed.values()) == len(kills), said
    assert bits(run, episode.state_dir) == expected
    assert set(expected) == {"server", "digit-0", "digit-1"}
