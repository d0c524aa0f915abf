"""Scores against other people's answers: torch-fidelity, scikit-image, scipy, closed forms."""

import hashlib
import io
import itertools
import pickle
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity
from sklearn.datasets import load_digits
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from srfed.data.images import Images
from srfed.errors import UserError
from srfed.evaluation.features import embedded
from srfed.evaluation.features import inception_file as weights
from srfed.evaluation.features.load import FeatureNetwork, load_feature_network
from srfed.evaluation.features.statistics import FeatureStatistics, merge_statistics
from srfed.evaluation.features.statistics_file import load_statistics, save_statistics
from srfed.evaluation.metrics.frechet import frechet_distance
from srfed.evaluation.metrics.ssim import ssim, ssim_window
from srfed.evaluation.references import References
from support.images import random_images

Array = npt.NDArray[Any]


def correlated(rng: np.random.Generator, count: int, dimension: int, offset: float = 0.0) -> Array:
    return rng.normal(size=(count, dimension)) @ rng.normal(size=(dimension, dimension)) + offset


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array]:
    """UCI digits as the default experiment sees them: uint8 N x 8 x 8 x 1, and labels."""
    loaded = load_digits()
    return np.rint(loaded.images * (255 / 16)).astype(np.uint8)[..., None], loaded.target


# --- Fréchet distance ---------------------------------------------------------------------------


def reference_distance(first: Array, second: Array) -> float:
    statistics = [
        {"mu": part.mean(axis=0), "sigma": np.cov(part, rowvar=False)} for part in (first, second)
    ]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


@pytest.mark.parametrize("offset", [0.0, 0.3, 100.0])
def test_frechet_distance_is_torch_fidelitys(offset: float) -> None:
    rng = np.random.default_rng(0)
    first, second = correlated(rng, 400, 64), correlated(rng, 300, 64, offset)
    ours = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert ours == pytest.approx(reference_distance(first, second), rel=1e-6)


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form() -> None:
    rng = np.random.default_rng(1)
    mean_1, mean_2 = rng.normal(size=(2, 8))
    deviation_1, deviation_2 = rng.uniform(0, 3, size=(2, 8))
    deviation_1[0] = deviation_2[1] = 0
    first = FeatureStatistics(101, mean_1, np.diag(deviation_1**2) * 100)
    second = FeatureStatistics(11, mean_2, np.diag(deviation_2**2) * 10)
    expected = ((mean_1 - mean_2) ** 2).sum() + ((deviation_1 - deviation_2) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_finite_and_not_negative_where_covariances_lack_rank() -> None:
    rng = np.random.default_rng(2)
    few = FeatureStatistics.of(correlated(rng, 5, 64))
    others = FeatureStatistics.of(correlated(rng, 3, 64))
    constant = FeatureStatistics.of(np.ones((4, 64)))
    assert 0 <= frechet_distance(few, few) < 1e-5 * np.trace(few.covariance)
    assert frechet_distance(constant, constant) == 0
    expected = ((few.mean - 1) ** 2).sum() + np.trace(few.covariance)
    assert frechet_distance(few, constant) == pytest.approx(expected)
    assert 0 < frechet_distance(few, others) < np.inf


def test_merged_statistics_are_those_of_the_whole_in_any_order() -> None:
    rng = np.random.default_rng(3)
    # A mean far from zero is where sums of squares would lose their digits.
    features = rng.normal(size=(1000, 16)) * 0.01 + 1000
    whole = FeatureStatistics.of(features)
    parts = [FeatureStatistics.of(part) for part in np.split(features, [1, 40, 45, 700])]
    for order in itertools.permutations(parts):
        merged = merge_statistics(order)
        assert merged.count == 1000
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-10)
        np.testing.assert_allclose(
            merged.covariance, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-14
        )
    np.testing.assert_allclose(
        whole.covariance, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-14
    )


def test_float32_features_are_counted_in_float64() -> None:
    features = np.random.default_rng(4).normal(size=(500, 4)).astype(np.float32) + 300
    statistics = FeatureStatistics.of(features)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10
    )


def test_frechet_distance_refuses_single_images_and_different_dimensions() -> None:
    one, two = FeatureStatistics.of(np.ones((1, 3))), FeatureStatistics.of(np.eye(3))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_distance(one, two)
    with pytest.raises(UserError, match="dimension 3 and 4"):
        frechet_distance(two, FeatureStatistics.of(np.eye(4)))
    with pytest.raises(UserError, match="dimension 3 and 4"):
        two.merge(FeatureStatistics.of(np.eye(4)))


@pytest.mark.parametrize(
    ("count", "mean", "scatter", "message"),
    [
        (0, np.zeros(2), np.zeros((2, 2)), "count"),
        (2, np.zeros(2), np.zeros((3, 3)), "scatter"),
        (2, np.zeros(2, np.float32), np.zeros((2, 2)), "float64"),
        (2, np.array([0, np.nan]), np.zeros((2, 2)), "finite"),
    ],
)
def test_impossible_statistics_are_refused(
    count: int, mean: Array, scatter: Array, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureStatistics(count, mean, scatter)


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FeatureStatistics.of(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="no statistics"):
        merge_statistics([])


# --- SSIM ---------------------------------------------------------------------------------------


def pairs(height: int, width: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    first = torch.rand(6, channels, height, width, generator=generator, dtype=torch.float64)
    noise = torch.rand(first.shape, generator=generator, dtype=torch.float64)
    amount = torch.linspace(0, 1, 6, dtype=torch.float64).view(-1, 1, 1, 1)
    return first, (1 - amount) * first + amount * noise


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (11, 20, 1)])
def test_ssim_is_scikit_images(shape: tuple[int, int, int]) -> None:
    first, second = pairs(*shape)
    expected = [
        structural_similarity(
            x.numpy(),
            y.numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=0,
        )
        for x, y in zip(first, second, strict=True)
    ]
    ours = ssim(first, second)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)
    assert ours[0] == pytest.approx(1)
    np.testing.assert_allclose(ssim(first.float(), second.float()).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "radius"), [(8, 8, 3), (10, 7, 3), (3, 3, 1)])
def test_ssim_of_small_images_uses_the_largest_odd_window(
    height: int, width: int, radius: int
) -> None:
    assert ssim_window(height, width) == 2 * radius + 1
    first, second = pairs(height, width, 1)
    x, y = first[3, 0].numpy(), second[3, 0].numpy()

    def mean(values: Array) -> Array:
        inside = slice(radius, -radius)
        return gaussian_filter(values, sigma=1.5, radius=radius)[inside, inside]

    covariance = mean(x * y) - mean(x) * mean(y)
    variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    expected = (2 * mean(x) * mean(y) + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mean(x) ** 2 + mean(y) ** 2 + 1e-4) * (variances + 9e-4)
    assert ssim(first, second)[3].item() == pytest.approx(expected.mean(), abs=1e-12)


def test_ssim_window_is_eleven_where_it_fits() -> None:
    assert [ssim_window(side, side) for side in (12, 11, 10, 9, 8, 256)] == [11, 11, 9, 9, 7, 11]
    assert ssim_window(8, 100) == 7


def test_ssim_refuses_what_it_cannot_score() -> None:
    images = torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match="two batches"):
        ssim(images, images[:1])
    for wrong in (images * 2 - 1, images * 255, images * torch.nan, (images > 0.5).long()):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            ssim(images, wrong)
    with pytest.raises(UserError, match="at least 3 pixels"):
        ssim(images[..., :2], images[..., :2])


# --- embedded network ---------------------------------------------------------------------------


def test_embedded_network_is_the_released_file(network: FeatureNetwork) -> None:
    content = embedded.EMBEDDED_FILE.read_bytes()
    assert len(content) <= 1_000_000
    assert network.sha256 == hashlib.sha256(content).hexdigest() == embedded.EMBEDDED_SHA256
    assert (network.name, network.score_name, network.dimension) == ("embedded", "fd_embedded", 64)


def test_embedded_weights_other_than_the_released_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    altered = bytearray(embedded.EMBEDDED_FILE.read_bytes())
    altered[-1] ^= 1
    for content, message in ((bytes(altered), "SHA-256"), (bytes(altered[:5000]), "does not hold")):
        (tmp_path / "e.safetensors").write_bytes(content)
        monkeypatch.setattr(embedded, "EMBEDDED_FILE", tmp_path / "e.safetensors")
        with pytest.raises(UserError, match=message):
            load_feature_network("embedded")
    monkeypatch.setattr(embedded, "EMBEDDED_FILE", tmp_path / "absent")
    with pytest.raises(UserError, match="cannot read"):
        load_feature_network("embedded")


def test_embedded_features_do_not_depend_on_the_batch(
    network: FeatureNetwork, digits: tuple[Array, Array]
) -> None:
    images = digits[0][:600]
    features = network(images)
    assert features.shape == (600, 64)
    assert features.dtype == np.float64
    np.testing.assert_allclose(features[550:560], network(images[550:560]), atol=1e-5)
    np.testing.assert_array_equal(features, network(images))
    assert network(images[:0]).shape == (0, 64)


def test_embedded_network_sees_each_channel_on_its_own(network: FeatureNetwork) -> None:
    colour = np.random.default_rng(6).integers(0, 256, size=(5, 32, 32, 3), dtype=np.uint8)
    features = network(colour)
    assert features.shape == (5, 192)
    for channel in range(3):
        grey = network(colour[..., [channel]])
        np.testing.assert_allclose(features[:, 64 * channel : 64 * channel + 64], grey, atol=1e-5)


def test_embedded_features_tell_the_uci_digits_apart(
    network: FeatureNetwork, digits: tuple[Array, Array]
) -> None:
    """Held-out 8 x 8 digits, which the network was not trained on, by the nearest class mean."""
    images, labels = digits
    features = network(images)
    means = np.stack([features[:1000][labels[:1000] == label].mean(axis=0) for label in range(10)])
    guesses = ((features[1000:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (guesses == labels[1000:]).mean() > 0.85


def test_embedded_distance_grows_with_noise_and_with_lost_classes(
    network: FeatureNetwork, digits: tuple[Array, Array]
) -> None:
    images, labels = digits
    order = np.random.default_rng(7).permutation(len(images))
    images, labels = images[order], labels[order]
    half = len(images) // 2
    reference = FeatureStatistics.of(network(images[:half]))

    def distance(others: Array) -> float:
        return frechet_distance(reference, FeatureStatistics.of(network(others)))

    others, rng = images[half:], np.random.default_rng(8)
    noisy = [
        distance(
            np.clip(others + rng.normal(0, sigma, others.shape), 0, 255).round().astype(np.uint8)
        )
        for sigma in (60, 100, 150)
    ]
    scores = [distance(others), *noisy]
    assert scores == sorted(scores)
    assert scores[-1] > 30 * scores[0]
    assert distance(others[labels[half:] != 3]) > 2 * scores[0]
    assert distance(others[labels[half:] < 5]) > 10 * scores[0]


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 1), np.float32)]
)
def test_features_need_uint8_images(network: FeatureNetwork, images: Array) -> None:
    with pytest.raises(ValueError, match="uint8"):
        network(images)


def test_there_is_no_other_feature_network() -> None:
    with pytest.raises(ValueError, match="vgg"):
        load_feature_network("vgg")  # type: ignore[arg-type]


# --- Inception ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_state() -> dict[str, torch.Tensor]:
    """Random weights in the official layout."""
    patch = pytest.MonkeyPatch()
    patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
    patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.manual_seed(9)
    state: dict[str, torch.Tensor] = fidelity.FeatureExtractorInceptionV3(
        "x", ["2048"]
    ).state_dict()
    patch.undo()
    # Default initialisation would let the signal fade away within 20 layers.
    return {
        name: value * 4 if name.endswith("bn.weight") else value for name, value in state.items()
    }


@pytest.fixture(scope="module")
def inception_file(
    tmp_path_factory: pytest.TempPathFactory, inception_state: dict[str, Any]
) -> Iterator[Path]:
    """As the official file is: PyTorch's old format, no batch counters."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    old = {
        name: value
        for name, value in inception_state.items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(old, path, _use_new_zipfile_serialization=False)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> FeatureNetwork:
    return load_feature_network("inception", str(inception_file))


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_features_are_torch_fidelitys(
    inception: FeatureNetwork, inception_file: Path, channels: int
) -> None:
    images = np.random.default_rng(10).integers(0, 256, size=(3, 28, 28, channels), dtype=np.uint8)
    extractor = fidelity.FeatureExtractorInceptionV3(
        "x", ["2048"], feature_extractor_weights_path=inception_file
    )
    colour = np.repeat(images, 3 // channels, axis=3)
    (expected,) = extractor(torch.from_numpy(colour).permute(0, 3, 1, 2))
    features = inception(images)
    assert features.shape == (3, 2048)
    assert np.ptp(features, axis=0).mean() > 1e-3 * features.mean() > 0
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_inception_with_other_weights_does_not_score_an_fid(
    inception: FeatureNetwork, inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert inception.sha256 == digest
    assert (inception.name, inception.score_name) == ("inception", f"fd_inception_{digest[:8]}")
    monkeypatch.setattr("srfed.evaluation.features.inception.INCEPTION_SHA256", digest)
    assert load_feature_network("inception", str(inception_file)).score_name == "fid"


def test_inception_refuses_images_it_cannot_see(inception: FeatureNetwork) -> None:
    with pytest.raises(UserError, match="1 or 3 channels, got 4"):
        inception(np.zeros((2, 8, 8, 4), np.uint8))


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a weights file ran code",))


def test_inception_weights_that_are_none_are_refused(inception_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    whole = inception_file.read_bytes()
    layout = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(2, 2)}, layout)
    tensor = io.BytesIO()
    torch.save(torch.zeros(2), tensor)
    for content, message in (
        (whole[: len(whole) // 2], "damaged"),
        (whole[:100], "damaged"),
        (b"", "damaged"),
        (b"<html>404</html>", "damaged"),
        (pickle.dumps(Malicious(), protocol=2), "damaged"),
        (layout.getvalue(), "layout"),
        (tensor.getvalue(), "layout"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load_feature_network("inception", str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        load_feature_network("inception", str(tmp_path / "absent"))


class Response(io.BytesIO):
    headers: dict[str, str] = {}  # noqa: RUF012


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SRFED_CACHE", str(tmp_path))
    return tmp_path / "weights-inception-2015-12-05-6726825d.pth"


def test_inception_weights_are_downloaded_once_and_verified(
    monkeypatch: pytest.MonkeyPatch, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = b"weights" * 1_000_000
    requests: list[str] = []

    def urlopen(url: str, timeout: float) -> Response:
        requests.append(url)
        return Response(content)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(UserError, match=r"was not kept; .*evaluation\.inception_weights"):
        weights.read_inception_weights()
    assert list(cache.parent.iterdir()) == []
    monkeypatch.setattr(weights, "INCEPTION_SHA256", hashlib.sha256(content).hexdigest())
    for _ in range(2):
        assert weights.read_inception_weights() == (content, weights.INCEPTION_SHA256)
    assert requests == [weights.INCEPTION_URL] * 2
    assert list(cache.parent.iterdir()) == [cache]
    assert capfd.readouterr().err == ""
    cache.write_bytes(content[:-1])
    with pytest.raises(UserError, match="not the official file"):
        weights.read_inception_weights()


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("Name or service not known"),
        TimeoutError("timed out"),
        ConnectionResetError(),
    ],
)
def test_without_a_network_the_error_says_where_the_file_belongs(
    monkeypatch: pytest.MonkeyPatch, cache: Path, failure: OSError
) -> None:
    def urlopen(url: str, timeout: float) -> Response:
        raise failure

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(
        UserError, match=r"cannot download .*evaluation\.inception_weights"
    ) as caught:
        load_feature_network("inception")
    assert str(cache) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(cache.parent.iterdir()) == []


# --- statistics files ---------------------------------------------------------------------------


def test_statistics_files_return_what_was_written(network: FeatureNetwork, tmp_path: Path) -> None:
    statistics = FeatureStatistics.of(correlated(np.random.default_rng(11), 100, 64))
    path = tmp_path / "reference.safetensors"
    save_statistics(path, statistics, network)
    loaded = load_statistics(path, network)
    assert loaded.count == 100
    np.testing.assert_array_equal(loaded.mean, statistics.mean)
    np.testing.assert_array_equal(loaded.scatter, statistics.scatter)


def test_statistics_of_another_network_are_refused(
    network: FeatureNetwork,
    inception: FeatureNetwork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "reference.safetensors"
    save_statistics(path, FeatureStatistics.of(np.eye(64)), network)
    with pytest.raises(
        UserError, match="another network: its network is 'embedded', this run's is 'inception'"
    ):
        load_statistics(path, inception)
    for attribute in ("sha256", "resize_rule", "score_name"):
        with monkeypatch.context() as patch:
            patch.setattr(network, attribute, "other")
            with pytest.raises(UserError, match=f"another network: its {attribute} is"):
                load_statistics(path, network)


def test_damaged_statistics_files_are_refused(network: FeatureNetwork, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    save_statistics(path, FeatureStatistics.of(np.eye(64)), network)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:4], b"", embedded.EMBEDDED_FILE.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no file of feature statistics"):
            load_statistics(path, network)
    with pytest.raises(UserError, match="cannot read"):
        load_statistics(tmp_path / "absent", network)


def test_features_of_real_images_are_made_of_judged_owners_only_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, seen = embedded.EmbeddedFeatures(), list[int]()
    features = embedded.EmbeddedFeatures.__call__

    def counted(self: embedded.EmbeddedFeatures, images: Images) -> Any:
        seen.append(len(images))
        return features(self, images)

    monkeypatch.setattr(embedded.EmbeddedFeatures, "__call__", counted)
    references = References(network, {f"{n}": random_images(n, 8, 8, 1) for n in (3, 4, 5)})
    samples = {"4": random_images(2, 8, 8, 1, seed=1)}
    assert references.score(samples) == references.score(samples)
    assert seen == [2, 4, 2]
