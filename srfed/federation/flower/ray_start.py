"""Ray for one run: one of its own, which nobody else can join, or a cluster that is there already.

A Ray without access tokens runs whatever any process that reaches its ports sends it, with the
rights of its user. So one of a run's own gets a random token, which stands in the environment of
its processes and nowhere else, and a cluster that asks for none is refused.
"""

import logging
import math
import os
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from srfed import __version__
from srfed.config import RunConfig
from srfed.device import gpus_here
from srfed.environment import surroundings_kept
from srfed.errors import UserError
from srfed.federation import report_nothing
from srfed.federation.flower.ray_grid import LONGEST_START, Room, reason_of_death
from srfed.federation.flower.ray_head import (
    INSTEAD,
    MODE,
    TOKEN,
    TOKEN_FILE,
    RayHead,
    cores_for,
    first_reason,
    head_for,
    variables_of_processes,
)
from srfed.federation.flower.ray_node import Seen, Wanted, look_at_gpu, unfit
from srfed.interrupts import SIGNALS, Interrupted
from srfed.records import Place
from srfed.storage.run_folder import RunFolder
from srfed.units import printable

try:
    from ray._raylet import (  # type: ignore[attr-defined]
        AuthenticationTokenLoader,
        Config,
        GcsClient,
    )

    HAS_TOKENS = True
except ImportError:
    HAS_TOKENS = False

CONNECT_SECONDS = 10.0
NODE_SECONDS = 120.0
"""Time for all nodes to say what they are like."""


class Started(NamedTuple):
    """A Ray for a run.

    Attributes:
        room: for clients' processes.
        wanted: what these ask of the machines that they are on; None on the run's own.
        folder: a folder of the user's alone that ends with Ray; None where Ray is joined.
    """

    room: Room
    wanted: Wanted | None = None
    folder: str | None = None


@contextmanager
def started_ray(run: RunFolder) -> Iterator[Started]:
    """A Ray for the run, here and now, whatever RAY_ADDRESS says; ended, or left, afterwards.

    What Flower and Ray change in this process (environment, log level, warnings) is put back.

    Raises:
        UserError: Ray does not start, the cluster cannot be joined or is not fit, or there is no
            room for a client.
    """
    if not HAS_TOKENS:
        raise UserError(
            f"Ray {ray.__version__} has no access tokens, so whoever reaches this machine could "
            f"join the run; allowed: the Ray that flwr[simulation] asks for; {INSTEAD}"
        )
    if ray.is_initialized():
        raise UserError(
            f"Ray cannot start: it runs in this process already (ray.shutdown() ends it); {INSTEAD}"
        )
    config = run.config
    address = config.resources.ray_address
    try:
        with surroundings_kept(), _quiet(), ExitStack() as stack:
            # What a run before this one has put back.
            report_nothing()
            # Ray announces a change of what clients without a GPU see; here they are to see none.
            warnings.filterwarnings(
                "ignore", message=".*accelerator visible devices", category=FutureWarning
            )
            try:
                if address is None:
                    yield _own(config, stack.enter_context(head_for(config, gpus_here())))
                else:
                    yield _joined(run, address)
            finally:
                ray.shutdown()
    finally:
        _read_token_anew()


def _own(config: RunConfig, head: RayHead) -> Started:
    """Join the Ray that has been started for this run alone."""
    address = head.address()
    os.environ |= {MODE: "token", TOKEN: head.token}
    os.environ.pop(TOKEN_FILE, None)
    _read_token_anew()
    try:
        _init(address=address)
    except Exception as error:
        # Ray raises what its parts raise: OSError, ValueError, ConnectionError, RuntimeError and
        # its own.
        raise UserError(f"Ray cannot start: {first_reason(error)}; {INSTEAD}") from error
    return Started(_room(config, cores_for(config)), folder=head.folder)


def _joined(run: RunFolder, named: str) -> Started:
    """Join a cluster that is there already."""
    what = f"resources.ray_address = {named}"
    try:
        address = ray._private.services.canonicalize_bootstrap_address_or_die(named)
    except (ConnectionError, ValueError, OSError) as error:
        raise UserError(f"{what}: {first_reason(error)}") from error
    if address != named:
        what = f"{what} ({address})"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{what}: nobody answers there ({first_reason(error)}); allowed: the address that "
            "`ray start --head` has printed, on a machine that is a node of it"
        ) from error
    os.environ[MODE] = "token"
    _read_token_anew()
    if not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        raise UserError(
            f"{what} needs the cluster's token in {TOKEN} (or {TOKEN_FILE}), which is not set"
        )
    _refuse_open(what, address)
    if not _admits(what, address):
        raise UserError(
            f"{what}: the cluster refuses the token; allowed: the one that its nodes were started "
            f"with, in {TOKEN} (or {TOKEN_FILE})"
        )
    try:
        _init(address=address, runtime_env={"env_vars": variables_of_processes(run.config)})
    except Exception as error:
        # As where Ray is started: it raises what its parts raise.
        raise UserError(f"{what}: {first_reason(error)}") from error
    wanted = Wanted(
        version=__version__,
        folder=str(run.path.absolute()),
        lineage=run.lineage,
        images=run.config.data.dir,
    )
    _look_at_nodes(what, wanted)
    resources = run.config.resources
    cores = int(ray.cluster_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]
    return Started(_room(run.config, min(resources.cpus or cores, cores)), wanted)


def _init(**arguments: Any) -> None:
    """``ray.init`` with what both kinds of Ray have in common; raises what it raises."""
    # Ray takes SIGTERM for itself, and aborts; a signal is to stop the run between two replies.
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    main_thread = threading.current_thread() is threading.main_thread()
    try:
        ray.init(
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            **arguments,
        )
    except SystemExit:
        raise Interrupted(signal.SIGTERM) from None
    finally:
        for number, handler in handlers.items() if main_thread else ():
            signal.signal(number, handler)


def _refuse_open(what: str, address: str) -> None:
    """Raise UserError where a stranger with a token of their own is let in."""
    own = {name: os.environ.pop(name) for name in (TOKEN, TOKEN_FILE) if name in os.environ}
    os.environ[TOKEN] = secrets.token_hex(32)
    _read_token_anew()
    try:
        admitted = _admits(what, address)
    finally:
        os.environ.pop(TOKEN)
        os.environ |= own
        _read_token_anew()
    if admitted:
        raise UserError(
            f"{what}: that Ray asks for no token, so whoever reaches it can run code as you; start "
            f"its nodes with {MODE}=token and a {TOKEN} of 32 random characters or more"
        )


def _admits(what: str, address: str) -> bool:
    """Whether a cluster takes the token that Ray has read last; raises UserError where none
    answers.
    """
    try:
        GcsClient(address=address)
    except AuthenticationError:
        return False
    except Exception as error:
        # Ray's own, and what it makes of gRPC's.
        raise UserError(f"{what}: no Ray answers there ({first_reason(error)})") from error
    return True


def _look_at_nodes(what: str, wanted: Wanted) -> None:
    """Raise UserError where a node of the cluster cannot work for the run."""
    look = ray.remote(unfit)
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    tasks = [look.options(num_cpus=0, scheduling_strategy=node).remote(wanted) for node in there]
    said, _ = ray.wait(tasks, num_returns=len(tasks), timeout=NODE_SECONDS)
    for node, task in zip(nodes, tasks, strict=True):
        name = f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
        if task not in said:
            raise UserError(f"{what}: {name} has not answered in {NODE_SECONDS:g} s")
        try:
            reason = ray.get(task)
        except RayError as error:
            reason = f"it cannot say what it is like: {reason_of_death(error)}"
        if reason:
            raise UserError(f"{what}: {name}: {printable(reason)}")


def _room(config: RunConfig, cores: int) -> Room:
    resources = config.resources
    gpus = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    share, place = client_share(config, gpus, cores), Place("cpu", resources.precision)
    if share:
        # A GPU that a client has to itself needs no measuring; a stack may be too large for any.
        open_share = resources.client_gpus is None and share < 1
        measure = open_share or resources.owners_stacked > 1
        seen = _look_at_gpu(config, share, measure=measure)
        share, place = client_share(config, gpus, cores, seen.fit), seen.place
    return Room(
        cpus=resources.client_cpus,
        gpus=share,
        most=max(1, min(config.federation.clients, cores // resources.client_cpus)),
        place=place,
    )


def _look_at_gpu(config: RunConfig, share: float, *, measure: bool) -> Seen:
    """What a process with this share of a GPU finds there; it ends before the clients' begin.

    Raises:
        UserError: it cannot train there, or does not come.
    """
    as_a_client: Any = ray.remote(
        num_cpus=config.resources.client_cpus, num_gpus=share, max_calls=1, max_retries=0
    )
    try:
        task = as_a_client(look_at_gpu).remote(config, measure=measure)
        seen: Seen | str = ray.get(task, timeout=LONGEST_START)
    except RayError as error:
        reason = reason_of_death(error)
        raise UserError(f"a client's process cannot use Ray's GPU: {reason}; {INSTEAD}") from error
    if isinstance(seen, str):
        raise UserError(f"a client's process on Ray's GPU: {seen}")
    return seen


def client_share(config: RunConfig, gpus: float, cores: int, fit: int | None = None) -> float:
    """The share of a GPU of each client: what the run says, or equal ones for as many clients as
    the cores run at once and GPUs have memory for.

    Args:
        config: the run's configuration.
        gpus: GPUs that Ray finds.
        cores: cores for all clients together.
        fit: clients that one GPU has memory for; None where nobody has looked.

    Raises:
        UserError: the run asks for more than there is.
    """
    resources, asked = config.resources, config.resources.client_gpus
    if asked is not None and asked > gpus:
        raise UserError(
            f"resources.client_gpus = {asked} is above the {gpus:g} GPUs that Ray finds"
        )
    if resources.device == "cpu":
        return 0.0
    if not gpus:
        if resources.device == "cuda":
            raise UserError(
                "resources.device = cuda, but Ray finds no GPU here; allowed: auto, cpu"
            )
        if resources.precision != "float32":
            raise UserError(
                f"resources.precision = {resources.precision} needs CUDA, and Ray finds no GPU "
                "here; allowed: float32"
            )
    if asked is not None or not gpus:
        return asked or 0.0
    at_once = max(1, min(config.federation.clients, cores // resources.client_cpus))
    # A share is of one GPU, never of two.
    on_each = math.ceil(at_once / gpus)
    equal = 1 / min(on_each, fit or on_each)
    # Ray counts shares in ten-thousandths; rounded down, so that all fit.
    return int(10_000 * equal) / 10_000


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither Flower nor Ray speaks beside the run: what happens to a client is in its own lines,
    what ends the simulation in the error.
    """
    log = logging.getLogger("flwr")
    level, worker = log.level, ray._private.worker
    log.setLevel(logging.CRITICAL)
    # A process that dies is announced with the log of its node, whatever log_to_driver says.
    shown = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = shown
        log.setLevel(level)


def _read_token_anew() -> None:
    """Let Ray read mode and token again: it keeps those that it has found first."""
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")
