"""The UNet, its parts and its partition, against diffusers, torch and what the design says of
them.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from srfed.config import parse_config
from srfed.errors import UserError
from srfed.model import build_model, build_partition
from srfed.networks.blocks import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    TimestepEmbedding,
    Upsample,
    sinusoidal_embedding,
)
from srfed.networks.partition import Rule, divide
from srfed.networks.unet import UNet

torch.set_num_threads(1)

CHANNELS = (8, 16, 24, 32)


def unet(
    image_channels: int = 1,
    channels: Sequence[int] = CHANNELS,
    *,
    blocks: int = 1,
    attention_stages: Sequence[int] = (),
    groups: int = 4,
    dropout: float = 0.0,
    noisy: bool = False,
) -> UNet:
    """A small UNet; ``noisy`` also fills its zero-initialised layers, which would hide what they
    carry.
    """
    torch.manual_seed(0)
    model = UNet(image_channels, channels, blocks, attention_stages, 8, groups, dropout)
    if noisy:
        randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Parts


@pytest.mark.parametrize("dimension", [2, 8, 64])
def test_timestep_features_are_diffusers(dimension: int) -> None:
    timesteps = torch.tensor([1, 2, 77, 500])
    theirs = get_timestep_embedding(
        timesteps, dimension, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(
        sinusoidal_embedding(timesteps, dimension), theirs, rtol=1e-5, atol=1e-5
    )


def test_timestep_embedding_is_a_two_layer_perceptron_of_the_features() -> None:
    torch.manual_seed(0)
    embedding = TimestepEmbedding(8, 32)
    sequential = nn.Sequential(embedding.expand, nn.SiLU(), embedding.mix)
    timesteps = torch.tensor([3, 400])
    expected = sequential(
        get_timestep_embedding(timesteps, 8, flip_sin_to_cos=True, downscale_freq_shift=0)
    )
    torch.testing.assert_close(embedding(timesteps), expected)


@pytest.mark.parametrize(
    ("channels", "head_channels", "heads"), [(16, 4, 4), (16, 16, 1), (8, 32, 1)]
)
def test_self_attention_is_torchs_multihead_attention(
    channels: int, head_channels: int, heads: int
) -> None:
    torch.manual_seed(0)
    ours = SelfAttention(channels, head_channels, groups=4)
    randomise(ours)
    theirs = nn.MultiheadAttention(channels, heads, batch_first=True)
    with torch.no_grad():
        assert theirs.in_proj_weight is not None
        theirs.in_proj_weight.copy_(ours.query_key_value.weight.flatten(1))
        theirs.in_proj_bias.copy_(ours.query_key_value.bias)
        theirs.out_proj.weight.copy_(ours.project.weight.flatten(1))
        theirs.out_proj.bias.copy_(ours.project.bias)
    x = normal(3, channels, 5, 4)
    pixels = ours.norm(x).flatten(2).transpose(1, 2)
    attended, _ = theirs(pixels, pixels, pixels)
    torch.testing.assert_close(
        ours(x), x + attended.transpose(1, 2).reshape(x.shape), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("out_channels", [8, 12])
def test_a_fresh_residual_block_is_its_shortcut(out_channels: int) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, out_channels, 16, groups=4, dropout=0.0)
    x = normal(2, 8, 5, 5)
    expected = (
        x
        if out_channels == 8
        else nn.functional.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    )
    assert torch.equal(block(x, normal(2, 16)), expected)


def test_fresh_self_attention_is_the_identity() -> None:
    x = normal(2, 8, 3, 3)
    assert torch.equal(SelfAttention(8, 8, groups=4)(x), x)


def test_residual_block_scales_and_shifts_its_second_norm_by_the_timestep() -> None:
    """Dhariwal & Nichol (2021): AdaGN(h, y) = y_s GroupNorm(h) + y_b, with y_s = 1 + scale."""
    torch.manual_seed(0)
    block = ResidualBlock(8, 12, 16, groups=4, dropout=0.0)
    randomise(block)
    x, embedding = normal(2, 8, 5, 5), normal(2, 16, seed=1)
    for image in range(2):
        silu = nn.functional.silu
        hidden = block.conv_in(silu(block.norm_in(x[image : image + 1])))
        condition = block.condition(silu(embedding[image]))
        scaled = (
            block.norm_out(hidden)[0] * (1 + condition[:12, None, None])
            + condition[12:, None, None]
        )
        expected = block.shortcut(x[image : image + 1]) + block.conv_out(silu(scaled)[None])
        torch.testing.assert_close(
            block(x, embedding)[image : image + 1], expected, rtol=1e-4, atol=1e-5
        )


def test_film_adds_a_tasks_scale_and_shift_to_the_timesteps() -> None:
    """Perez et al. (2018): γ h + β; here γ = 1 + scale(t) + scale_i and β = shift(t) + shift_i."""
    torch.manual_seed(0)
    block = ResidualBlock(8, 12, 16, groups=4, dropout=0.0, film=True)
    randomise(block)
    assert block.film is not None
    value = block.film.value
    x, embedding = normal(2, 8, 5, 5), normal(2, 16, seed=1)
    functional = nn.functional
    hidden = functional.conv2d(
        functional.silu(functional.group_norm(x, 4, block.norm_in.weight, block.norm_in.bias)),
        block.conv_in.weight,
        block.conv_in.bias,
        padding=1,
    )
    timestep = functional.silu(embedding) @ block.condition.weight.T + block.condition.bias
    groups = hidden.reshape(2, 4, -1)
    spread = (groups.var(dim=2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normal_hidden = ((groups - groups.mean(dim=2, keepdim=True)) / spread).reshape(hidden.shape)
    affine = normal_hidden * block.norm_out.weight[:, None, None]
    affine = affine + block.norm_out.bias[:, None, None]
    gamma = 1 + timestep[:, :12] + value[:12]
    beta = timestep[:, 12:] + value[12:]
    modulated = gamma[:, :, None, None] * affine + beta[:, :, None, None]
    expected = block.shortcut(x) + block.conv_out(functional.silu(modulated))
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        value.zero_()
    assert not torch.allclose(block(x, embedding), expected, atol=1e-2)


def test_dropout_acts_while_training_only() -> None:
    model = unet(dropout=0.5, noisy=True)
    x, timesteps = normal(2, 1, 8, 8), torch.tensor([1, 2])
    assert not torch.equal(model.train()(x, timesteps), model(x, timesteps))
    assert torch.equal(model.eval()(x, timesteps), model(x, timesteps))
    plain = unet(noisy=True)
    assert torch.equal(plain(x, timesteps), model(x, timesteps))


def test_up_restores_what_down_rounded_up() -> None:
    for size in range(1, 34):
        halved = Downsample(4, 6)(normal(1, 4, size, size + 1))
        assert halved.shape == (1, 6, math.ceil(size / 2), math.ceil((size + 1) / 2))
        assert Upsample(6, 4)(halved, size, size + 1).shape == (1, 4, size, size + 1)


# The network


@pytest.mark.parametrize("image_channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(28, 28), (31, 31), (5, 5), (8, 8), (5, 31), (16, 9)])
def test_output_has_the_images_shape(image_channels: int, size: tuple[int, int]) -> None:
    x = normal(2, image_channels, *size)
    predicted = unet(image_channels)(x, torch.tensor([1, 500]))
    assert predicted.shape == x.shape
    assert predicted.dtype == x.dtype
    assert predicted.isfinite().all()


@pytest.mark.parametrize("size", [(28, 28), (31, 31), (5, 5), (8, 8), (32, 13)])
def test_stage_k_works_at_the_kth_half_size_with_its_channels(size: tuple[int, int]) -> None:
    """28 px give 28, 14, 7, 4 by rounding up, in the down stages as in the up stages."""
    model = unet(blocks=2, attention_stages=(1, 3))
    seen: dict[str, set[tuple[int, ...]]] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(name, set()).add(
            tuple(output.shape[1:])
        )

    for side in ("down", "up"):
        for stage in range(4):
            part = model.get_submodule(f"{side}.{stage}")
            for inner in (*part.blocks.children(), *part.attentions.children()):
                inner.register_forward_hook(note(f"{side}.{stage}"))
    model.bottleneck.register_forward_hook(note("bottleneck"))
    model(normal(1, 1, *size), torch.tensor([3]))
    expected = [
        {(CHANNELS[k], math.ceil(size[0] / 2**k), math.ceil(size[1] / 2**k))} for k in (0, 1, 2, 3)
    ]
    assert [seen[f"down.{k}"] for k in range(4)] == expected
    assert [seen[f"up.{k}"] for k in range(4)] == expected
    assert seen["bottleneck"] == expected[3]
    if size == (28, 28):
        assert [next(iter(shape))[1] for shape in expected] == [28, 14, 7, 4]


@pytest.mark.parametrize("stages", [(), (0,), (2, 3)])
def test_attention_stands_after_every_block_of_its_stages_and_in_the_bottleneck(
    stages: tuple[int],
) -> None:
    model = unet(blocks=2, attention_stages=stages)
    found = [name for name, module in model.named_modules() if isinstance(module, SelfAttention)]
    expected = [
        f"{side}.{k}.attentions.{b}" for side in ("down", "up") for k in stages for b in (0, 1)
    ]
    assert sorted(found) == sorted(["bottleneck.attention", *expected])


def test_depth_is_blocks_per_stage() -> None:
    for blocks in (1, 3):
        found = [m for m in unet(blocks=blocks).modules() if isinstance(m, ResidualBlock)]
        assert len(found) == 2 * 4 * blocks + 2


def test_every_parameter_and_the_timestep_reach_the_prediction() -> None:
    model = unet(noisy=True, attention_stages=(2,))
    x = normal(2, 1, 8, 8)
    model(x, torch.tensor([3, 70])).square().mean().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []
    assert not torch.equal(model(x, torch.tensor([3, 70])), model(x, torch.tensor([4, 70])))


def test_an_images_prediction_does_not_depend_on_the_rest_of_the_batch() -> None:
    """So no batch statistics, which would be neither shared nor private."""
    model = unet(noisy=True, attention_stages=(3,)).train()
    x, timesteps = normal(3, 1, 8, 8), torch.tensor([1, 50, 99])
    together = model(x, timesteps)
    for image in range(3):
        alone = model(x[image : image + 1], timesteps[image : image + 1])
        torch.testing.assert_close(alone, together[image : image + 1], rtol=1e-4, atol=1e-4)


def test_all_state_is_parameters() -> None:
    """A buffer would be in the partition and yet in no optimizer: silently local, or silently
    stale.
    """
    model = unet(attention_stages=(0, 1, 2, 3))
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("shape", "timesteps", "words"),
    [
        ((2, 3, 8, 8), (2,), r"N x 1 x H x W images of at least 5 px, not \(2, 3, 8, 8\)"),
        ((2, 1, 4, 8), (2,), r"at least 5 px, not \(2, 1, 4, 8\)"),
        ((2, 1, 8, 4), (2,), r"at least 5 px, not \(2, 1, 8, 4\)"),
        ((1, 8, 8), (1,), r"not \(1, 8, 8\)"),
        ((2, 1, 8, 8), (3,), r"2 images need as many times, not \(3,\)"),
        ((2, 1, 8, 8), (), r"not \(\)"),
        ((2, 1, 8, 8), (2, 1), r"not \(2, 1\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shape: tuple[int, ...], timesteps: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        unet()(torch.zeros(shape), torch.ones(timesteps, dtype=torch.long))


# No way round the partition


def test_each_up_stage_gets_the_skips_of_its_own_down_stage_and_no_other() -> None:
    model = unet(blocks=2)
    made: dict[int, list[Tensor]] = {}
    taken: dict[int, list[Tensor]] = {}
    for stage in range(4):
        model.down[stage].register_forward_hook(
            lambda module, inputs, output, stage=stage: made.update({stage: output[1]})
        )
        model.up[stage].register_forward_pre_hook(
            lambda module, inputs, stage=stage: taken.update({stage: inputs[1]})
        )
    model(normal(1, 1, 8, 8), torch.tensor([3]))
    for stage in range(4):
        assert len(made[stage]) == len(taken[stage]) == 2
        assert all(a is b for a, b in zip(made[stage], taken[stage], strict=True))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_activations_enter_the_shared_stages_only_through_the_last_exclusive_downsample(
    k: int,
) -> None:
    """With that convolution's output held, the shared stages compute the same bits for any
    image.
    """
    model = unet(blocks=2, attention_stages=(1, 3), noisy=True)
    shared_output: list[Tensor] = []
    model.up[k].register_forward_hook(lambda module, inputs, output: shared_output.append(output))
    timesteps = torch.tensor([3, 70])
    model(normal(2, 1, 8, 8, seed=1), timesteps)
    model(normal(2, 1, 8, 8, seed=2), timesteps)
    assert not torch.equal(shared_output[0], shared_output[1])

    held = normal(2, CHANNELS[k], 8 // 2**k, 8 // 2**k)
    model.down[k - 1].downsample.register_forward_hook(lambda module, inputs, output: held)
    model(normal(2, 1, 8, 8, seed=1), timesteps)
    model(normal(2, 1, 8, 8, seed=2), timesteps)
    assert torch.equal(shared_output[2], shared_output[3])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_activations_leave_the_shared_stages_only_through_the_last_exclusive_upsample(
    k: int,
) -> None:
    """With that convolution's output cut, no shared tensor but the timestep's has any gradient."""
    model = unet(blocks=2, attention_stages=(1, 3), noisy=True)
    shared = [name for name in divide(model, k).shared if not name.startswith("timestep.")]
    assert shared

    def reached() -> list[str]:
        model.zero_grad()
        model(normal(2, 1, 8, 8), torch.tensor([3, 70])).square().mean().backward()
        parameters = dict(model.named_parameters())
        return [n for n in shared if (g := parameters[n].grad) is not None and g.any()]

    assert reached() == shared
    model.up[k - 1].upsample.register_forward_hook(lambda module, inputs, output: output.detach())
    assert reached() == []


# Initialisation


def config(**model: Any) -> Any:
    settings: dict[str, Any] = {"channels": [8, 8, 8, 8], "groups": 4, "attention_head_channels": 8}
    seed = model.pop("seed", 0)
    return parse_config({"seed": seed, "model": {**settings, **model}})


def test_initialisation_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_model(config(), 1).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build_model(config(), 1).state_dict()
    assert torch.equal(before, torch.get_rng_state()), (
        "drawing weights moved the process's generator"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(config(seed=1), 1).state_dict()
    drawn = [name for name in first if name.endswith("conv_in.weight")]
    assert len(drawn) == 10
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_build_model_applies_every_setting() -> None:
    built = build_model(
        config(
            channels=[8, 12, 16, 16],
            blocks_per_stage=2,
            attention_stages=[1],
            attention_head_channels=4,
            groups=2,
            dropout=0.25,
        ),
        3,
    )
    expected = UNet(3, (8, 12, 16, 16), 2, (1,), 4, 2, 0.25)
    assert repr(built) == repr(expected)
    assert {n: p.shape for n, p in built.state_dict().items()} == {
        n: p.shape for n, p in expected.state_dict().items()
    }
    heads = {n: m.heads for n, m in built.named_modules() if isinstance(m, SelfAttention)}
    assert heads["down.1.attentions.0"] == 3
    assert heads["bottleneck.attention"] == 4


# The partition

STAGES = (0, 1, 2, 3)
DOWN_UP = {
    k: {f"{side}.{stage}" for stage in range(k) for side in ("down", "up")} for k in range(5)
}
ALL_MODULES = {"stem", "timestep", "bottleneck", "head", *DOWN_UP[4]}


def modules_of(names: Sequence[str]) -> set[str]:
    """``stem``, ``down.0``, ...: the modules at the borders of which the dial can stand."""
    return {
        ".".join(name.split(".")[: 2 if name.startswith(("down.", "up.")) else 1]) for name in names
    }


@pytest.mark.parametrize(
    ("rule", "exclusive"),
    [
        ("none", set()),
        ("io", {"stem", "head"}),
        (1, {"stem", "head", "down.0", "up.0"}),
        (2, {"stem", "head", "down.0", "up.0", "down.1", "up.1"}),
        (3, {"stem", "head", "down.0", "up.0", "down.1", "up.1", "down.2", "up.2"}),
        (4, ALL_MODULES - {"timestep", "bottleneck"}),
        ("all", ALL_MODULES),
    ],
)
def test_the_dial(rule: Rule, exclusive: set[str]) -> None:
    partition = divide(unet(blocks=2, attention_stages=STAGES), rule)
    assert modules_of(partition.exclusive) == exclusive
    assert modules_of(partition.shared) == ALL_MODULES - exclusive


MODEL = unet(blocks=2, attention_stages=(1, 3))
NAMES = list(MODEL.state_dict())
PREFIXES = sorted(
    {name.rsplit(".", depth)[0] for name in NAMES for depth in range(name.count(".") + 1)}
)


@given(
    rule=st.one_of(
        st.sampled_from(["none", "io", "all"]),
        st.integers(1, 4),
        st.lists(
            st.sampled_from([*PREFIXES, "*.norm*", "up.?.blocks.*", "*bias", "*"]), min_size=1
        ),
    ),
    multiples=st.tuples(*[st.integers(1, 4)] * 4),
    blocks=st.integers(1, 2),
    image_channels=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_every_tensor_is_in_exactly_one_part_in_the_order_of_the_state_dict(
    rule: Rule, multiples: tuple[int, ...], blocks: int, image_channels: int
) -> None:
    with torch.device("meta"):  # names and shapes only
        model = UNet(image_channels, [2 * m for m in multiples], blocks, (1, 3), 2, 2)
    names = list(model.state_dict())
    if isinstance(rule, list):
        rule = [
            pattern
            for pattern in rule
            if "*" in pattern or any(n.startswith(pattern) for n in names)
        ]
        if not rule:
            return
    partition = divide(model, rule)
    assert sorted([*partition.shared, *partition.exclusive]) == sorted(names)
    assert list(partition.shared) == [name for name in names if name in partition.shared]
    assert list(partition.exclusive) == [name for name in names if name in partition.exclusive]
    tensors = model.state_dict()
    assert tuple(partition.take_shared(tensors)) == partition.shared
    assert tuple(partition.take_exclusive(tensors)) == partition.exclusive
    assert all(partition.take_shared(tensors)[n] is tensors[n] for n in partition.shared)


@given(prefixes=st.lists(st.sampled_from(PREFIXES), min_size=1, max_size=5))
def test_a_pattern_that_names_a_module_takes_all_below_it_and_nothing_else(
    prefixes: list[str],
) -> None:
    partition = divide(MODEL, prefixes)
    expected = [n for n in NAMES if any(n == p or n.startswith(p + ".") for p in prefixes)]
    assert list(partition.exclusive) == expected


@pytest.mark.parametrize(
    ("patterns", "last_parts"),
    [
        (["*.norm_in.weight"], {"norm_in.weight"}),
        (["*.norm_in"], {"norm_in.weight", "norm_in.bias"}),
        (["*.norm_*"], {"norm_in.weight", "norm_in.bias", "norm_out.weight", "norm_out.bias"}),
    ],
)
def test_patterns_are_globs_over_tensor_names(patterns: list[str], last_parts: set[str]) -> None:
    exclusive = divide(unet(), patterns).exclusive
    assert {".".join(name.split(".")[-2:]) for name in exclusive} == last_parts
    assert len(exclusive) == 10 * len(last_parts)


def test_a_list_of_the_dials_modules_is_the_dial() -> None:
    model = unet()
    assert divide(model, ["stem", "head", "down.0", "up.0"]) == divide(model, 1)
    assert divide(model, ["*"]) == divide(model, "all")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ([], "empty list; write `none`"),
        ([""], "pattern '' matches no tensor"),
        (["stem", "up.7"], "pattern 'up.7' matches no tensor"),
        (["ste"], "pattern 'ste' matches no tensor"),
        (["STEM"], "pattern 'STEM' matches no tensor"),
        (0, "exclusive_stages 0 is impossible; the network has stages 1 to 4"),
        (5, "exclusive_stages 5 is impossible"),
        (-1, "exclusive_stages -1 is impossible"),
        ("stem", "'stem' is no rule; allowed: none, io, all"),
        ("", "'' is no rule"),
    ],
)
def test_an_impossible_rule_is_refused(rule: Rule, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        divide(unet(), rule)


@pytest.mark.parametrize(
    ("owned", "count"), [(["vector"], 64), (["film"], 960), (["film", "vector"], 1024)]
)
def test_owned_parts_are_a_thousand_values(owned: list[str], count: int) -> None:
    """4 x 16 of the vector; two for each channel of each of ten residual blocks."""
    settings = parse_config(
        {"model": {"channels": [16, 32, 64, 64], "owned": owned, "exclusive_stages": "none"}}
    )
    model = build_model(settings, 1)
    partition = build_partition(settings, model)
    assert partition.exclusive == partition.owned
    assert sum(model.get_parameter(name).numel() for name in partition.exclusive) == count
    with_stages = divide(model, 1)
    assert with_stages.owned == partition.owned
    assert set(with_stages.exclusive) == {*partition.owned, *divide(model, [*STAGE_1]).exclusive}


STAGE_1 = ("stem", "head", "down.0", "up.0")


def test_build_partition_applies_the_setting_and_speaks_to_the_user() -> None:
    model = unet(channels=(8, 8, 8, 8))
    assert build_partition(config(exclusive_stages=3), model) == divide(model, 3)
    assert build_partition(config(exclusive_stages=["up.0.*"]), model) == divide(model, ["up.0"])
    with pytest.raises(
        UserError, match=r"^model\.exclusive_stages pattern 'up\.9' matches no tensor"
    ):
        build_partition(config(exclusive_stages=["up.9"]), model)


def test_fingerprint_tells_apart_names_shapes_and_types_of_the_shared_core_only() -> None:
    model = unet()
    partition = divide(model, 1)
    tensors = model.state_dict()
    same = partition.fingerprint(
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    )
    assert partition.fingerprint(tensors) == same, "values are no part of it"
    others = [
        divide(model, 2).fingerprint(tensors),  # fewer names
        partition.fingerprint(unet(channels=(8, 16, 24, 36)).state_dict()),  # other shapes
        partition.fingerprint({name: tensor.double() for name, tensor in tensors.items()}),
    ]
    assert len({same, *others}) == 4
    wider_images = unet(image_channels=3)  # only θ_i differs: such parties can exchange φ
    assert divide(wider_images, 1).fingerprint(wider_images.state_dict()) == same


def test_a_zero_head_predicts_no_noise_at_first_and_changes_nothing_else() -> None:
    plain, zero = (
        build_model(parse_config({"model": {"zero_head": flag}}), 1) for flag in (False, True)
    )
    x, timesteps = normal(2, 1, 8, 8), torch.tensor([1, 400])
    assert float(plain(x, timesteps).detach().abs().max()) > 0
    assert torch.equal(zero(x, timesteps), torch.zeros_like(x))
    (zero(x, timesteps) - x).square().mean().backward()
    assert zero.head.conv.weight.grad is not None
    assert float(zero.head.conv.weight.grad.abs().max()) > 0, "it can learn"
    theirs = plain.state_dict()
    differing = {
        name for name, tensor in zero.state_dict().items() if not torch.equal(tensor, theirs[name])
    }
    assert differing == {"head.conv.weight", "head.conv.bias"}
