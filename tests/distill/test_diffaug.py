"""diff_augment against DiffAugment's steps written out for one image at a time."""

import pytest
import torch

from senseflow.distill.diffaug import NUM_UNIFORMS, diff_augment

SIZES = [(32, 32), (17, 40), (30, 25), (4, 3)]


def uniforms(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, NUM_UNIFORMS, generator=torch.Generator().manual_seed(seed))


def images(batch: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


def augment_one(image: torch.Tensor, u: list[float]) -> torch.Tensor:
    """The three augmentations of one image (3, H, W), pixel by pixel."""
    image = image + (u[0] - 0.5)
    image = (image - image.mean(0)) * (2 * u[1]) + image.mean(0)
    image = (image - image.mean()) * (u[2] + 0.5) + image.mean()

    _, height, width = image.shape
    moves, cuts = [], []
    for length, move, cut in ((height, u[3], u[5]), (width, u[4], u[6])):
        limit = int(length * 0.125 + 0.5)
        moves.append(range(-limit, limit + 1)[int(move * (2 * limit + 1))])
        size = int(length * 0.2 + 0.5)
        centre = int(cut * (length + (1 - size % 2)))
        cuts.append(range(centre - size // 2, centre - size // 2 + size))
    out = torch.zeros_like(image)
    for row in range(height):
        for col in range(width):
            source = (row + moves[0], col + moves[1])
            cut = row in cuts[0] and col in cuts[1]
            if 0 <= source[0] < height and 0 <= source[1] < width and not cut:
                out[:, row, col] = image[:, source[0], source[1]]
    return out


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equals_the_loop(height: int, width: int) -> None:
    x, u = images(12, height, width), uniforms(12)
    want = torch.stack([augment_one(image, row) for image, row in zip(x, u.tolist(), strict=True)])
    torch.testing.assert_close(diff_augment(x, u), want, rtol=0, atol=2e-6)


def test_extreme_uniforms_stay_in_range() -> None:
    u = torch.stack([torch.zeros(NUM_UNIFORMS), torch.full((NUM_UNIFORMS,), 1 - 2**-24)])
    x = images(2, 33, 21)
    want = torch.stack([augment_one(image, row) for image, row in zip(x, u.tolist(), strict=True)])
    torch.testing.assert_close(diff_augment(x, u), want, rtol=0, atol=2e-6)


def test_middle_uniforms_keep_the_colours() -> None:
    x, u = images(2, 40, 40), torch.full((2, NUM_UNIFORMS), 0.5)
    changed = (diff_augment(x, u) - x).abs() > 1e-6
    # no shift either, and the 8 x 8 cutout lies in the middle
    assert changed[..., 16:24, 16:24].float().mean() > 0.99
    assert changed.sum() <= 2 * 3 * 8 * 8


def test_a_row_of_uniforms_belongs_to_its_image() -> None:
    x, u = images(4, 16, 16), uniforms(4)
    alone = torch.cat([diff_augment(x[i : i + 1], u[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(diff_augment(x, u), alone, rtol=0, atol=1e-6)


def test_every_shift_and_place_is_drawn() -> None:
    x = torch.zeros(1, 3, 40, 40).index_fill_(2, torch.tensor(20), 1.0)
    rows, cut_rows = set(), set()
    for u in torch.arange(0, 1, 1 / 256):
        moved = diff_augment(x, torch.tensor([[0.5, 0.5, 0.5, u, 0.5, 0.0, 0.0]]))
        rows.add(int(moved[0, 0, :, -1].argmax()))
        cut = diff_augment(x + 2, torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, u, 0.5]]))
        cut_rows.add(tuple((cut[0, 0, :, 20] == 0).nonzero().flatten().tolist()))
    assert rows == set(range(15, 26))  # 5 = 12.5 % of 40 each way
    # 8 = 20 % of 40; centred on 0 .. 40, so the border clips it to 4 at least
    assert cut_rows == {tuple(range(max(c - 4, 0), min(c + 4, 40))) for c in range(41)}


def test_gradient_is_the_derivative() -> None:
    x, u = images(2, 9, 7).double().requires_grad_(), uniforms(2).double()
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, u), x)
    (grad,) = torch.autograd.grad(diff_augment(x, u).sum(), x)
    assert grad.abs().amax((1, 2, 3)).gt(0).all()


def test_dtype_is_kept_and_wrong_shapes_are_refused() -> None:
    assert diff_augment(images(2, 8, 8).bfloat16(), uniforms(2)).dtype == torch.bfloat16
    with pytest.raises(AssertionError):
        diff_augment(images(2, 8, 8), uniforms(3))
