"""experiments/sequential_mnist: pixels come as they should, a short run learns, and gradients over time are right."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments.sequential_mnist.data import MNIST, ORDERS, load, order_of
from experiments.sequential_mnist.gamma import FORMS, RECURRENT, gradient_norms
from experiments.sequential_mnist.run import FULL, MODELS, Classifier, Settings, changed, evaluate, forever, train

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Settings(
    side=7,
    train_images=400,
    valid_images=100,
    test_images=100,
    hidden=16,
    batch=50,
    updates=40,
    every=20,
    lr=1e-2,
    estimate=100,
)


def parts(order="in order", side=7, sizes=(400, 100, 100)):
    return load(MNIST, side, order, sizes)


def test_permutation_is_one():
    """Each pixel comes once, the same order each time; drawing with replacement, as the released code, would not do."""
    order = order_of(784, "permuted")
    assert sorted(order) == list(range(784)) and (order != np.arange(784)).any()
    assert (order == order_of(784, "permuted")).all()
    with pytest.raises(ValueError, match="'in order', 'permuted', got 'random'"):
        order_of(784, "random")


@pytest.mark.parametrize("side", [28, 14])
def test_pixels_are_means_of_squares_in_scanline_order(side):
    """Step t of an image is pixel t; permuted, the pixel that the order names; parts follow each other in the file."""
    with np.load(MNIST) as file:
        images, classes = file["x_train"], file["y_train"]
    _, valid, _ = parts(side=side, sizes=(30, 20, 10))
    width = 28 // side
    image, row, column = images[33], 14 // width, 12 // width
    pixel = image[row * width : (row + 1) * width, column * width : (column + 1) * width].mean() / 255
    assert float(valid.x[row * side + column, 3]) == pytest.approx(pixel, abs=1e-6)
    assert valid.y.tolist() == classes[30:50].tolist()
    permuted = parts("permuted", side, (30, 20, 10))[1]
    assert torch.equal(permuted.x, valid.x[torch.from_numpy(order_of(side**2, "permuted"))])


def test_too_few_images_are_refused():
    """The small file does not do for the full task."""
    with pytest.raises(ValueError, match="60000 are needed"):
        load(MNIST, 28, "in order", (FULL.train_images, FULL.valid_images, FULL.test_images))


def test_an_epoch_has_each_image_once_and_models_share_batches():
    """Both models with a seed see the same batches; another seed has others."""
    part = parts()[0]
    part = type(part)(torch.arange(400.0)[None], torch.arange(400))
    epochs = [
        torch.cat([y for _, (x, y) in zip(range(8), forever(part, 50, seed), strict=False)]) for seed in (1, 1, 2)
    ]
    assert sorted(epochs[0].tolist()) == list(range(400))
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])


def test_full_settings_are_the_papers():
    """Section 5.1 of arXiv 1603.09025 and the released scripts; what they disagree on can be set."""
    steps_of_epochs = 200 * FULL.train_images // FULL.batch
    assert (FULL.side**2, FULL.hidden, FULL.batch, FULL.updates) == (784, 100, 100, steps_of_epochs)
    assert (FULL.train_images, FULL.valid_images, FULL.test_images) == (50_000, 10_000, 10_000)
    assert (FULL.lr, FULL.decay, FULL.clip, FULL.gamma, FULL.noise, FULL.running) == (1e-3, 0.9, 1.0, 0.1, 0.1, 0.01)
    assert changed(True, decay=0.5, momentum=None).decay == 0.5
    for order, noise in zip(ORDERS, (0.1, 0.0), strict=True):
        model = Classifier("BN-LSTM", FULL, order).rnn.layers[0][0]
        assert model.norm_h.running_mean.shape == (784, 400) and model.options.noise == noise
        assert torch.equal(model.weight_hh[200:300], torch.eye(100)) and model.bias[100:200].eq(1).all()
        assert model.norm_h.weight.eq(0.1).all() and model.norm_c.weight.eq(0.1).all()


@pytest.mark.parametrize(("name", "order"), list(zip(MODELS, ORDERS, strict=True)))
def test_a_short_run_learns(name, order):
    """The loss falls below that of guessing, and all kinds of statistics are judged."""
    rows, curve = train(name, order, 0, TINY, parts(order))
    assert [row["update"] for row in curve] == [20, 40]
    assert curve[-1]["train_loss"] < math.log(10) - 0.02
    assert [row["statistics"] for row in rows] == (["none"] if name == "LSTM" else ["running", "batch", "population"])
    assert all(math.isfinite(row["test_loss"]) for row in rows)
    assert not set(rows[0]) & set(dataclasses.asdict(TINY))  # they share a line of results.csv


def test_evaluation_changes_nothing():
    """Neither running statistics nor the random numbers that training will draw."""
    part = parts()[0]
    model = Classifier("BN-LSTM", TINY, "in order")
    model(next(part.batches(50))[0])
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert evaluate(model, part, 50, "batch") != evaluate(model, part, 50)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("recurrent", RECURRENT)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_norms_are_those_of_the_equations(form, recurrent):
    """Against an RNN with batch normalization written out, in float64."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(6, 20, 1, generator=generator, dtype=torch.double)
    y = torch.randint(10, (20,), generator=generator)
    torch.manual_seed(3)
    found = gradient_norms(x, y, 0.3, form, recurrent, 0.1, 12)

    torch.manual_seed(3)
    weights = [torch.nn.init.orthogonal_(x.new_empty(size)) for size in ((12, 12), (12, 1), (10, 12))]
    weights[0] = torch.eye(12, dtype=x.dtype) if recurrent == "identity" else weights[0]
    first = 0.1 * torch.randn(20, 12, dtype=x.dtype)

    def loss(moved: torch.Tensor) -> torch.Tensor:
        h = first
        for t in range(6):
            terms = [h @ weights[0].T, x[t] @ weights[1].T]
            terms = [sum(terms)] if form == "sum" else terms
            terms = [0.3 * (a - a.mean(0)) / (a.var(0, correction=0) + 1e-5).sqrt() for a in terms]
            h = torch.tanh(sum(terms)) + moved[t]
        return cross_entropy(h @ weights[2].T, y)

    moved = torch.zeros(6, 20, 12, dtype=x.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(moved), moved)
    torch.testing.assert_close(found, gradient.norm(dim=2).mean(1))
