"""Checkpoints of the published library: what it computed with them, ours computes too."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqbatch.rnn import SRU, from_sru_state_dict, to_sru_state_dict

DATA = Path(__file__).parent / "data"
FILES = {"2017": "sru_2017.npz", "2.x": "sru_2x.npz", "3.0-dev": "sru_3dev.npz"}


def cases() -> list[Any]:
    found = []
    for generation, name in FILES.items():
        with np.load(DATA / name) as file:
            found += [pytest.param(generation, k.split("/")[0], id=f"{generation}-{k}") for k in file if "config" in k]
    return found


def load(generation: str, case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The constructor's arguments, the state dict, and the other arrays of a case."""
    with np.load(DATA / FILES[generation]) as file:
        arrays = {k.split("/", 1)[1]: file[k] for k in file if k.startswith(f"{case}/")}
    config = json.loads(str(arrays.pop("config")))
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    return config, state, {k: v for k, v in tensors.items() if not k.startswith("state/")}


def build(generation: str, config: dict[str, Any], state: dict[str, torch.Tensor]) -> SRU:
    """Ours, told what the tensors cannot show."""
    tanh = config.get("use_tanh", generation == "2017")
    return from_sru_state_dict(
        state,
        bidirectional=config.get("bidirectional", False),
        activation="relu" if config.get("use_relu") else "tanh" if tanh else "identity",
        highway=config.get("has_skip_term", True),
        normalize_after=config.get("normalize_after", False),
    )


@pytest.mark.parametrize(("generation", "case"), cases())
def test_outputs_states_and_gradients_agree(generation: str, case: str) -> None:
    config, state, recorded = load(generation, case)
    x = recorded["input"].requires_grad_()
    into = state.pop("input_to_hidden.weight", None)
    rnn = build(generation, config, state)
    directions, hidden = 1 + rnn.bidirectional, rnn.hidden_size

    def ours(state: torch.Tensor) -> torch.Tensor:
        """From (layers, B, directions * d) to (layers * directions, B, d)."""
        return state.unflatten(-1, (directions, hidden)).transpose(1, 2).flatten(0, 1)

    mask = ~recorded["mask_pad"] if "mask_pad" in recorded else None
    source = x if into is None else torch.nn.functional.linear(x, into)
    output, after = rnn(source, ours(recorded["c0"]), mask=mask)
    expected = recorded["state_out"] if config.get("nn_rnn_compatible_return") else ours(recorded["state_out"])
    near = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(output, recorded["output"], **near)
    torch.testing.assert_close(after, expected, **near)
    (output * recorded["grad_output"]).sum().backward()
    torch.testing.assert_close(x.grad, recorded["grad_input"], rtol=1e-5, atol=2e-6)  # sums over steps and columns


@pytest.mark.parametrize(("generation", "case"), cases())
def test_the_way_back_gives_the_same_tensors(generation: str, case: str) -> None:
    config, state, _ = load(generation, case)
    state.pop("input_to_hidden.weight", None)
    again = to_sru_state_dict(build(generation, config, state), generation)  # type: ignore[arg-type]
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("other", ["2.x", "3.0-dev"])
def test_generations_convert_into_each_other(other: Any) -> None:
    rnn = SRU(3, 4, 2, projection_size=2, layer_norm=True, highway_bias=-1.0)
    again = from_sru_state_dict(to_sru_state_dict(rnn, other), normalize_after=False)
    x = torch.randn(5, 2, 3)
    assert torch.equal(rnn(x)[0], again(x)[0])
    assert again.layers[0].scale == pytest.approx(rnn.layers[0].scale)


def test_a_missing_bias_becomes_zeros() -> None:
    rnn = SRU(4, 4, bias=False, version="v1")
    x = torch.randn(5, 2, 4)
    assert torch.equal(rnn(x)[0], from_sru_state_dict(to_sru_state_dict(rnn, "2017"))(x)[0])


GOOD = to_sru_state_dict(SRU(3, 4))
BAD = [
    ({"encoder." + k: v for k, v in GOOD.items()}, "got 'encoder.rnn_lst.0.weight'; strip any prefix"),
    ({k.replace(".0.", ".1."): v for k, v in GOOD.items()}, r"layers must be 0 to n - 1, got \[1\]"),
    ({}, r"layers must be 0 to n - 1, got \[\]"),
    (GOOD | {"input_to_hidden.weight": torch.zeros(4, 3)}, "input_to_hidden.weight stands before the layers"),
    (GOOD | {"rnn_lst.0.bias": torch.zeros(6)}, "a weight of 16 rows and 3 columns of bias do not fit together"),
    (GOOD | {"rnn_lst.0.extra": torch.zeros(6)}, "the checkpoint does not fit SRULayer.*say what its tensors cannot"),
]


@pytest.mark.parametrize(("state", "message"), BAD)
def test_bad_checkpoints(state: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_sru_state_dict(state)


def test_what_a_generation_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"the library of 2017 has no SRULayer.*take '2.x'"):
        to_sru_state_dict(SRU(3, 4), "2017")
    with pytest.raises(ValueError, match=r"generation must be '2017', '2\.x' or '3.0-dev', got '4'"):
        to_sru_state_dict(SRU(3, 4), "4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 columns, which two directions cannot share"):
        from_sru_state_dict(to_sru_state_dict(SRU(3, 5)), bidirectional=True)
