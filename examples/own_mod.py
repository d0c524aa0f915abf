"""A mod of a site's own, as Flower has them: noise of this owner's on every update that leaves.

    PYTHONPATH=examples python -m srfed.deploy agree --mod own_mod:noise ...

A mod stands between srfed's guard and what answers. It sees every message with its reply, and what
it makes of a reply is checked by the guard as ever: values may be others, names, types and sizes
may not. This one shows how; it counts no privacy budget, and is no differential privacy.
"""

import numpy as np
from flwr.app import Array, Context, Message
from flwr.clientapp.typing import ClientAppCallable

DEVIATION = 1e-4
"""Standard deviation of the noise on each value of φ_i, or of what steps make of its change."""
_generator = np.random.default_rng()
"""Of the owner's own: srfed's generators are named by the run's seed, which the server knows."""


def noise(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let the site answer, and add noise to the update that it sends."""
    reply = call_next(message, context)
    if message.metadata.message_type == "train":
        for record in reply.content.array_records.values():
            # One array for each type of number, with the values of all tensors of that type.
            if "float32" in record:
                values = record["float32"].numpy()
                drawn = _generator.normal(0.0, DEVIATION, values.shape)
                record["float32"] = Array((values + drawn).astype(np.float32))
    return reply
