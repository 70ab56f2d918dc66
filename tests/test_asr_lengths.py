"""The forms of experiments/asr_lengths: each utterance gets what it would have alone, but for the unmasked baseline."""

import numpy as np
import pytest
import torch

from experiments.asr_lengths.forms import ROWS, Batches, Encoder, Row, Utterances, deviations, loss_of

LENGTHS = np.array([9, 2, 14, 1, 7, 7, 3, 11, 5, 13, 4, 6])


def small(row: Row) -> tuple[Encoder, Batches, Utterances]:
    """An encoder of 5 units and an epoch of batches of 4 utterances' frames, in float64."""
    torch.manual_seed(0)
    data = Utterances(LENGTHS, 6, 3, torch.float64)
    return Encoder(row.cell, 6, 5, 3, dtype=torch.float64), Batches(row, data, 4), data


def off(row: Row) -> list[torch.Tensor]:
    """How far each utterance of an epoch is off."""
    encoder, batches, data = small(row)
    return [
        each
        for number, placement in enumerate(batches.placements)
        for each in deviations(encoder, batches[number], row.form, placement.sequence.tolist(), data)
    ]


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row.name)
def test_outputs_are_those_of_each_utterance_alone(row: Row) -> None:
    """In both directions, in every form that knows the lengths."""
    found = off(row)
    assert sum(len(each) for each in found) == LENGTHS.sum()
    assert max(float(each.max()) for each in found) < 1e-12


def test_without_a_mask_the_reverse_direction_starts_in_the_padding() -> None:
    """Where the baseline is wrong: in utterances shorter than the longest of their batch, and only there."""
    encoder, batches, data = small(ROWS[0])
    encoder.rnn = torch.nn.LSTM(6, 5, bidirectional=True, dtype=torch.float64)  # one layer: directions are apart
    for number, placement in enumerate(batches.placements):
        found = deviations(encoder, batches[number], "no mask", placement.sequence.tolist(), data)
        for each in found:
            forward, reverse = each.chunk(2, -1)
            assert forward.max() < 1e-12
            assert (reverse[-1].max() > 1e-3) == (len(each) < placement.steps)


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row.name)
def test_gradients_are_those_of_each_utterance_alone(row: Row) -> None:
    """The loss is the mean over the real frames of the batch, whatever its form."""
    encoder, batches, data = small(row)
    frames = batches.placements[0].tokens
    loss_of(encoder, batches[0], row.form).backward()
    found = [parameter.grad.clone() for parameter in encoder.parameters()]
    encoder.zero_grad()
    for index in batches.placements[0].sequence.tolist():
        scores = encoder.head(encoder.rnn(data[index]["features"][:, None])[0])
        loss = torch.nn.functional.cross_entropy(scores[:, 0], data[index]["labels"], reduction="sum")
        (loss / frames).backward()
    for parameter, gradient in zip(encoder.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)
