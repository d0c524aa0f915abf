"""A client that writes down what surrounds it, for whoever started it to read."""

import json
import os
import sys
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from srfed.federation.flower.client_app import guarded_app
from srfed.work import COUNTS_VARIABLE

FOLDER = "TESTS_SURROUNDINGS"
"""The variable that names where."""


def telling(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    told = {
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "counts": os.environ.get(COUNTS_VARIABLE),
        "simulation": "flwr.simulation" in sys.modules,
    }
    Path(os.environ[FOLDER], f"{os.getpid()}.json").write_text(json.dumps(told))
    return call_next(message, context)


app = guarded_app([telling])
