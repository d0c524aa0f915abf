"""The standard FID network: TensorFlow's Inception of 2015-12-05, as torch-fidelity ports it."""

import io
from typing import Any

import torch

from srfed.errors import UserError
from srfed.evaluation.features.inception_file import INCEPTION_SHA256, read_inception_weights
from srfed.evaluation.features.network import FeatureNetwork, one_line


class InceptionFeatures(FeatureNetwork):
    """The 2048 pooled features of the 2015-12-05 Inception; grey images are repeated to three
    channels.

    Its score is called "fid" with the official weights. With any other file in the same layout the
    score is called "fd_inception_" and the first eight digits of that file's SHA-256, because it is
    no FID.

    Raises:
        UserError: the weights cannot be had, or are not in the network's layout.
    """

    name = "inception"
    dimension = 2048
    per_channel = False
    resize_rule = "bilinear as in TensorFlow 1 (no antialiasing, corners not aligned) to 299x299"
    batch_size = 50

    def __init__(self, weights: str = "", device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        content, self.sha256 = read_inception_weights(weights)
        official = self.sha256 == INCEPTION_SHA256
        self.score_name = "fid" if official else f"fd_inception_{self.sha256[:8]}"
        self._extractor = _build(content, weights or "the Inception weights file").to(self.device)

    def _check_channels(self, channels: int) -> None:
        if channels not in (1, 3):
            raise UserError(
                f"the Inception takes images of 1 or 3 channels, got {channels}; set "
                "data.channels, or evaluation.feature_network: embedded"
            )

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        colour = images.expand(-1, 3, -1, -1)
        features: torch.Tensor = self._extractor(colour)[0]
        return features


def _build(content: bytes, source: str) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # A damaged file makes PyTorch raise almost anything, with texts that advise to unpickle it all
    # the same.
    except Exception as error:
        raise UserError(f"{source} is damaged or no PyTorch weights file") from error
    # torch-fidelity unpickles whatever it is given, so it gets only what the restricted unpickler
    # let pass.
    safe = io.BytesIO()
    torch.save(tensors, safe)
    safe.seek(0)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=safe
        )
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{source} is not in the layout of the 2015-12-05 Inception: {one_line(error)}"
        ) from error
