"""Checkpoints of the published SRU library (asappresearch/sru), read and written.

Three generations differ in names and layout: 2017 (``rnn_lst.0.weight``, ``bias``), 2.x (also ``weight_c`` and
``scale_x``) and 3.0-dev (``transform_module.weight``, transposed). Theirs interleave the planes of a column,
ours stack them, so that a kernel reads neighbours.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from seqbatch.rnn.sru import SRU, Activation, SRULayer

__all__ = ["from_sru_state_dict", "to_sru_state_dict"]

Generation = Literal["2017", "2.x", "3.0-dev"]


def from_sru_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    bidirectional: bool = False,
    activation: Activation | None = None,
    highway: bool = True,
    normalize_after: bool = False,
    **settings: Any,
) -> SRU:
    """Build an :class:`SRU` from a state dict of the published library; the generation is recognised.

    Sizes, depth, projection, the highway's scale and layer normalization are read from the tensors; what
    they cannot show is said here. Parameters that are all zero in ``weight_c`` are those of the library's
    ``v1=True`` and give ``version="v1"``.

    Args:
        state_dict: Names to tensors.
        bidirectional: Whether the checkpoint is (the library's ``bidirectional``).
        activation: "tanh" for ``use_tanh``, "relu" for ``use_relu``; None: the default of the generation,
            "tanh" in 2017, later "identity".
        highway: False for ``has_skip_term=False``.
        normalize_after: Where layer_norm stands, if there is one.
        **settings: Further settings of :class:`SRU` that hold no parameters, as dropout or batch_first.

    Returns:
        The SRU, whose state is (num_layers * directions, B, hidden_size) where theirs is (num_layers, B,
        directions * hidden_size), unless it was made with ``nn_rnn_compatible_return``.

    Raises:
        ValueError: The names or shapes are no checkpoint that this function knows.

    >>> published = to_sru_state_dict(SRU(3, 4, num_layers=2))
    >>> from_sru_state_dict(published).num_layers
    2
    """
    layers = _by_layer(state_dict)
    generation = _generation(layers[0])
    found = [_planar(layer, generation) for layer in layers]
    columns = found[0]["bias"].shape[1]
    if columns % (1 + bidirectional):
        raise ValueError(f"the checkpoint has {columns} columns, which two directions cannot share")
    peephole = generation != "2017" and any(bool(layer["weight_c"].any()) for layer in found)
    norms = [layer["layer_norm.weight"] for layer in found if "layer_norm.weight" in layer]
    first = found[0].get("weight_proj", found[0]["weight"])
    rnn = SRU(
        first.shape[1],
        columns // (1 + bidirectional),
        len(found),
        bidirectional=bidirectional,
        version="v2" if peephole else "v1",
        activation=activation or ("tanh" if generation == "2017" else "identity"),
        highway=highway,
        rescale=float(found[0]["scale_x"]) if generation != "2017" else 1.0,
        layer_norm=bool(norms),
        normalize_after=normalize_after,
        projection_size=found[0]["weight_proj"].shape[0] if "weight_proj" in found[0] else 0,
        dtype=first.dtype,
        **settings,
    )
    for layer, tensors in zip(rnn.layers, found, strict=True):
        tensors.pop("scale_x", None)
        if not peephole:
            tensors.pop("weight_c", None)
        try:
            layer.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint does not fit {layer}: {error}; say what its tensors cannot show: bidirectional, "
                "highway or normalize_after (layers of different projection size are not supported)"
            ) from error
    return rnn


def to_sru_state_dict(rnn: SRU, generation: Generation = "2.x") -> dict[str, Tensor]:
    """The state dict that the published library would have for this SRU.

    Args:
        rnn: The module.
        generation: "2017", "2.x" or "3.0-dev".

    Raises:
        ValueError: The generation has no such module.

    >>> list(to_sru_state_dict(SRU(3, 4, version="v1"), "2017"))
    ['rnn_lst.0.weight', 'rnn_lst.0.bias']
    """
    if generation not in ("2017", "2.x", "3.0-dev"):
        raise ValueError(f"generation must be '2017', '2.x' or '3.0-dev', got {generation!r}")
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(rnn.layers):
        if not isinstance(layer, SRULayer):
            raise TypeError(f"expected the layers of an SRU, got {type(layer).__name__}")
        if generation == "2017" and (
            layer.weight_c is not None
            or layer.scale != 1
            or layer.layer_norm is not None
            or layer.projection_size
            or not layer.highway
        ):
            raise ValueError(
                f"the library of 2017 has no {layer} with scale {layer.scale:.4g}: only version 'v1' with "
                "rescale=False, a highway, and neither layer_norm nor projection_size; take '2.x'"
            )
        tensors |= {f"rnn_lst.{i}.{name}": tensor for name, tensor in _interleaved(layer, generation).items()}
    return tensors


def _by_layer(state_dict: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    if "input_to_hidden.weight" in state_dict:
        raise ValueError(
            "input_to_hidden.weight stands before the layers: take it out of the state dict and apply it "
            "yourself, with torch.nn.functional.linear(input, weight)"
        )
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        parts = name.split(".", 2)
        if parts[0] != "rnn_lst" or len(parts) < 3 or not parts[1].isdigit():
            raise ValueError(f"names must be 'rnn_lst.<layer>.<parameter>', got {name!r}; strip any prefix")
        layers.setdefault(int(parts[1]), {})[parts[2]] = tensor.detach()
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise ValueError(f"layers must be 0 to n - 1, got {sorted(layers)}")
    return [layers[i] for i in range(len(layers))]


def _generation(layer: Mapping[str, Tensor]) -> Generation:
    if any(name.startswith("transform_module") for name in layer):
        return "3.0-dev"
    return "2.x" if "weight_c" in layer else "2017"


def _planar(layer: dict[str, Tensor], generation: Generation) -> dict[str, Tensor]:
    """One layer of theirs under our names, in our layout."""
    layer, found = dict(layer), {}
    if generation == "3.0-dev":
        low_rank = "transform_module.0.weight" in layer
        weight = layer.pop("transform_module.1.weight" if low_rank else "transform_module.weight")
        if low_rank:
            found["weight_proj"] = layer.pop("transform_module.0.weight")
    else:
        weight = layer.pop("weight").T
        if "weight_proj" in layer:
            found["weight_proj"] = layer.pop("weight_proj").T
    columns = layer["bias"].numel() // 2
    if not columns or weight.shape[0] % columns or weight.shape[0] // columns not in (3, 4):
        raise ValueError(f"a weight of {weight.shape[0]} rows and {columns} columns of bias do not fit together")
    found["weight"] = weight.reshape(columns, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
    for name in ("bias", "weight_c"):
        if name in layer:
            found[name] = layer.pop(name).reshape(2, columns)
    return found | layer


def _interleaved(layer: SRULayer, generation: Generation) -> dict[str, Tensor]:
    """One layer of ours under their names, in their layout."""
    weight = layer.weight.detach().reshape(layer.planes, layer.output_size, -1).transpose(0, 1)
    weight = weight.reshape(layer.weight.shape)
    zeros = weight.new_zeros(2 * layer.output_size)
    low_rank = None if layer.weight_proj is None else layer.weight_proj.detach()
    found: dict[str, Tensor] = {}
    if generation == "3.0-dev":
        found["transform_module.weight" if low_rank is None else "transform_module.1.weight"] = weight.clone()
        if low_rank is not None:
            found["transform_module.0.weight"] = low_rank.clone()
    else:
        if low_rank is not None:
            found["weight_proj"] = low_rank.T.contiguous()
        found["weight"] = weight.T.contiguous()
    if generation != "2017":
        found["weight_c"] = zeros if layer.weight_c is None else layer.weight_c.detach().flatten().clone()
        found["scale_x"] = torch.tensor([layer.scale if layer.highway else 1.0], dtype=torch.float32)
    found["bias"] = zeros if layer.bias is None else layer.bias.detach().flatten().clone()
    if layer.layer_norm is not None:
        found |= {f"layer_norm.{name}": x.detach().clone() for name, x in layer.layer_norm.named_parameters()}
    return found
