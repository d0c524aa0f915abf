"""How many images each task generates for an evaluation."""


def share_of_samples(total: int, tasks: int) -> int:
    """The share of each of ``tasks`` tasks, so that all together generate at least ``total``
    images.

    It is the same for all and depends on nobody's presence: two answers of one client about n and n
    + 1 images would differ by a single image.
    """
    return -(-total // tasks)
