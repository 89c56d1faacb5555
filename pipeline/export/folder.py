"""An export as a folder: adapter, LoRA, all that it says of encoder, LLM and prompt, a card, and an example.

Of a recipe with hints also what finds the names in its prompts, without the LLM.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors.torch import save_file

from pipeline.adapters.module import Adapter, load_adapter
from pipeline.encoders.base import RANDOM
from pipeline.encoders.timm import HUB
from pipeline.encoders.timm_network import TimmTokens
from pipeline.errors import UserError
from pipeline.export.card import card_of
from pipeline.export.names import hint_of, values_of
from pipeline.export.program import program_of
from pipeline.export.trained import Trained
from pipeline.files import atomic_folder
from pipeline.runs import remedy
from pipeline.vlm import SaidOnce

FORMAT = "terraalign/1"
PACKAGES = {"open_clip": "open_clip_torch", "timm": "timm", "efficientnet_lite0": "efficientnet-lite-pytorch"}


def export(trained: Trained, to: Path) -> list[str]:
    """Write the folder; returns the names of its files. Raises UserError when there is one with files already."""
    with new_folder(to) as folder:
        source, weights = program_of(trained.adapter, trained.shape, trained.title)
        _check(source, weights, trained.adapter, trained.shape)
        config = config_of(trained)
        if trained.hints:
            config["names"] = _write_names(trained, folder, source)
        encoder, asked = _encoder(trained, folder), trained.asked
        once = asked.may_repeat is not None
        if once:
            source += "\n\nfrom dataclasses import dataclass  # noqa: E402\n\nfrom torch import Tensor  # noqa: E402\n"
            source += f"\n\n{inspect.getsource(SaidOnce)}"
        (folder / "modeling.py").write_text(source, encoding="utf-8")
        save_file(weights, folder / "adapter.safetensors")
        copy_lora(trained, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        named, title = config.get("names"), trained.title
        context = {"config": config, "encoder": encoder, "once": once, "names": named, "title": title}
        (folder / "example.py").write_text(rendered("example.py.jinja", context), encoding="utf-8")
        (folder / "README.md").write_text(card_of(trained, rendered("use.md.jinja", context), "peft"), encoding="utf-8")
    return sorted(str(path.relative_to(to)) for path in to.rglob("*") if path.is_file())


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all; UserError where one with files is."""
    taken = UserError(to, "there is something already", "name a folder that is not there, or an empty one")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise taken
    try:
        with atomic_folder(to) as folder:
            yield folder
            with suppress(OSError):  # on a disk without modes
                for file in filter(Path.is_file, folder.rglob("*")):  # safetensors leaves its own to their owner alone
                    file.chmod(folder.stat().st_mode & 0o666)
    except FileExistsError:
        raise taken from None


def config_of(trained: Trained) -> dict[str, Any]:
    """What config.json says."""
    llm, steps = trained.params.llm, trained.preprocess
    asked = asdict(trained.asked)
    behind = {"hint": hint_of(trained)} if trained.hints else {"after": asked["after"]}
    return {
        "format": FORMAT,
        "task": trained.params.data[trained.data].task,
        "adapter": trained.adapter.config,
        "image_tokens": list(trained.shape),
        "encoder": trained.encoder,
        "processor": asdict(steps) if steps else {"text": " ".join(repr(trained.parts.preprocess).split())},
        "llm": {
            key: getattr(llm, key) for key in ("loader", "model", "revision", "quantization", "dtype", "system_prompt")
        },
        "prompt": {"text": asked["text"], "before": asked["before"], **behind},
        "generation": asked["generation"],
        "may_repeat": asked["may_repeat"],
    }


def copy_lora(trained: Trained, folder: Path) -> None:
    """PEFT's own files, but for the card that PEFT writes, and naming the LLM as the parameters do."""
    shutil.copytree(trained.folder / "lora", folder / "lora", ignore=shutil.ignore_patterns("README.md"))
    path, llm = folder / "lora" / "adapter_config.json", trained.params.llm
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"base_model_name_or_path": llm.model, "revision": llm.revision}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def rendered(template: str, context: dict[str, Any]) -> str:
    """A text of this room; what the template wants but does not get is an error."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    environment.filters["python"] = repr
    return environment.get_template(template).render(context)


def _write_names(trained: Trained, folder: Path, source: str) -> dict[str, Any]:
    """Write naming.py and what it needs; returns what config.json says of it. `source` is modeling.py's.

    Raises UserError where there is no namer, or the pre-trained adapter is of another kind than the fine-tuned one.
    """
    values, tensors = values_of(trained.namer)
    if values["emd"]:
        pretrained = trained.run.pretrained(trained.adapter_name)
        adapter = load_adapter(pretrained, "last")
        own, weights = program_of(adapter, trained.shape, trained.title)
        if own != source:
            why = f"this adapter was fine-tuned from another kind of adapter than {pretrained} has now"
            raise UserError(trained.folder, why, remedy(trained.folder))
        _check(own, weights, adapter, trained.shape)
        save_file(weights, folder / "names-adapter.safetensors")
    save_file(tensors, folder / "names.safetensors")
    context = {"title": trained.title, "names": values}
    (folder / "naming.py").write_text(rendered("naming.py.jinja", context), encoding="utf-8")
    return values


def _check(source: str, weights: dict[str, torch.Tensor], adapter: Adapter, shape: tuple[int, int]) -> None:
    """The written program does what the adapter does, for one picture and for several."""
    module: dict[str, Any] = {}
    exec(compile(source, "modeling.py", "exec"), module)
    for count in (1, 2):
        tokens = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(module["adapter"](weights, tokens), adapter(tokens), rtol=1e-4, atol=1e-5)


def _encoder(trained: Trained, folder: Path) -> dict[str, Any]:
    """What the example has to know of the encoder.

    Weights that nobody can fetch by a name, of a file or random, go into the folder.
    """
    vision, parts = trained.params.vision, trained.parts
    named = vision.encoder == "efficientnet_lite0" or vision.pretrained == HUB
    if vision.encoder == "open_clip":
        import open_clip

        named = bool(open_clip.is_pretrained_cfg(vision.model, vision.pretrained))
    if not named:
        assert vision.pretrained == RANDOM or Path(str(vision.pretrained)).is_file(), "else it could not be built"
        save_file(
            {key: value.contiguous() for key, value in parts.network.state_dict().items()},
            folder / "encoder.safetensors",
        )
    return {
        "kind": vision.encoder,
        "package": PACKAGES[vision.encoder],
        "named": named,
        "trunk": isinstance(parts.tokens, TimmTokens) and vision.encoder == "open_clip",
        "layout": _layout(trained),
    }


def _layout(trained: Trained) -> str:
    """What makes image tokens of the network's features, as Python."""
    network, tokens = trained.parts.network, trained.parts.tokens
    if isinstance(tokens, TimmTokens):
        side = trained.preprocess.shape if trained.preprocess else (224, 224)
        with torch.inference_mode():
            features = tokens.network.forward_features(torch.zeros(1, 3, *side))
        if features.ndim == 3:
            return f"[:, {tokens.prefix}:]" if tokens.prefix else ""
        return ".flatten(1, 2)" if getattr(tokens.network, "output_fmt", "NCHW") == "NHWC" else ".flatten(2).mT"
    if trained.params.vision.encoder == "open_clip":
        whole = network.attn_pool is None and network.pool_type not in ("tok", "avg")
        return "[:, 1:]" if whole else ""
    return ".flatten(2).mT"
