"""Names of pictures with probabilities: by what stage `name` fitted or, before it, by EMD alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.module import load_adapter
from pipeline.config import Params
from pipeline.devices import pick_device
from pipeline.naming.namer import Namer
from pipeline.naming.table import hinted
from pipeline.naming.weigh import combined
from pipeline.origin import check_start
from pipeline.runs import Run

TOP = 5  # names that are given, of all
NamedBy = Callable[[Tensor, str], list[dict[str, float]]]
"""All names of pictures, tokens [B, N, D_img], with their probabilities by a rule, the likeliest first."""


def namer_at_work(params: Params, folder: Path) -> NamedBy:
    """What gives all names with their probabilities by one of RULES, the likeliest first; `folder` is the namer's.

    Where EMD has no part in `namer`, neither adapter nor solver is asked: the first answer comes a second sooner.
    """
    namer = Namer.load(folder, params.runtime.emd_threads)
    pretrained = Run.of(params).pretrained(folder.parent.name)
    check_start(folder, pretrained)
    device = pick_device(params.runtime.device)
    adapter = load_adapter(pretrained, "last").to(device)
    emd, discriminant = namer.scales.together

    @torch.no_grad()
    def named(tokens: Tensor, rule: str) -> list[dict[str, float]]:
        if rule == "namer" and not emd:
            found = combined({rule: namer.discriminant.scores(tokens).cpu()}, {rule: discriminant})
        else:
            found = namer.rules(tokens, adapter(tokens.to(device).float()))[rule]
        return likeliest(namer.names, found.exp())

    return named


def emd_at_work(params: Params, adapter: str, data: str) -> NamedBy:
    """The same by EMD to the names alone: all that pre-training gives. It is fitted here, in seconds."""
    from pipeline.naming.fit import fit_nearest

    names, nearest, scale = fit_nearest(params, adapter, data)
    device = pick_device(params.runtime.device)
    network = load_adapter(Run.of(params).pretrained(adapter), "last").to(device)

    @torch.no_grad()
    def named(tokens: Tensor, rule: str) -> list[dict[str, float]]:
        assert rule == "emd", "there is no other yet"
        return likeliest(names, (scale * nearest.scores(network(tokens.to(device).float()))).softmax(1))

    return named


def hints_at_work(
    params: Params, adapter: str, recipe: str, namer: Callable[[Path], NamedBy] | None = None
) -> Callable[[Tensor], list[str] | None]:
    """What a recipe writes into the prompt about pictures, which the LLM has learned to expect there; None for nothing.

    `namer` gives what names by the namer in a folder: else it is loaded here.
    """
    from pipeline.tasks.base import Task

    own = params.finetune_for(adapter, recipe)
    if not own.hints:
        return lambda tokens: None
    task = Task.of("classify", params.evaluate)
    data = next(data for data in own.data if params.data[data].task == "classify")
    folder = Run.of(params).named(adapter) / data
    named = namer(folder) if namer else namer_at_work(params, folder)
    return lambda tokens: [task.hint(hinted(best.items(), own.hints)) for best in named(tokens, "namer")]


def likeliest(names: Sequence[str], shares: Tensor) -> list[dict[str, float]]:
    """Names with their probabilities [B, C], for each picture, the likeliest first."""
    order = shares.argsort(dim=1, descending=True, stable=True)
    return [
        {names[i]: share for i, share in zip(row, values, strict=True)}
        for row, values in zip(order.tolist(), shares.gather(1, order).tolist(), strict=True)
    ]
