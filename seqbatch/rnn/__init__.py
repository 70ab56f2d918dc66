"""Recurrent layers that know resets, padding, flat input and carried state, on CPU and CUDA."""

from seqbatch.rnn.lstm import LSTM, SlowPathWarning
from seqbatch.rnn.sru import SRU, SRULayer

__all__ = ["LSTM", "SRU", "SRULayer", "SlowPathWarning"]
