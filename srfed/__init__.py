"""srfed: train diffusion models together without pooling images (federated SR-DDPM).

The names below are loaded when they are first asked for, so that ``import srfed`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from srfed.api import Run as Run
    from srfed.api import open_run as open_run
    from srfed.api import train as train
    from srfed.config import RunConfig as RunConfig
    from srfed.config import load_config as load_config
    from srfed.data.tasks import Task as Task
    from srfed.errors import UserError as UserError
    from srfed.observer import Observer as Observer
    from srfed.reporting.mlflow import MLflow as MLflow
    from srfed.reporting.weights_and_biases import WeightsAndBiases as WeightsAndBiases

_WHERE = {
    "__version__": "srfed.version",
    "MLflow": "srfed.reporting.mlflow",
    "Observer": "srfed.observer",
    "Run": "srfed.api",
    "RunConfig": "srfed.config",
    "Task": "srfed.data.tasks",
    "UserError": "srfed.errors",
    "WeightsAndBiases": "srfed.reporting.weights_and_biases",
    "load_config": "srfed.config",
    "open_run": "srfed.api",
    "train": "srfed.api",
}
__all__ = [*_WHERE]
_EVERYWHERE = {"__version__", "UserError"}
"""What there is on systems, too, on which srfed does not run."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'srfed' has no attribute {name!r}")
    if name not in _EVERYWHERE:
        from srfed.systems import check_system

        check_system()
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
