"""One owner's model as a folder that diffusers opens, without srfed and without diffusers here.

    model_index.json                                     which classes the pipeline is made of
    scheduler/scheduler_config.json                      our β_t, and how is sampled
    unet/config.json, diffusion_pytorch_model.safetensors     the averaged (φ, θ_i)
    unet/srfed_unet.py                                   the network, as srfed has it
    README.md                                            the model's card

Our UNet's skips are none of ``UNet2DModel``'s, so its own code goes along. What a task owns beside
its stages, or its row of a table of tasks, is a constant once the task is chosen, and becomes a
part of the biases that it is added to.
"""

import ast
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from srfed.config import RunConfig
from srfed.config.choices import constants
from srfed.config.model import UNetConfig
from srfed.diffusion.schedule import build_schedule
from srfed.errors import UserError
from srfed.files import written_tree
from srfed.networks import blocks, network, unet
from srfed.records import TaskInfo
from srfed.reporting.model_card import model_card
from srfed.runs.run import TrainedRun, TrainedSite
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder

PREDICTIONS = {"noise": "epsilon", "velocity": "v_prediction"}
"""``diffusion.prediction``, and what diffusers calls it."""
DIFFUSERS = "0.35.0"
"""The oldest version that a folder of ours is known to open with."""
TABLE, VECTOR, FILM = "task_table.weight", "task_vector.value", ".film.value"
ADAPTER = '''
class SrfedUNet2DModel(ModelMixin, ConfigMixin):
    """The network as diffusers' pipelines call it."""

    @register_to_config
    def __init__(
        self,
        sample_size,
        in_channels,
        out_channels,
        channels,
        blocks_per_stage,
        attention_stages,
        attention_head_channels,
        groups,
        dropout=0.0,
    ):
        super().__init__()
        self.network = UNet(
            in_channels,
            channels,
            blocks_per_stage,
            attention_stages,
            attention_head_channels,
            groups,
            dropout,
        )

    def forward(self, sample, timestep, return_dict=True):
        # diffusers counts timesteps from 0, the network from 1.
        time = torch.as_tensor(timestep, device=sample.device).expand(len(sample)) + 1
        predicted = self.network(sample, time)
        return UNet2DOutput(sample=predicted) if return_dict else (predicted,)
'''
IMPORTS = (
    "from diffusers.configuration_utils import ConfigMixin, register_to_config",
    "from diffusers.models.modeling_utils import ModelMixin",
    "from diffusers.models.unets.unet_2d import UNet2DOutput",
)


def export_pipeline(
    trained: TrainedRun | TrainedSite, task: TaskInfo, out: Path, run: RunFolder | None = None
) -> None:
    """Write one task's averaged (φ, θ_i) as a folder for ``DiffusionPipeline.from_pretrained``.

    Args:
        trained: the run, or the site.
        task: one of its tasks.
        out: the folder; new or empty.
        run: the run's folder, whose scores the card has; None has none.

    Raises:
        UserError: diffusers has nothing for what the network is or predicts, θ_i is not here, the
            run's files are damaged, or the folder holds something or cannot be written.
    """
    config = trained.config
    settings = check_exportable(config)
    row = trained.tasks.index(task) if settings.task_embedding == "shared" else None
    tensors = folded({**trained.shared, **trained.exclusive_of(task)}, row)
    shape = trained.shape_of(task)
    height, width, channels = shape
    whole = {
        name: value
        for name, value in constants(unet.UNet, settings).items()
        if name not in ("owned", "task_embedding", "zero_head")
    }
    plain = unet.UNet(image_channels=channels, **whole)
    # Whatever a later UNet has more must not be left behind in silence.
    plain.load_state_dict(tensors)
    log = None if run is None else MetricsLog(run.metrics)
    evaluations = log.evaluations() if log else []
    card = model_card(
        config,
        task,
        shape,
        trained.round,
        lineage=None if run is None else run.lineage,
        owners=None if run is None else len(trained.tasks),
        evaluation=evaluations[-1] if evaluations else None,
    )
    of_model = {
        "_class_name": "SrfedUNet2DModel",
        "sample_size": [height, width],
        "in_channels": channels,
        "out_channels": channels,
        **whole,
    }
    scheduler = scheduler_config(config)
    kind = scheduler["_class_name"].removesuffix("Scheduler")
    index = {
        "_class_name": f"{kind}Pipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["srfed_unet", "SrfedUNet2DModel"],
    }
    weights = {f"network.{name}": value for name, value in plain.state_dict().items()}
    with written_tree(out, private=False) as folder:
        for name in ("scheduler", "unet"):
            (folder / name).mkdir()
        for name, content in {
            "model_index.json": index,
            "scheduler/scheduler_config.json": scheduler,
            "unet/config.json": of_model,
        }.items():
            (folder / name).write_bytes(_of_diffusers(content))
        (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(
            safetensors.torch.save(weights, metadata={"format": "pt"})
        )
        (folder / "unet/srfed_unet.py").write_text(network_code(), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")


def check_exportable(config: RunConfig) -> UNetConfig:
    """The network's settings; raises UserError where diffusers has nothing for the network or for
    what it predicts.
    """
    if not isinstance(config.model, UNetConfig):
        raise UserError(
            f"model.network = {config.model.network} cannot be exported: its code is your own; "
            "allowed: unet"
        )
    if config.diffusion.prediction not in PREDICTIONS:
        raise UserError(
            f"diffusion.prediction = {config.diffusion.prediction} cannot be exported: diffusers' "
            f"DDIM and DDPM have no such prediction; allowed: {', '.join(PREDICTIONS)}"
        )
    return config.model


def folded(tensors: Mapping[str, Tensor], row: int | None) -> dict[str, Tensor]:
    """A task's tensors without its vector, its FiLM and a table of tasks, whose constants are in
    the biases that they are added to; CPU, float32.

    Args:
        tensors: φ and θ_i.
        row: the task's, of a table of tasks; None where there is no table.
    """
    found = {name: tensor.detach().cpu().double() for name, tensor in tensors.items()}
    constants_of: dict[str, list[Tensor]] = {}
    if TABLE in found:
        constants_of["timestep.mix.bias"] = [found.pop(TABLE)[row]]
    if VECTOR in found:
        constants_of.setdefault("timestep.mix.bias", []).append(found.pop(VECTOR))
    for name in [name for name in found if name.endswith(FILM)]:
        constants_of[f"{name.removesuffix(FILM)}.condition.bias"] = [found.pop(name)]
    for bias, values in constants_of.items():
        found[bias] = found[bias] + torch.stack(values).sum(dim=0)
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def scheduler_config(config: RunConfig) -> dict[str, Any]:
    """diffusers' scheduler for a run's way of sampling: DDPM for ancestral sampling, else DDIM."""
    diffusion, sampling = config.diffusion, config.sampling
    schedule = build_schedule(**constants(build_schedule, diffusion))
    common = {
        "num_train_timesteps": schedule.timesteps,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": PREDICTIONS[diffusion.prediction],
        "clip_sample": sampling.clip,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
    }
    if sampling.sampler == "ancestral":
        variance = {"beta": "fixed_large", "posterior": "fixed_small"}[sampling.variance]
        return {"_class_name": "DDPMScheduler", **common, "variance_type": variance}
    return {"_class_name": "DDIMScheduler", **common, "set_alpha_to_one": True}


def network_code() -> str:
    """The network's modules as one, which imports torch and diffusers alone."""
    imports, bodies = set(IMPORTS), []
    for module in (blocks, network, unet):
        source = inspect.getsource(module)
        nodes = [node for node in ast.parse(source).body if isinstance(node, _IMPORTS)]
        imports |= {
            ast.unparse(node)
            for node in nodes
            if "srfed" not in (getattr(node, "module", "") or "")
        }
        last = max(node.end_lineno or 0 for node in nodes)
        bodies.append("\n".join(source.splitlines()[last:]).strip("\n"))
    head = '"""The UNet of srfed (Apache-2.0), and what diffusers asks of it besides."""'
    return "\n\n\n".join([f"{head}\n\n" + "\n".join(sorted(imports)), *bodies, ADAPTER.strip()]) + (
        "\n"
    )


_IMPORTS = (ast.Import, ast.ImportFrom)


def _of_diffusers(content: Mapping[str, Any]) -> bytes:
    """As diffusers writes its own, which have no version of our formats."""
    return (json.dumps({**content, "_diffusers_version": DIFFUSERS}, indent=2) + "\n").encode()
