"""Data sets as tasks: each client's own training and held-out images, and the range that models
see.
"""

from srfed.data.contents import describe_contents
from srfed.data.images import to_model_range, to_uint8
from srfed.data.own_images import (
    accept_images,
    current_images,
    describe_own_images,
    load_own_task,
    recorded_images,
)
from srfed.data.record import RECORD_FILE, ImageRecord
from srfed.data.tasks import (
    Task,
    describe_images,
    load_recorded_task,
    load_recorded_tasks,
    load_task,
    load_tasks,
    record_tasks,
    task_names,
)

__all__ = [
    "RECORD_FILE",
    "ImageRecord",
    "Task",
    "accept_images",
    "current_images",
    "describe_contents",
    "describe_images",
    "describe_own_images",
    "load_own_task",
    "load_recorded_task",
    "load_recorded_tasks",
    "load_task",
    "load_tasks",
    "record_tasks",
    "recorded_images",
    "task_names",
    "to_model_range",
    "to_uint8",
]
