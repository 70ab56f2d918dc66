"""Record checkpoints and outputs of the published SRU library, for the tests of its loader.

    python tests/data/record_sru.py CHECKOUT

CHECKOUT is a clone of https://github.com/asappresearch/sru with all branches. Its modules run on the CPU: the
extensions that they would compile are left out. Three generations are recorded, each in a file beside this one.
"""

import json
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
REVISIONS = {"2017": "1f57bb8", "2x": "9ddc8da", "3dev": "origin/3.0.0-dev"}
COMMON = {"input_size": 6, "hidden_size": 6, "num_layers": 2}
BOTH = {"bidirectional": True}
CASES: dict[str, dict[str, dict[str, object]]] = {
    "2017": {
        "tanh": {},
        "relu": {"use_tanh": 0, "use_relu": 1},
        "none_projected": {"use_tanh": 0, "input_size": 5},
        "bidirectional": {**BOTH, "hidden_size": 3},
        "bidirectional_projected": BOTH,
    },
    "2x": {
        "plain": {},
        "projected": {"input_size": 5},
        "tanh_rescale": {"use_tanh": True, "rescale": True, "highway_bias": -2.0},
        "projected_rescale": {"input_size": 5, "rescale": True, "highway_bias": -1.0},
        "v1": {"v1": True, "use_tanh": True},
        "bidirectional": {**BOTH, "hidden_size": 3},
        "bidirectional_projected": {**BOTH, "nn_rnn_compatible_return": True},
        "layer_norm": {"layer_norm": True},
        "normalize_after": {"layer_norm": True, "normalize_after": True},
        "low_rank": {"projection_size": 3},
        "no_skip": {"has_skip_term": False, "input_size": 5},
        "input_to_hidden": {"input_size": 5, "proj_input_to_hidden_first": True},
    },
    "3dev": {
        "plain": {"normalize_after": False},
        "projected": {"input_size": 5, "rescale": True},
        "low_rank": {"projection_size": 3, "use_tanh": True},
        "normalize_after": {"layer_norm": True, "normalize_after": True},
        "layer_norm": {"layer_norm": True},
        "bidirectional": {**BOTH, "hidden_size": 3},
    },
}


def module_2017(repository: Path) -> types.ModuleType:
    """The modules of September 2017; their CUDA kernels as the loop that the source states."""
    source = show(repository, REVISIONS["2017"], "cuda_functional.py")
    module = types.ModuleType("sru_2017")
    module.__dict__.update(torch=torch, nn=nn, Variable=lambda x: x, SRU_Compute=compute_2017)
    exec(source[source.index("class SRUCell") :], module.__dict__)
    return module


def compute_2017(activation_type: int, d: int, bidirectional: bool):
    """The kernels sru_fwd and sru_bi_fwd, column for column."""

    def run(u, x, bias, init, mask_h=None):
        length, batch, width = len(x), x.shape[1], d * (1 + bidirectional)
        u = u.view(length, batch, width, -1)
        skip = x if u.shape[-1] == 3 else u[..., 3]
        g = {0: lambda c: c, 1: torch.tanh, 2: torch.relu}[activation_type]
        halves, last = [], []
        for half in range(1 + bidirectional):
            columns = slice(half * d, (half + 1) * d)
            cur, h = init.view(batch, width)[:, columns], {}
            for t in reversed(range(length)) if half else range(length):
                g1 = torch.sigmoid(u[t, :, columns, 1] + bias[:width][columns])
                g2 = torch.sigmoid(u[t, :, columns, 2] + bias[width:][columns])
                cur = (cur - u[t, :, columns, 0]) * g1 + u[t, :, columns, 0]
                h[t] = (g(cur) - skip[t, :, columns]) * g2 + skip[t, :, columns]
            halves.append(torch.stack([h[t] for t in range(length)]))
            last.append(cur)
        return torch.cat(halves, -1), torch.cat(last, -1)

    return run


def module_later(repository: Path, revision: str, folder: Path) -> types.ModuleType:
    """The package of a later revision, without its compiled extensions."""
    import torch.utils.cpp_extension as extension

    extension.load = lambda **_: None
    torch.jit.script = torch.jit.unused = lambda function: function  # its kernels are not there to be scripted
    (folder / "sru").mkdir()
    for name in ("__init__", "cuda_functional", "modules", "ops", "version"):
        (folder / "sru" / f"{name}.py").write_text(show(repository, revision, f"sru/{name}.py"))
    for name in [name for name in sys.modules if name.split(".")[0] == "sru"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    import sru

    sys.path.remove(str(folder))
    return sru


def show(repository: Path, revision: str, path: str) -> str:
    """A file of a revision."""
    for name in (revision, revision.removeprefix("origin/")):
        done = subprocess.run(["git", "-C", repository, "show", f"{name}:{path}"], capture_output=True, text=True)
        if not done.returncode:
            return done.stdout
    raise SystemExit(done.stderr)


def record(module: types.ModuleType, generation: str) -> dict[str, np.ndarray]:
    """Run every case of a generation, with parameters, state, padding and gradient."""
    found: dict[str, np.ndarray] = {}
    for case, settings in CASES[generation].items():
        settings = COMMON | settings
        torch.manual_seed(len(found))
        rnn = module.SRU(**settings).eval()
        for name, parameter in rnn.named_parameters():
            if name.endswith("bias") or (name.endswith("weight_c") and not settings.get("v1")):
                parameter.data.normal_()
            elif name.endswith("layer_norm.weight"):
                parameter.data.uniform_(0.5, 1.5)
        x = torch.randn(5, 3, settings["input_size"], requires_grad=True)
        c0 = torch.randn(2, 3, settings["hidden_size"] * (2 if settings.get("bidirectional") else 1))
        arguments = [x, c0]
        if generation != "2017" and not settings.get("layer_norm"):
            mask_pad = torch.arange(5)[:, None] >= torch.tensor([5, 3, 4])
            arguments.append(mask_pad)
            found[f"{case}/mask_pad"] = mask_pad.numpy()
        output, after = rnn(*arguments)
        weigh = torch.randn_like(output)
        (output * weigh).sum().backward()
        found[f"{case}/config"] = np.array(json.dumps(settings))
        arrays = {
            "input": x,
            "c0": c0,
            "output": output,
            "state_out": after,
            "grad_output": weigh,
            "grad_input": x.grad,
        }
        found |= {f"{case}/{name}": array.detach().numpy() for name, array in arrays.items()}
        found |= {f"{case}/state/{name}": array.numpy() for name, array in rnn.state_dict().items()}
    return found


def main() -> None:
    """Write sru_2017.npz, sru_2x.npz and sru_3dev.npz."""
    warnings.simplefilter("ignore")
    repository = Path(sys.argv[1])
    for generation, revision in REVISIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            later = generation != "2017"
            module = module_later(repository, revision, Path(folder)) if later else module_2017(repository)
            np.savez_compressed(HERE / f"sru_{generation}.npz", **record(module, generation))


if __name__ == "__main__":
    main()
