"""Whether a model's files can be loaded, told from their headers: no code of theirs is run, nothing is downloaded.

`terraalign doctor` and the loader ask the same functions, so what the one calls ok the other can read.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from pipeline.files import Damaged, refuse_pointer
from pipeline.needs import Fault
from pipeline.weights import safetensors_table

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
BESIDE = ("special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja")
PICKLES = ("*.bin", "*.pt", "*.pth")
# Causal language models whose cache is a running state. To ask transformers' classes would mean to import each; a kind
# that is missing here is refused all the same, by the network itself, once it is built.
STATEFUL = frozenset(
    {
        *("bailing_hybrid", "bamba", "deepseek_v4", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba"),
        *("kimi_linear", "lara_mini", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_text"),
        *("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv"),
        *("xlstm", "zamba", "zamba2", "zaya"),
    }
)


class ModelFiles:
    """The files of one model in a folder, or in the hub's local cache."""

    def __init__(self, model: str, revision: str | None, folder: Path | None, missing: str, again: str):
        self.model, self.revision, self.folder, self.missing, self.again = model, revision, folder, missing, again

    def find(self, name: str) -> Path | None:
        if self.folder is None:
            return cached(self.model, name, self.revision)
        return self.folder / name if (self.folder / name).is_file() else None

    def fault(self, tokenizer: bool) -> Fault | None:
        """The first fault in the order in which loading meets them; later ones may follow from it."""
        try:
            return self._config() or self._weights() or (self._tokenizer() if tokenizer else None)
        except Damaged as error:
            return Fault(str(error), self.again)

    def _absent(self, names: list[str], remedy: str = "") -> Fault | None:
        """That files are missing; none where the hub can be asked for them."""
        if not self.missing:
            return None
        mend = f"copy {'them' if len(names) > 1 else 'it'} there" if self.folder else self.missing
        return Fault(f"missing: {', '.join(names)}", remedy or mend)

    def _config(self) -> Fault | None:
        path = self.find("config.json")
        if path is None and self.folder is not None:
            return self._not_a_model(self.folder)
        if path is None:
            if "/" not in self.model and self.missing:
                return Fault("no such folder", f"correct llm.model, or fetch it from the hub: {self.missing}")
            return self._absent(["config.json"])
        return _architecture_fault(read_json(path))

    def _not_a_model(self, folder: Path) -> Fault | None:
        """A folder without config.json: what it is instead."""
        if (folder / "adapter_config.json").is_file():
            return Fault(
                "a LoRA (adapter_config.json), not a whole model", "merge it into its base model, and save that"
            )
        if files := sorted(folder.glob("*.gguf")):
            return Fault("a folder of GGUF files", f"set llm.loader: gguf and llm.model: {files[0]}")
        return self._absent(["config.json"])

    def _weights(self) -> Fault | None:
        index = self.find("model.safetensors.index.json")
        if index is None:
            path = self.find("model.safetensors")
            if path is not None:
                check_safetensors(path)
                return None
            return self._no_weights()
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise Damaged(f"{index.name}: no index of tensors (weight_map)")
        names = sorted(set(shards.values()))
        missing = [name for name in names if self.find(name) is None]
        if missing and self.missing:
            return self._absent(missing)
        for name in names:
            path = self.find(name)
            there = check_safetensors(path) if path else None
            lacking = sorted(key for key, place in shards.items() if place == name and there and key not in there)
            if lacking:
                raise Damaged(f"{name}: has no tensor {lacking[0]}, which {index.name} says is in it")
        return None

    def _no_weights(self) -> Fault | None:
        folder = self.folder
        if folder is None or not any(file for pattern in PICKLES for file in folder.glob(pattern)):
            return self._absent(["model.safetensors"])
        name = str(folder)
        convert = (
            f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({name!r}).save_pretrained({name!r})"
        )
        return Fault(
            "its weights are pickles (*.bin), which could run code; model.safetensors is needed",
            f"convert them once, if you trust them: python -c {shlex.quote(convert)}",
        )

    def _tokenizer(self) -> Fault | None:
        found = [path for name in TOKENIZERS if (path := self.find(name))]
        if not found:
            return self._absent(
                ["tokenizer.json"], "copy the files tokenizer* of the model there" if self.folder else ""
            )
        beside = [path for name in BESIDE if (path := self.find(name))]
        for path in (found[0], *beside):
            refuse_pointer(path)
        if found[0].name == "tokenizer.json":
            check_tokenizer(found[0])
        config = self.find("tokenizer_config.json")
        settings = read_json(config) if config else {}
        if config is None and not self.missing:
            return None  # the hub has it
        template = any(self.find(name) for name in ("chat_template.jinja", "chat_template.json"))
        if not template and not settings.get("chat_template"):
            return Fault("its tokenizer has no chat template", "take an instruct model")
        return None


def _architecture_fault(config: dict[str, Any]) -> Fault | None:
    """What of a config.json keeps transformers from building its model, or us from using it.

    Asks transformers' own tables; importing those takes seconds, which loading the model spends anyhow.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES and config.get("auto_map"):
        return Fault(
            "an architecture with code of its own (auto_map in config.json), which is never run here",
            "take a model that transformers knows itself",
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        return Fault(
            f"config.json: model_type {kind!r} is unknown to the installed transformers",
            "correct it, or `pip install -U transformers`",
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Fault(f"{kind} is no causal language model", "take one that continues texts")
    layers = (config.get("text_config") or config).get("layer_types") or []
    if kind in STATEFUL or any("linear" in str(layer) for layer in layers):
        return stateful_fault(kind)
    return None


def stateful_fault(kind: str) -> Fault:
    """Of an architecture that keeps a running state, as state-space models do."""
    return Fault(
        f"{kind} keeps a running state, which pictures that share a prompt cannot share",
        "take a transformer without state-space or linear-attention layers",
    )


def cached(repo: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a hub repository in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, name, revision=revision)
    except HFValidationError:  # a text that is no repository's name
        return None
    return Path(found) if isinstance(found, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises Damaged when the file holds none."""
    refuse_pointer(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise Damaged(f"{path.name}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise Damaged(f"{path.name}: no JSON object")
    return values


def check_tokenizer(path: Path) -> None:
    """Raises Damaged when a tokenizer.json cannot be read."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise Damaged(f"{path.name}: not a tokenizer ({' '.join(str(error).split())[:160]})") from None


def check_safetensors(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file; raises Damaged when it is not one, or not whole."""
    refuse_pointer(path)
    try:
        names, expected = safetensors_table(path)
    except EOFError:
        raise Damaged(f"{path.name}: cut off, in its header") from None
    except ValueError:
        raise Damaged(f"{path.name}: not a safetensors file") from None
    if (size := path.stat().st_size) != expected:
        raise Damaged(f"{path.name}: {'cut off, ' if size < expected else ''}{size:,} of {expected:,} bytes")
    return names
