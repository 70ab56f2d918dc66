"""Three classifiers of sentences whose answer for a sentence depends on that sentence alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from seqbatch.rnn import LSTM, SRU

__all__ = ["ENCODERS", "Classifier", "Convolution", "LastState"]


class LastState(nn.Module):
    """A recurrent stack: what its last layer holds after the sentence's last word.

    The mask holds the state over padding, so the state that the layers return is that of the last real step.
    """

    def __init__(self, rnn: SRU | LSTM) -> None:
        super().__init__()
        self.rnn, self.output_size = rnn, rnn.hidden_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(T, B, D) words and their (T, B) mask to (B, H)."""
        state = self.rnn(x, mask=mask)[1]
        return (state[0] if isinstance(state, tuple) else state)[-1]


class Convolution(nn.Module):
    """Windows of several widths and their largest value over the sentence (Kim 2014, arXiv 1408.5882).

    A sentence of L words has L + width - 1 windows: all that hold at least one of its words, with zeros beyond its
    ends. Windows that lie in the batch's padding are shut out of the maximum, since a bias alone may win it.
    """

    def __init__(self, input_size: int, widths: tuple[int, ...] = (3, 4, 5), maps: int = 100) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(input_size, maps, width, padding=width - 1) for width in widths)
        self.output_size = maps * len(widths)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(T, B, D) words and their (T, B) mask to (B, maps * widths)."""
        x = torch.where(mask[..., None], x, 0.0).permute(1, 2, 0)
        best = []
        for convolution in self.convolutions:
            found = convolution(x)  # window i begins at word i - (width - 1) ...
            before = mask.new_ones(found.shape[-1] - len(mask), mask.shape[1])
            inside = torch.cat([before, mask]).mT[:, None]  # ... which is before the sentence, or one of its words
            best.append(found.masked_fill(~inside, -torch.inf).amax(-1))
        return torch.cat(best, 1).relu()


def sru(size: int) -> LastState:
    """The paper's two layers; their forget gates begin nearly open.

    From sigmoid(0), SRU's own start, a handful of epochs is too short to learn to keep a word to the sentence's end.
    """
    rnn = SRU(size, 128, num_layers=2, dropout=0.5)
    with torch.no_grad():
        for layer in rnn.layers:
            layer.bias[0] = 2
    return LastState(rnn)


ENCODERS: dict[str, Callable[[int], LastState | Convolution]] = {
    "SRU": sru,
    "LSTM": lambda size: LastState(LSTM(size, 128, num_layers=2, dropout=0.5)),
    "CNN": Convolution,
}


class Classifier(nn.Module):
    """Learnt word vectors, an encoder and a linear layer, with dropout between them."""

    def __init__(self, name: str, words: int, classes: int = 2, size: int = 128, dropout: float = 0.5) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, size)
        nn.init.uniform_(self.embed.weight, -0.25, 0.25)  # as Kim's random vectors
        self.encoder, self.drop = ENCODERS[name](size), nn.Dropout(dropout)
        self.head = nn.Linear(self.encoder.output_size, classes)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """(T, B) word numbers and their mask to (B, classes) logits."""
        return self.head(self.drop(self.encoder(self.drop(self.embed(words)), mask)))
