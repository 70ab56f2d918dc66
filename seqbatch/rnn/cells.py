"""Recurrent cells as plain steps, to be read, copied and changed: ``cell(x_t, *state) -> (y_t, *new_state)``.

:func:`seqbatch.rnn.parallel.parallelize` makes a layer over sequences of any of them; none of them knows of time. In
the equations h and c are the states before the step and h' and c' those after it, products of vectors are element by
element, s is the sigmoid, [a, b] = v cuts v into parts, and y is h' where nothing else is said.

>>> cell = GRU(3, 2)
>>> x, h = cell.example(lanes=4)
>>> y, h = cell(x, h)
>>> y.shape
torch.Size([4, 2])
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, softplus

__all__ = [
    "BNLSTM",
    "GRU",
    "LSTM",
    "QRNN",
    "RGLRU",
    "Cell",
    "Elman",
    "IndRNN",
    "MinGRU",
    "MinLSTM",
    "PeepholeLSTM",
    "SRUv1",
    "SRUv2",
    "TwoLayer",
]


class Cell(nn.Module):
    """What all cells here share: two sizes, and an example of what the step takes.

    Args:
        input_size: Features of x.
        hidden_size: Features of y and of each state.
    """

    states = 1  # how many

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size

    def example(self, lanes: int = 4) -> tuple[Tensor, ...]:
        """An input and states, (lanes, input_size) and (lanes, hidden_size) each, as :func:`parallelize` wants them.

        >>> [tuple(part.shape) for part in LSTM(3, 2).example()]
        [(4, 3), (4, 2), (4, 2)]
        """
        like = next(self.parameters())
        return tuple(torch.randn(lanes, n).to(like) for n in (self.input_size, *[self.hidden_size] * self.states))


class Elman(Cell):
    """h' = tanh(W x + b + U h): Elman, Finding structure in time (Cognitive Science 14, 1990); ``nn.RNNCell``."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.ih = nn.Linear(input_size, hidden_size)
        self.hh = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        h = torch.tanh(self.ih(x) + self.hh(h))
        return h, h


class GRU(Cell):
    """``nn.GRUCell``, the reset gate after the product: Cho et al., arXiv 1406.1078.

    r = s(W_r x + U_r h), z = s(W_z x + U_z h), n = tanh(W_n x + r (U_n h)), h' = (1 - z) n + z h, all products
    with biases.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.ih = nn.Linear(input_size, 3 * hidden_size)
        self.hh = nn.Linear(hidden_size, 3 * hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        xr, xz, xn = self.ih(x).chunk(3, -1)
        hr, hz, hn = self.hh(h).chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        h = (1 - z) * n + z * h
        return h, h


class LSTM(Cell):
    """``nn.LSTMCell``, states h and c: Hochreiter and Schmidhuber 1997 with forget gates; Sak et al., arXiv 1402.1128.

    [i, f, g, o] = W x + U h + b, c' = s(f) c + s(i) tanh(g), h' = s(o) tanh(c').
    """

    states = 2

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.ih = nn.Linear(input_size, 4 * hidden_size)
        self.hh = nn.Linear(hidden_size, 4 * hidden_size)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step."""
        i, f, g, o = (self.ih(x) + self.hh(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, h, c


class PeepholeLSTM(LSTM):
    """:class:`LSTM` whose gates see the cell: Gers and Schmidhuber 2000; equations 7 to 11 of Graves, arXiv 1308.0850.

    [i, f, g, o] = W x + U h + b, c' = s(f + p_f c) c + s(i + p_i c) tanh(g), h' = s(o + p_o c') tanh(c').
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.peephole = nn.Parameter(torch.randn(3, hidden_size) * hidden_size**-0.5)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step."""
        i, f, g, o = (self.ih(x) + self.hh(h)).chunk(4, -1)
        pi, pf, po = self.peephole.unbind()
        c = torch.sigmoid(f + pf * c) * c + torch.sigmoid(i + pi * c) * torch.tanh(g)
        h = torch.sigmoid(o + po * c) * torch.tanh(c)
        return h, h, c


class SRUv1(Cell):
    """SRU of 2017 with g = tanh: Lei et al., arXiv 1709.02755 v2, equations 3 to 7.

    [z, f, r] = W x, f = s(f + b_f), r = s(r + b_r), c' = f c + (1 - f) z, y = r tanh(c') + (1 - r) x; where x and c
    differ in size, x' = W' x takes its place.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.planes = 3 if input_size == hidden_size else 4
        self.linear = nn.Linear(input_size, self.planes * hidden_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(2, hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        parts = self.linear(x).chunk(self.planes, -1)
        z, f, r, skip = parts[0], parts[1], parts[2], x if self.planes == 3 else parts[3]
        f, r = torch.sigmoid(f + self.bias[0]), torch.sigmoid(r + self.bias[1])
        c = f * c + (1 - f) * z
        return r * torch.tanh(c) + (1 - r) * skip, c


class SRUv2(SRUv1):
    """SRU as published at EMNLP 2018, whose gates see the state before the step: Lei et al., arXiv 1709.02755.

    [z, f, r] = W x, f = s(f + v_f c + b_f), r = s(r + v_r c + b_r), c' = f c + (1 - f) z, y = r c' + (1 - r) x, or x'.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.weight_c = nn.Parameter(torch.empty(2, hidden_size).uniform_(-(1.5**0.5), 1.5**0.5))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        parts = self.linear(x).chunk(self.planes, -1)
        z, f, r, skip = parts[0], parts[1], parts[2], x if self.planes == 3 else parts[3]
        f = torch.sigmoid(f + self.weight_c[0] * c + self.bias[0])
        r = torch.sigmoid(r + self.weight_c[1] * c + self.bias[1])
        c = f * c + (1 - f) * z
        return r * c + (1 - r) * skip, c


class MinGRU(Cell):
    """[z, n] = W x + b, h' = (1 - s(z)) h + s(z) n: Feng et al., Were RNNs all we needed?, arXiv 2410.01201."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.linear = nn.Linear(input_size, 2 * hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        z, n = self.linear(x).chunk(2, -1)
        h = torch.lerp(h, n, torch.sigmoid(z))
        return h, h


class MinLSTM(Cell):
    """[f, i, n] = W x + b, h' = (s(f) h + s(i) n) / (s(f) + s(i)): Feng et al., arXiv 2410.01201."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.linear = nn.Linear(input_size, 3 * hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        f, i, n = self.linear(x).chunk(3, -1)
        f, i = torch.sigmoid(f), torch.sigmoid(i)
        h = (f * h + i * n) / (f + i)
        return h, h


class QRNN(Cell):
    """Quasi-recurrent network with windows of one step: Bradbury et al., arXiv 1611.01576, equations 2 to 4.

    [z, f, o] = W x + b, c' = s(f) c + (1 - s(f)) tanh(z), y = s(o) c' ("fo"-pooling); y = c' without o ("f"-pooling).
    """

    def __init__(self, input_size: int, hidden_size: int, pooling: str = "fo") -> None:
        super().__init__(input_size, hidden_size)
        if pooling not in ("f", "fo"):
            raise ValueError(f"pooling must be 'f' or 'fo', got {pooling!r}")
        self.pooling = pooling
        self.linear = nn.Linear(input_size, (1 + len(pooling)) * hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        parts = self.linear(x).chunk(1 + len(self.pooling), -1)
        f = torch.sigmoid(parts[1])
        c = f * c + (1 - f) * torch.tanh(parts[0])
        return c if self.pooling == "f" else torch.sigmoid(parts[2]) * c, c


class RGLRU(Cell):
    """Real-gated linear recurrent unit, whose input z is a product with x: De et al. (Griffin), arXiv 2402.19427.

    [z, r, i] = W x + b, a = s(L)^(8 s(r)), h' = a h + sqrt(1 - a^2) (s(i) z).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.linear = nn.Linear(input_size, 3 * hidden_size)
        decay = torch.empty(hidden_size).uniform_(0.9, 0.999) ** (1 / 8)
        self.decay = nn.Parameter(torch.logit(decay))  # L

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        z, r, i = self.linear(x).chunk(3, -1)
        log_a = -8 * torch.sigmoid(r) * softplus(-self.decay)
        h = torch.exp(log_a) * h + torch.sqrt(-torch.expm1(2 * log_a)) * (torch.sigmoid(i) * z)
        return h, h


class IndRNN(Cell):
    """h' = relu(W x + b + u h), u one weight for each unit: Li et al., arXiv 1803.04831."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.linear = nn.Linear(input_size, hidden_size)
        self.weight = nn.Parameter(torch.rand(hidden_size))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One step."""
        h = torch.relu(self.linear(x) + self.weight * h)
        return h, h


class TwoLayer(Cell):
    """An :class:`LSTM` that feeds a :class:`GRU`, as one step: two components, since nothing leads back down."""

    states = 3

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.lower = LSTM(input_size, hidden_size)
        self.upper = GRU(hidden_size, hidden_size)

    def forward(self, x: Tensor, h: Tensor, c: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step; h and c are the lower layer's states, g is the upper's."""
        below, h, c = self.lower(x, h, c)
        y, g = self.upper(below, g)
        return y, h, c, g


class BNLSTM(Cell):
    """LSTM with batch normalization over the lanes of each step: Cooijmans et al., arXiv 1603.09025, equations 6 to 8.

    [i, f, g, o] = BN(U h) + BN(W x) + b, c' = s(f) c + s(i) tanh(g), h' = s(o) tanh(BN(c')).
    For training, on two lanes and more: all lanes count, padded ones too, and no running statistics are kept.
    :class:`seqbatch.rnn.BNLSTM` is the whole of it.
    """

    states = 2

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.ih = nn.Linear(input_size, 4 * hidden_size)
        self.hh = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.gamma_x, self.gamma_h = (nn.Parameter(torch.full((4 * hidden_size,), 0.1)) for _ in range(2))
        self.gamma_c, self.beta_c = (
            nn.Parameter(torch.full((hidden_size,), 0.1)),
            nn.Parameter(torch.zeros(hidden_size)),
        )
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step."""
        above = batch_norm(self.ih(x), None, None, self.gamma_x, training=True)
        before = batch_norm(self.hh(h), None, None, self.gamma_h, training=True)
        i, f, g, o = (above + before + self.bias).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(batch_norm(c, None, None, self.gamma_c, self.beta_c, training=True))
        return h, h, c
