# %% [markdown]
# # A federation in a notebook
#
# Open this file in VS Code, or in Jupyter with jupytext; `# %%` begins a cell. As it stands it
# takes about a minute.

# %% A look at it: a small network, few rounds
settings = [
    "model.channels=[16, 32, 64, 64]",
    "federation.rounds=4",
    "evaluation.every=2",
    "resources.backend=inline",
]
count, folder = 200, "runs/notebook"

# %% [markdown]
# ## Images
#
# A mapping of owners' names to data sets, whatever yours are: torch's, Hugging Face's, arrays.

# %% Three owners of handwritten digits
from sklearn.datasets import load_digits

digits = load_digits()
owners = {
    f"digit-{label}": (digits.images[digits.target == label][:count] / 16)  # floats, 0 to 1
    for label in (0, 1, 7)
}

# %% [markdown]
# ## Training, with a metric of one's own

# %% It is called at every evaluation
import numpy as np

import srfed


def ink_gap(real: np.ndarray, generated: np.ndarray) -> float:
    """How much more ink there is in one than in the other."""
    return abs(float(real.mean()) - float(generated.mean()))


config = srfed.load_config(None, settings)
run = srfed.train(config, owners, metrics={"ink_gap": ink_gap}, run_dir=folder)

# %% [markdown]
# ## What came out
#
# `run.frame()` is the same as a pandas table.

# %% One number a row
from srfed.reporting.frame import tidy

table = tidy(run.metrics())
losses = [row["value"] for row in table if (row["metric"], row["owner"]) == ("loss", "all")]
gaps = {row["owner"]: row["value"] for row in table if row["metric"] == "ink_gap"}
print(f"loss by round: {np.round(losses, 3)}; ink gap: {gaps}")

# %% Samples, one row an owner
samples = {task: run.sample(task, 8) for task in run.tasks}
sheet = np.concatenate([np.concatenate(list(images), 1) for images in samples.values()])
print(f"{sheet.shape} uint8, for matplotlib's imshow")

# %% [markdown]
# ## Two owners come later
#
# A new run that starts from this one's φ: its owners are new, and so is every θ_i.

# %% The digest of where it started is in run.json
later = {f"digit-{label}": digits.images[digits.target == label][:count] / 16 for label in (4, 9)}
second = srfed.train(config, later, run_dir=f"{folder}-later", start_from=run.path)
print(f"{second.path}: {second.tasks}, round {second.round}")
