"""The federation: what is asked and answered, agreed, screened and aggregated.

Its folder ``flower`` is the only room that imports Flower or Ray. Neither may report usage or look
for updates from here.
"""

import os


def report_nothing() -> None:
    """Tell Flower and Ray, which read it when they begin, to report nothing; what the user has set
    stays.
    """
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(name, value)


report_nothing()
