"""The federation: ClientApp, ServerApp, strategy, and the grids that run them.

The only room that imports Flower or Ray. Neither may report usage or look for updates from here.
"""

import os

for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)
