"""Statistics of a population, for evaluation: one pass over data with frozen weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from seqbatch.rnn.norm import SequenceBatchNorm

__all__ = ["estimate_population"]


def estimate_population(
    model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], object] | None = None
) -> int:
    """Replace running statistics by the population's: one pass over data with frozen weights.

    Every :class:`SequenceBatchNorm` in the model, those of ``BNLSTM`` included, normalizes with batch statistics
    meanwhile and gets their mean over the batches, weighted by rows; all else is in evaluation mode (no dropout). So
    the output of one batch in training and its output in evaluation after a pass over it alone are equal. Source:
    Cooijmans et al., arXiv 1603.09025, section 3.

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
    """Evaluation mode, with statistics from the batches; what was is put back."""
    modes = {module: module.training for module in model.modules()}
    before = [{name: b.clone() for name, b in norm.named_buffers()} for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm._population = torch.zeros_like(norm.num_batches_tracked)
        yield
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
        raise
    finally:
        for norm in norms:
            norm._population = None
        for module, mode in modes.items():
            module.training = mode
