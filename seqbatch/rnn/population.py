"""Statistics of a population, for evaluation: one pass over data with frozen weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from seqbatch.rnn.norm import Population, SequenceBatchNorm

__all__ = ["estimate_population"]


def estimate_population(
    model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], object] | None = None
) -> int:
    """Replace running statistics by the population's: one pass over data with frozen weights.

    Every :class:`SequenceBatchNorm` in the model, those of ``BNLSTM`` included, normalizes with batch statistics
    meanwhile and gets their mean over the batches, weighted by rows; all else is in evaluation mode (no dropout). So
    the output of one batch in training and its output in evaluation after a pass over it alone are equal, if it has no
    more than max_steps steps and there is neither dropout nor noise. Source: Cooijmans et al., arXiv 1603.09025,
    section 3. Every process estimates from its own batches, but for layers that synchronize: these need as many
    batches in each.

    Args:
        model: The model; its mode is restored afterwards. If the pass fails the old statistics stay.
        batches: For instance a loader.
        run: Called with the model and each batch; by default ``model(batch)``.

    Returns:
        The number of batches.

    Raises:
        ValueError: No such layer, or no batch.

    >>> norm = SequenceBatchNorm(3)
    >>> x = torch.randn(4, 2, 3)
    >>> estimate_population(norm, [x])
    1
    >>> torch.allclose(norm.train()(x), norm.eval()(x), atol=1e-6)
    True
    """
    norms = [m for m in model.modules() if isinstance(m, SequenceBatchNorm)]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no SequenceBatchNorm and no BNLSTM: there is nothing to estimate")
    count = 0
    with _collecting(model, norms), torch.no_grad():
        for batch in batches:
            model(batch) if run is None else run(model, batch)
            count += 1
        if not count:
            raise ValueError("batches held no batch: a loader can be read again, an iterator only once")
    return count


@contextmanager
def _collecting(model: nn.Module, norms: list[SequenceBatchNorm]) -> Iterator[None]:
    """Evaluation mode, with statistics from the batches; modes are put back, running statistics change at the end."""
    if any(norm._population is not None for norm in norms):
        raise RuntimeError("the population's statistics are being estimated already, further up")
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for norm in norms:
            mean, count = norm.running_mean, norm.num_batches_tracked
            zeros = (torch.zeros_like(mean), torch.ones_like(mean), torch.zeros_like(count), torch.zeros_like(count))
            norm._population = Population(*zeros)
        yield
        for norm in norms:
            found = norm._population
            if found is not None:
                norm.running_mean.copy_(found.mean)
                norm.running_var.copy_(found.var)
                norm.num_batches_tracked.copy_(found.batches)
    finally:
        for norm in norms:
            norm._population = None
        for module, mode in modes.items():
            module.training = mode
