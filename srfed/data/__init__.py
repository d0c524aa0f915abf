"""Data sets as tasks: each client's own training and held-out images, and the range that models see."""

from srfed.data.images import to_model_range, to_uint8
from srfed.data.own_images import load_own_task
from srfed.data.tasks import Task, load_task, load_tasks, task_names

__all__ = ["Task", "load_own_task", "load_task", "load_tasks", "task_names", "to_model_range", "to_uint8"]
