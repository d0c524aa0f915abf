"""What srfed asks of a network: anybody's may be trained."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Network(nn.Module):
    """A network that can be divided into a shared core and exclusive shells.

    A constructor takes ``image_channels`` and, of the section ``model``, the settings whose names
    it has (a network that the configuration names by "module:Class" takes ``model.options``); one
    that has an argument ``tasks`` is told the number of tasks.

    Attributes:
        owned: name patterns of what is exclusive whatever the dial says: a task's vector, an
            adapter.
        tasks: how many tasks it tells apart, by a table in φ; 0: none, and it is not told any.
    """

    owned: tuple[str, ...] = ()
    tasks: int = 0

    @abstractmethod
    def shells(self) -> Sequence[Sequence[str]]:
        """Name patterns of the tensors around the core, outermost shell first.

        The first is what meets the image (``exclusive_stages: io``), each further one is a step of
        the dial. A pattern that names a module takes all below it. What is in no shell is the core.
        No shell may be bypassed: what enters the core has gone through all of them.
        """

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor, tasks: Tensor | None = None) -> Tensor:
        """What the run's objective asks for, at x_t: the noise in it, for one.

        Args:
            x: N x C x H x W, float.
            time: (N,), in units of timesteps; any number, where the objective is ``edm``.
            tasks: (N,) int64, positions of the images' tasks; for a network with ``tasks`` only.

        Returns:
            N x C x H x W, the dtype of ``x`` outside autocast.
        """
