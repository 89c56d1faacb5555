"""What a profile needs, what of it is there, and how to get the rest. Reads; never downloads."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import LLM, Params, components, read_yaml
from pipeline.doctor.hub import Hub
from pipeline.encoders.base import Encoder
from pipeline.llms.base import Loader
from pipeline.needs import Need
from pipeline.plan import costs
from pipeline.plan.costs import GIB, gib
from pipeline.plan.machine import cuda
from pipeline.sources.prepare import source_of


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor has to say about one profile."""

    profile: str
    checks: list[Need]
    hub: str

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def diagnose(params: Params) -> Diagnosis:
    """Look at data, weights, GPU, disk and memory for these parameters; takes a few seconds at most."""
    hub = Hub()
    checks = [_data(params, name) for name in params.run.data]
    checks += [*_encoder(params), *dict.fromkeys(Loader.of(llm).need() for llm in _llms(params))]
    checks.append(_gpu(params))
    checks += [_disk(costs.disk_bytes(params)), _memory(params)]
    return Diagnosis(params.profile, checks, hub.answer())


def _encoder(params: Params) -> list[Need]:
    """Its weights and, where a metric asks its text tower, what that needs besides."""
    encoder = Encoder.of(params.vision)
    asked = any(components.find("metric", one.metric).needs_text_tower for one in params.evaluate.metrics)
    return [encoder.need(), *filter(None, [encoder.text_need() if asked else None])]


def _llms(params: Params) -> list[LLM]:
    """The LLM, and those that metrics bring along."""
    own = [getattr(metric, "llm", None) for metric in params.evaluate.metrics]
    return [params.llm, *(llm for llm in own if isinstance(llm, LLM))]


def _data(params: Params, name: str) -> Need:
    """What a data set needs; where its files are missing, the command that names them and keeps the other data sets."""
    need = source_of(params, name).need()
    if need.ok or not need.found.startswith("missing") or not _is_of_profile(params):
        return need
    settings = [
        setting for other in params.run.data for setting in source_of(params, other).settings_for_use(other == name)
    ]
    options = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
    return Need(need.name, False, need.found, f"terraalign profile use {params.profile} {options}")


def _is_of_profile(params: Params) -> bool:
    """Whether `profile use` would give this parameter file again, but for where its data sets are."""
    path = Path("profiles") / f"{params.profile}.yaml"
    if not path.is_file():
        return False
    profile = read_yaml(path.read_text(encoding="utf-8"), str(path))
    sources = {name: section.get("source") for name, section in profile.get("data", {}).items()}
    return profile.get("run") == params.run.model_dump() and sources == {
        name: section.source for name, section in params.data.items()
    }


def _gpu(params: Params) -> Need:
    """A GPU is needed for a quantised model of a billion parameters or more; elsewhere it is welcome."""
    name, free = cuda(params.runtime.device)
    if name:
        want = costs.memory_bytes(params)
        enough = free >= want
        remedy = "" if enough else "a smaller finetune.recipes.*.batch with accumulate, or a larger GPU"
        return Need("GPU", enough, f"{name}, {gib(free)} free, about {gib(want)} needed", remedy)
    if costs.needs_gpu(params):
        return Need(
            "GPU", False, "none that torch can use", "nf4 on a model this large needs a CUDA GPU (24 GB or more)"
        )
    return Need("GPU", True, "none; not needed by these models")


def _disk(needed: float) -> Need:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "" if free >= needed else "free some space, or set data.*.count to use fewer pictures"
    return Need("disk", free >= needed, f"{gib(free)} free, about {gib(needed)} needed", remedy)


def _memory(params: Params) -> Need:
    import psutil

    total = psutil.virtual_memory().total
    on_gpu = costs.needs_gpu(params) or bool(cuda(params.runtime.device)[0])
    need = 8 * GIB if on_gpu else costs.memory_bytes(params, on_cpu=True)
    remedy = "" if total >= need else "a smaller finetune.recipes.*.batch with accumulate, or llm.quantization: nf4"
    return Need("memory", total >= need, f"{gib(total)} in all, about {gib(need)} needed", remedy)
