"""Compare batched augmentation with MONAI's transforms for the same random parameters."""

import math

import numpy as np
import pytest
import torch
from monai.transforms import (
    AdjustContrast,
    Affine,
    Flip,
    GaussianSmooth,
    Rand3DElastic,
    RandAdjustContrast,
    RandAffine,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandShiftIntensity,
    ShiftIntensity,
)
from scipy.stats import ks_2samp

from data import augment, resample
from data.augment import Augmentation
from data.dataset import PatchBatch
from data.views import clip_and_shift_hu, convert_hu_to_input, make_random_stream_seeds, scale_to_unit_range
from misc.command import UserError
from misc.run.augmentation import LETTERS

from ..conftest import step_views

SIZE, CPU = (32, 32, 32), torch.device("cpu")
RANGE = 1264.0


def volumes(count, channels=1, dtype=torch.float64, size=SIZE, seed=0):
    """Return smooth random volumes in [0, 1264]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, channels, *[n // 4 for n in size], generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(noise, size=size, mode="trilinear", align_corners=True)
    return (smooth * RANGE).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(seed=0):
    """Return a function that draws noise from a separate random stream."""
    stream = generator(seed)
    return lambda some: torch.randn(some.shape, generator=stream, dtype=some.dtype)


def apply(name, inputs, drawn, noise=None, dense=False):
    """Apply a transform by name with the drawn parameters."""
    prepared = getattr(augment, f"prepare_{name}", lambda parameters, size: parameters)(drawn, inputs.shape[2:])
    prepared = {key: value.to(inputs) for key, value in prepared.items()}
    return getattr(augment, f"apply_{name}")(inputs, prepared, noise or normal(), dense)


def tolerance(dtype):
    """MONAI always returns float32, so float32 rounding also limits the comparison in float64."""
    return 1e-6 * RANGE if dtype == torch.float64 else 1e-4 * RANGE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [SIZE, (16, 24, 32)])
def test_affine_is_monais(dtype, size):
    inputs = volumes(5, 2, dtype, size)
    drawn = augment.draw_affine(5, size, generator(1))
    ours = apply("affine", inputs, drawn)
    for index in range(5):
        monai = Affine(
            rotate_params=drawn["rotation"][index].tolist(),
            translate_params=drawn["translation"][index].tolist(),
            scale_params=drawn["scale"][index].tolist(),
            padding_mode="border",
            image_only=True,
            dtype=np.float64,
        )
        wanted = torch.as_tensor(monai(inputs[index].double())).to(dtype)
        assert float((ours[index] - wanted).abs().max()) < tolerance(dtype)


def test_affine_conventions_in_closed_form():
    """Check on a linear ramp that output voxel x is the input at R (s x + t): rotation R, scale s, translation t.

    Coordinates are measured from the centre of the volume."""
    z, y, x = np.meshgrid(*[np.arange(32) - 15.5] * 3, indexing="ij")
    ramp = torch.from_numpy(2.0 * z - 3.0 * y + 5.0 * x)[None, None]
    a, b, c = 0.10, -0.07, 0.05
    s, t = (0.9, 0.8, 0.7), (1.0, -2.0, 0.5)
    drawn = {
        "rotation": torch.tensor([[a, b, c]], dtype=torch.float64),
        "scale": torch.tensor([s], dtype=torch.float64),
        "translation": torch.tensor([t], dtype=torch.float64),
    }
    first = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    second = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    third = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    rotation = first @ second @ third
    inside = slice(8, 24)
    points = np.stack([z, y, x], -1)[inside, inside, inside]
    source = (points * s + t) @ rotation.T
    wanted = source @ [2.0, -3.0, 5.0]
    ours = apply("affine", ramp, drawn)[0, 0, inside, inside, inside].numpy()
    np.testing.assert_allclose(ours, wanted, atol=1e-9)


def test_scale_above_one_zooms_out():
    cube = torch.zeros(1, 1, *SIZE, dtype=torch.float64)
    cube[:, :, 8:24, 8:24, 8:24] = 1
    drawn = {"rotation": torch.zeros(1, 3), "translation": torch.zeros(1, 3), "scale": torch.full((1, 3), 1.1)}
    assert apply("affine", cube, drawn).sum() < cube.sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_elastic_equals_monais(dtype):
    inputs = volumes(3, 2, dtype)
    drawn = augment.draw_elastic(3, SIZE, generator(3))
    drawn["sigma"][0], drawn["sigma"][1] = 8.1667, 9.5  # cut-offs (3 sigma) of 24.5001 and 28.5 voxels, both rounded up
    # Use smaller displacements than in training, so that most sampled positions lie inside the volume.
    drawn["magnitude"] = drawn["magnitude"] / 8
    ours = apply("elastic", inputs, drawn)
    monai = Rand3DElastic((8, 12), (0, RANGE), prob=1.0, padding_mode="border", spatial_size=SIZE)
    for index in range(3):
        monai._do_transform = True
        monai.rand_offset = drawn["offset"][index].numpy()
        monai.magnitude = float(drawn["magnitude"][index])
        monai.sigma = float(drawn["sigma"][index])
        grid = monai.rand_affine_grid
        grid.rotate_params = drawn["rotation"][index].tolist()
        grid.shear_params = []
        grid.translate_params = drawn["translation"][index].tolist()
        grid.scale_params = drawn["scale"][index].tolist()
        grid.randomize = lambda: None  # MONAI calls randomize again
        monai.randomize = lambda grid_size: None
        wanted = torch.as_tensor(monai(inputs[index].float()))
        # MONAI always makes the sampling grid in float32, so float32 rounding sets the tolerance.
        assert float((ours[index].float() - wanted).abs().max()) < 1e-4 * RANGE


@pytest.mark.parametrize("sigma", [0.1, 1.0, 8.0, 8.1666, 8.1667, 9.99, 12.0])
def test_elastic_kernel_and_cutoff_equal_monais(sigma):
    from monai.networks.layers.convutils import gaussian_1d

    size = 80
    band = augment.make_gaussian_bands(torch.tensor([sigma]), size)[0]
    kernel = gaussian_1d(torch.tensor(sigma), truncated=3.0)
    tail = len(kernel) // 2
    middle = band[size // 2]
    assert int((middle > 0).sum()) == int((kernel > 0).sum())
    np.testing.assert_allclose(middle[size // 2 - tail : size // 2 + tail + 1].numpy(), kernel.numpy(), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_is_scaled_and_added_to_chosen_samples_only(dtype):
    inputs = volumes(4, 2, dtype)
    unit = torch.randn(2, 2, *SIZE, generator=generator(5), dtype=torch.float64).to(dtype)
    drawn = {"chosen": torch.tensor([0, 1, 0, 1]) > 0, "std": torch.tensor([9.0, 20.0, 30.0, 50.0])}
    ours = apply("noise", inputs, drawn, lambda some: unit)
    assert torch.equal(ours[0], inputs[0]) and torch.equal(ours[2], inputs[2])
    for row, (index, std) in enumerate(((1, 20.0), (3, 50.0))):
        monai = RandGaussianNoise(prob=1.0, std=50, dtype=np.float64)
        monai._do_transform = True
        monai.noise = (unit[row] * std).numpy()
        wanted = torch.as_tensor(monai(inputs[index].double(), randomize=False)).to(dtype)
        assert float((ours[index] - wanted).abs().max()) < tolerance(dtype)


def test_noise_is_normal_with_the_drawn_deviation():
    drawn = {"chosen": torch.tensor([True]), "std": torch.tensor([37.0])}
    noise = apply("noise", torch.zeros(1, 1, *SIZE), drawn, normal(2))
    assert float(noise.std()) == pytest.approx(37.0, rel=0.02) and abs(float(noise.mean())) < 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_contrast_equals_monais_over_all_channels(dtype):
    inputs = volumes(3, 2, dtype)
    inputs[:, 1] *= 0.3  # give the channels different ranges
    drawn = {"chosen": torch.tensor([True, False, True]), "gamma": torch.tensor([0.5, 2.0, 4.5])}
    ours = apply("contrast", inputs, drawn)
    assert torch.equal(ours[1], inputs[1])
    for index, gamma in ((0, 0.5), (2, 4.5)):
        wanted = torch.as_tensor(AdjustContrast(gamma)(inputs[index].double())).to(dtype)
        assert float((ours[index] - wanted).abs().max()) < tolerance(dtype)


def test_contrast_of_a_constant_patch_stays_finite():
    drawn = {"chosen": torch.tensor([True]), "gamma": torch.tensor([0.5])}
    constant = torch.full((1, 1, *SIZE), 100.0)
    assert torch.equal(apply("contrast", constant, drawn), constant)


def test_flip_equals_monais():
    inputs = volumes(2, 2)
    drawn = {"flip": torch.tensor([[True, False, True], [False, True, False]])}
    before = inputs.clone()
    ours = apply("flip", inputs, drawn)
    assert torch.equal(inputs, before)
    for index, axes in ((0, [0, 2]), (1, [1])):
        assert torch.equal(ours[index], torch.as_tensor(Flip(axes)(inputs[index])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [SIZE, (16, 24, 32)])
def test_smoothing_equals_monais_and_keeps_the_rim(dtype, size):
    """MONAI pads with zeros. Dividing by MONAI's result for a volume of ones removes the effect of the padding."""
    inputs = volumes(4, 2, dtype, size)
    before = inputs.clone()
    drawn = augment.draw_smooth(4, size, generator(5))
    drawn["sigma"][1] = torch.tensor([2.0, 0.3, 1.1])
    ours = apply("smooth", inputs, drawn)
    assert torch.equal(inputs, before)
    for index in range(4):
        monai = GaussianSmooth(drawn["sigma"][index].tolist())
        wanted = monai(inputs[index].double()) / monai(torch.ones_like(inputs[index], dtype=torch.float64))
        assert float((ours[index] - torch.as_tensor(wanted).to(dtype)).abs().max()) < tolerance(dtype)
    flat = torch.full((4, 1, *size), 300.0, dtype=dtype)
    assert torch.allclose(apply("smooth", flat, drawn), flat)


def test_smoothing_with_sigma_zero_changes_nothing():
    inputs = volumes(2)
    drawn = augment.draw_smooth(2, SIZE, generator(5), augment.Ranges(smooth=0.0))
    torch.testing.assert_close(apply("smooth", inputs, drawn), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shift_equals_monais(dtype):
    inputs = volumes(4, 2, dtype)
    before = inputs.clone()
    drawn = augment.draw_intensity_shift(4, SIZE, generator(6))
    ours = apply("intensity_shift", inputs, drawn)
    assert torch.equal(inputs, before)
    for index in range(4):
        wanted = ShiftIntensity(float(drawn["offset"][index]))(inputs[index])
        assert float((ours[index] - torch.as_tensor(wanted).to(dtype)).abs().max()) < tolerance(dtype)


def test_breath_keeps_the_lungs_mass():
    """If the volume of a ball of lung grows by a factor, its density above air is divided by that factor."""
    z, y, x = np.meshgrid(*[np.arange(32) - 15.5] * 3, indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    hu = np.where(radius < 8, -800.0, -1000.0)
    inputs = torch.from_numpy(hu + 1024)[None, None].expand(3, -1, -1, -1, -1)
    grown = apply("breath", inputs, {"growth": torch.tensor([1.0, 1.2, 0.8])}) - 1024
    assert torch.allclose(grown[0], inputs[0] - 1024, atol=1e-4)
    mass = (grown + 1000).sum(dim=(1, 2, 3, 4))
    assert mass[1:] / mass[0] == pytest.approx(np.ones(2), abs=0.01)
    middle = grown[:, 0, 15:17, 15:17, 15:17].mean(dim=(1, 2, 3))
    assert middle.numpy() == pytest.approx([-800, -1000 + 200 / 1.2, -1000 + 200 / 0.8], abs=0.1)


def test_breath_keeps_tissue_and_partly_thins_intermediate_hu():
    flat = torch.tensor([40.0, 0.0, -250.0, -500.0])[:, None, None, None, None].expand(-1, 1, *SIZE).double() + 1024
    ours = apply("breath", flat, {"growth": torch.full((4,), 1.25)})[:, 0, 16, 16, 16] - 1024
    assert ours.numpy() == pytest.approx([40, 0, -250 + 0.5 * 750 * (1 / 1.25 - 1), -1000 + 500 / 1.25], abs=1e-6)


def test_kernel_adds_or_removes_in_plane_detail():
    inputs = (torch.rand(1, 2, *SIZE, generator=generator(3), dtype=torch.float64) * RANGE).expand(3, -1, -1, -1, -1)
    ours = apply("recon_kernel", inputs, {"amount": torch.tensor([0.0, 0.6, -0.6])})
    assert torch.equal(ours[0], inputs[0])
    soft = apply("smooth", inputs, {"sigma": torch.tensor([[0.0, 1.0, 1.0]] * 3)})
    torch.testing.assert_close(ours[1], inputs[1] + 0.6 * (inputs[1] - soft[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[1] + ours[2], 2 * inputs[1], rtol=0, atol=1e-4)
    assert ours[1].std() > inputs[1].std() > ours[2].std()


def test_thickness_smooths_only_along_z():
    inputs = torch.rand(2, 2, *SIZE, generator=generator(3), dtype=torch.float64) * RANGE
    ours = apply("thickness", inputs, {"sigma": torch.tensor([[0.0], [1.0]])})
    wanted = apply("smooth", inputs, {"sigma": torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])})
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


def test_drawn_parameters_have_monais_distributions():
    count = 4000
    affine = augment.draw_affine(count, SIZE, generator(1))
    monai = RandAffine(
        prob=1.0, rotate_range=[math.pi / 18] * 3, translate_range=[12] * 3, scale_range=[0.1] * 3, spatial_size=SIZE
    ).rand_affine_grid
    monai.set_random_state(0)
    drawn = {"rotation": [], "translation": [], "scale": []}
    for _ in range(count):
        monai.randomize()
        for name, values in zip(drawn, (monai.rotate_params, monai.translate_params, monai.scale_params)):
            drawn[name].append(values)
    for name, values in drawn.items():
        for axis in range(3):
            assert ks_2samp(affine[name][:, axis].numpy(), np.array(values)[:, axis]).pvalue > 1e-3, name

    noise, contrast, flip = (
        f(count, SIZE, generator(2)) for f in (augment.draw_noise, augment.draw_contrast, augment.draw_flip)
    )
    for drawn_here in (noise, contrast):
        assert int(drawn_here["chosen"].sum()) / count == pytest.approx(0.25, abs=0.03)
    assert float(flip["flip"].float().mean()) == pytest.approx(0.5, abs=0.03)
    assert ks_2samp(noise["std"].numpy(), np.random.default_rng(0).uniform(0, 50, count)).pvalue > 1e-3
    gammas = RandAdjustContrast(prob=1.0)
    gammas.set_random_state(0)
    values = []
    for _ in range(count):
        gammas.randomize()
        values.append(gammas.gamma_value)
    assert ks_2samp(contrast["gamma"].numpy(), values).pvalue > 1e-3

    sigma, axes = augment.draw_smooth(count, SIZE, generator(4))["sigma"].numpy(), ("x", "y", "z")
    smooth = RandGaussianSmooth(*[(0.0, 2.0)] * 3, prob=1.0)
    smooth.set_random_state(0)
    values = []
    for _ in range(count):
        smooth.randomize()
        values.append([getattr(smooth, axis) for axis in axes])
    assert all(ks_2samp(sigma[:, axis], np.array(values)[:, axis]).pvalue > 1e-3 for axis in range(3))

    shift = RandShiftIntensity(30.0, prob=1.0)
    shift.set_random_state(0)
    values = []
    for _ in range(count):
        shift.randomize()
        values.append(shift._offset)
    assert ks_2samp(augment.draw_intensity_shift(count, SIZE, generator(7))["offset"].numpy(), values).pvalue > 1e-3

    elastic = augment.draw_elastic(300, (4, 4, 4), generator(3))
    monai = Rand3DElastic((8, 12), (0, 1264), prob=1.0)
    monai.set_random_state(0)
    sigmas, magnitudes, offsets = [], [], []
    for _ in range(300):
        monai.randomize((4, 4, 4))
        sigmas.append(monai.sigma)
        magnitudes.append(monai.magnitude)
        offsets.append(monai.rand_offset)
    assert ks_2samp(elastic["sigma"].numpy(), sigmas).pvalue > 1e-3
    assert ks_2samp(elastic["magnitude"].numpy(), magnitudes).pvalue > 1e-3
    assert ks_2samp(elastic["offset"].numpy().ravel(), np.ravel(offsets)).pvalue > 1e-3


def test_letters_are_applied_in_order():
    inputs = volumes(2)
    for letters in ("fc", "cf", "ga", "ag"):
        drawn = Augmentation(letters).draw_parameters(2, SIZE, generator(4))
        for parameters in drawn:
            if "chosen" in parameters:
                parameters["chosen"] = torch.ones(2, dtype=torch.bool)
        chained = inputs
        for letter, parameters in zip(letters, drawn):
            chained = apply(
                {"f": "flip", "c": "contrast", "g": "noise", "a": "affine"}[letter], chained, parameters, normal(6)
            )
        prepared = Augmentation(letters).prepare_parameters(drawn, SIZE)
        assert torch.equal(Augmentation(letters).apply(inputs, prepared, normal(6)), chained)
    # The order of transforms matters, because resampling smooths the noise that was added before.
    everyone = {"chosen": torch.ones(2, dtype=torch.bool), "std": torch.full((2,), 50.0)}
    move = augment.prepare_affine(augment.draw_affine(2, SIZE, generator(4)), SIZE)
    flat = torch.zeros(2, 1, *SIZE)
    first = Augmentation("ga").apply(flat, [everyone, move], normal(6))
    last = Augmentation("ag").apply(flat, [move, everyone], normal(6))
    assert float(first.std()) < 0.8 * float(last.std())


def test_every_letter_has_a_name_and_a_transform():
    assert augment.TRANSFORMS.keys() == LETTERS.keys()


def test_an_unknown_letter_is_refused():
    with pytest.raises(UserError, match="'agx': unknown letter 'x'"):
        Augmentation("agx")


def test_random_streams_are_never_shared():
    seen = set()
    for seed in range(2):
        for epoch in range(3):
            for location in range(3):
                for step in range(3):
                    for rank in range(3):
                        seen |= set(make_random_stream_seeds(seed, epoch, location, step, rank))
    assert len(seen) == 2 * 3**4 * 2


def test_a_step_is_reproducible():
    patches = torch.randint(-1024, 241, (3, *SIZE), dtype=torch.int16, generator=generator(1))
    neighbors = torch.randint(-1024, 241, (3, 2, *SIZE), dtype=torch.int16, generator=generator(2))
    views = [
        step_views(PatchBatch(1, 2, 3, patches, neighbors), Augmentation("feagc"), 0, range(1), CPU) for _ in range(2)
    ]
    other = step_views(PatchBatch(1, 2, 4, patches, neighbors), Augmentation("feagc"), 0, range(1), CPU)
    for a, b, c in zip(*views, other):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_views_are_independent_and_neighbors_share_one_draw():
    one = torch.randint(-1024, 241, (1, *SIZE), dtype=torch.int16, generator=generator(1))
    patches = one.expand(2, -1, -1, -1)
    neighbors = one[:, None].expand(2, 3, -1, -1, -1)
    query, key, around = step_views(PatchBatch(0, 0, 0, patches, neighbors), Augmentation("a"), 0, range(1), CPU)
    assert query.shape == key.shape == (2, 1, *SIZE) and around.shape == (2, 3, *SIZE)
    drawn = [query[0], query[1], key[0], key[1], around[0, :1], around[1, :1]]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert not torch.allclose(first, second)
    for subject in around:
        assert torch.equal(subject[0], subject[1]) and torch.equal(subject[0], subject[2])


def test_intensities_without_augmentation():
    hu = torch.tensor([-2000, -1024, -392, 240, 3000], dtype=torch.int16)
    torch.testing.assert_close(scale_to_unit_range(clip_and_shift_hu(hu)), torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
    patches = hu[1:2, None, None, None].expand(2, *SIZE)
    batch = PatchBatch(0, 0, 0, patches, patches[:, None])
    query, key, around = step_views(batch, Augmentation(""), 0, range(1), CPU)
    assert all(torch.equal(view, torch.full_like(view, -1.0)) for view in (query, key, around))


@pytest.mark.parametrize("kind", (np.int16, np.float32, np.float64))
def test_network_input_without_augmentation(kind):
    """HU are clipped to [-1024, 240] and scaled to (HU + 1024) / 632 - 1, for any number of patches."""
    for count in (1, 16, 37):
        hu = np.random.default_rng(count).integers(-1500, 500, (count, 4, 4, 4)).astype(kind)
        wanted = torch.from_numpy((np.clip(hu.astype(np.float64), -1024, 240) + 1024) / 632 - 1)[:, None]
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
            x = convert_hu_to_input(torch.from_numpy(hu), dtype)
            assert x.dtype == dtype and x.shape == (count, 1, 4, 4, 4)
            torch.testing.assert_close(x.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(32, 32, 32), (5, 7, 6), (1, 4, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_slice_by_slice_sampling_is_trilinear(size, channels):
    """Sample white noise, the worst case, at coordinates on, between and outside the voxels."""
    stream = generator()
    noise = torch.rand(5, channels, *size, generator=stream, dtype=torch.float64) * RANGE
    voxels = torch.rand(5, 3, *size, generator=stream, dtype=torch.float64) * 2 - 0.5
    voxels *= torch.tensor(size, dtype=torch.float64)[None, :, None, None, None]
    voxels[0] = voxels[0].round()
    wanted = resample._sample_volumes(noise, voxels)
    torch.testing.assert_close(resample.sample_trilinearly(noise, voxels), wanted, rtol=0, atol=1e-9 * RANGE)
    single = resample.sample_trilinearly(noise.float(), voxels.float())
    torch.testing.assert_close(single.double(), wanted, rtol=0, atol=1e-4 * RANGE)
    # At integer positions, sampling returns the voxel values.
    whole = resample.sample_trilinearly(noise.float()[:1], voxels.float()[:1])
    index = [voxels[0, axis].clamp(0, length - 1).long() for axis, length in enumerate(size)]
    assert torch.equal(whole[0], noise.float()[0][:, index[0], index[1], index[2]])


def test_ranges_follow_the_flags():
    """Narrower ranges make the random parameters vary less. The default ranges are the published ranges."""
    narrower = dict(
        rotate=5, translate=3, scale=0.05, noise_std=10, noise_prob=0.75, gamma=(0.9, 1.1), smooth=0.5, shift=10
    ) | dict(breath=0.1, kernel=0.3, thickness=0.25)
    ranges = augment.Ranges(**narrower)
    wide, narrow = (
        dict(zip("agcsibkt", Augmentation("agcsibkt", chosen).draw_parameters(500, SIZE, generator(2))))
        for chosen in (augment.PUBLISHED, ranges)
    )
    torch.testing.assert_close(narrow["a"]["translation"], wide["a"]["translation"] / 4)
    torch.testing.assert_close(narrow["a"]["rotation"], wide["a"]["rotation"] / 2)
    torch.testing.assert_close(narrow["a"]["scale"] - 1, (wide["a"]["scale"] - 1) / 2)
    torch.testing.assert_close(narrow["g"]["std"], wide["g"]["std"] / 5)
    assert int(wide["g"]["chosen"].sum()) < 0.35 * 500 < 0.65 * 500 < int(narrow["g"]["chosen"].sum())
    torch.testing.assert_close(narrow["s"]["sigma"], wide["s"]["sigma"] / 4)
    torch.testing.assert_close(narrow["i"]["offset"], wide["i"]["offset"] / 3)
    torch.testing.assert_close(narrow["b"]["growth"] - 1, (wide["b"]["growth"] - 1) / 2)
    torch.testing.assert_close(narrow["k"]["amount"], wide["k"]["amount"] / 2)
    torch.testing.assert_close(narrow["t"]["sigma"], wide["t"]["sigma"] / 4)
    assert 0.9 <= float(narrow["c"]["gamma"].min()) < float(narrow["c"]["gamma"].max()) <= 1.1
    assert 11.5 < float(wide["a"]["translation"].max()) <= 12 and 4.4 < float(wide["c"]["gamma"].max()) <= 4.5
