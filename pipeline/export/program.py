"""An adapter as a file of plain Python that needs torch alone: the operations it does, in their order.

torch.export traces the adapter itself, one of a user's own class, too, so there is no second implementation to keep in
step; its weights lie beside the file as safetensors. torch.export's own files are not for giving away: to load one runs
pickle, and other versions of torch may not read it.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from pipeline.adapters.module import Adapter

FRAME = '''"""{title}: image tokens [B, {count}, {d_in}] to soft prompts [B, {tokens}, {d_out}].

Written by TerraAlign from a trace of the adapter by torch.export {version}; `weights` are those of adapter.safetensors.
"""

import torch
from torch import device, inf, nan  # noqa: F401


def adapter(weights, tokens):
    """A picture at a time; float32, on the CPU."""
    return torch.cat([_of_one(weights, picture) for picture in tokens.split(1)])


def _of_one(weights, tokens):
{body}
'''


def program_of(adapter: Adapter, shape: tuple[int, int], title: str) -> tuple[str, dict[str, Tensor]]:
    """The source of a module whose `adapter(weights, tokens)` does what an adapter does, and these weights.

    `shape` are number and width of the image tokens. Traced for one picture: a class may ask how many there are.
    """
    adapter = adapter.cpu().eval()
    with torch.no_grad():
        given = torch.zeros(1, *shape)
        tokens, d_out = adapter(given).shape[1:]
        traced = torch.export.export(adapter, (given,), strict=False)
    signature, weights = traced.graph_signature, {**traced.state_dict, **traced.constants}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    _, *lines = traced.graph_module.code.strip().splitlines()  # the first one names the weights as arguments
    body = "\n".join(line.partition(";  ")[0] for line in lines).replace("return (", "return ").removesuffix(",)")
    body = re.sub(r"\w+", lambda word: f'weights["{names[word[0]]}"]' if word[0] in names else word[0], body)
    source = FRAME.format(
        title=title, count=shape[0], d_in=shape[1], tokens=tokens, d_out=d_out, body=body,
        version=torch.__version__.split("+")[0],
    )  # fmt: skip
    return source, {name: weights[name].detach().clone().contiguous() for name in names.values()}
