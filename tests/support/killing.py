"""A client that kills its own process, or the node that it is on, in the middle of a round."""

import os
import signal
import time
from pathlib import Path

import ray
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from srfed.federation.flower.client_app import guarded_app
from srfed.federation.messages import TRAIN

OTHER_NODE = "127.0.0.2"
NODE_IS_GONE, WORKER_IS_GONE = "node-is-gone", "worker-is-gone"


def killing(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """In round 1 the other node is killed with whoever trains there first, for whom the first node
    waits; in round 2 client 1 dies when its attempt is stored and its reply is not sent. Once each.
    """
    folder = Path(str(context.node_config["state-dir"])).parent
    node_is_gone, worker_is_gone = folder / NODE_IS_GONE, folder / WORKER_IS_GONE
    if message.metadata.message_type != TRAIN:
        return call_next(message, context)
    if message.metadata.group_id == "1":
        if ray.util.get_node_ip_address() == OTHER_NODE:
            node_is_gone.touch()
            os.kill(os.getppid(), signal.SIGKILL)
        for _ in range(1200):
            if node_is_gone.exists():
                break
            time.sleep(0.1)
    reply = call_next(message, context)
    late = message.metadata.group_id == "2" and context.node_config["partition-id"] == 1
    if late and not worker_is_gone.exists():
        worker_is_gone.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return reply


app = guarded_app([killing])
