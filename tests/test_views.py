"""Several views of a picture: what is kept of them, that training draws them, and that nothing else does."""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset
import yaml
from PIL import Image, ImageOps
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from typer.testing import CliRunner

from pipeline import versions
from pipeline.adapters.module import load_adapter
from pipeline.config import load_params, parse_params
from pipeline.encoders.base import Encoder
from pipeline.encoders.vision import load_vision_encoder
from pipeline.errors import UserError
from pipeline.extraction.images import extract_images
from pipeline.extraction.views import crop, flip, views_of
from pipeline.media.decoding import padded
from pipeline.media.pictures import decode
from pipeline.naming import fit
from pipeline.naming.classes import class_names, labelled, numbers
from pipeline.naming.discriminant import Discriminant, cross_fitted
from pipeline.naming.namer import Namer
from pipeline.objectives import closed_form
from pipeline.objectives.base import Means
from pipeline.objectives.closed_form import fit_closed_form
from pipeline.objectives.emd import EMD, EMDSettings
from pipeline.objectives.pairs import Pairs
from pipeline.origin import check_encoder, check_tokens
from pipeline.plan import costs
from pipeline.plan.calibrate import Vision
from pipeline.plan.estimate import Machine
from pipeline.plan.rows import Rows
from pipeline.runs import Run
from pipeline.store.dtypes import pack, unpack
from pipeline.store.inventory import verify
from pipeline.store.reader import CaptionTokens, ImageTokens, drawn_views
from pipeline.store.schema import fingerprint, views_in
from pipeline.store.shards import Manifest, open_shard
from pipeline.store.webdataset import export, identity, open_tars
from pipeline.tasks.base import Task
from pipeline.training import loop
from pipeline.training.finetune import Examples, finetune
from pipeline.training.pretrain import pretrain
from stages import cli

VIEWS = ["flip", "crop"]
RUN = Run("tiny")


class Counting:
    """Tokens that are pixels, and how many pictures were asked for."""

    def __init__(self):
        self.identity, self.seen = {"encoder": "counting"}, list[int]()  # of each batch: they are encoded side by side

    @property
    def pictures(self):
        return sum(self.seen)

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.resize((8, 8)), np.uint8)).permute(2, 0, 1)

    def encode(self, pixels):
        self.seen.append(int(pixels.flatten(1).any(1).sum()))
        return pixels.float().flatten(2).transpose(1, 2) / 7


def of_views(params, views, dtype="float16", shards=3):
    vision, cache = params.vision, params.cache
    changed = {"vision": vision.model_copy(update={"views": views})}
    return params.model_copy(update=changed | {"cache": cache.model_copy(update={"dtype": dtype, "shards": shards})})


def extract(params, data="classes", encoder=None):
    manifest = extract_images(params, data, encoder or Counting(), lambda n: None)
    manifest.write(RUN.features("images", data))
    return manifest, ImageTokens.open(RUN, data)


def all_of(images, view=0):
    return images.tokens(list(range(len(images))), views=[view] * len(images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_project):
    """A project whose pictures have three views, with features of both data sets by a random timm network."""
    found = tmp_path_factory.mktemp("views")
    with pytest.MonkeyPatch.context() as patch:
        tiny_project(found, patch)
        values = yaml.safe_load(Path("params.yaml").read_text())
        values["vision"] |= {"views": VIEWS, "model": "test_resnet"}
        values["data"]["captions"]["count"] = 24
        values["run"] |= {"adapters": ["mlp"], "scratch": []}
        values["pretrain"] |= {"epochs": 2, "batch": 16, "objective": {"cost": "euclidean", "word_weights": "uniform"}}
        values["pretrain"]["objective"] |= {"start": "closed_form"}
        values["finetune"]["recipes"]["classes"] |= {"hints": 0, "decoys": 0}
        Path("params.yaml").write_text(yaml.safe_dump(values))
        for command in ("prepare", "extract-images", "extract-captions"):
            for data in ("captions", "classes"):
                done = CliRunner().invoke(cli.app, [command, data], catch_exceptions=False)
                assert done.exit_code == 0, done.output
        pretrain(load_params(), "mlp")
    return found


@pytest.fixture
def params(folder):
    """Its parameters; what a test changes of the features is put back."""
    with contextlib.chdir(folder):
        kept = {path: path.read_bytes() for path in Path("data/tiny").glob("images/*/manifest.json")}
        yield load_params()
        for path, content in kept.items():
            path.write_bytes(content)


def test_the_plain_picture_keeps_its_bits_and_the_others_are_what_their_names_say(params):
    encoder = load_vision_encoder(params.vision)
    viewed, images = Manifest.read(RUN.features("images", "classes")), ImageTokens.open(RUN, "classes")
    plain, alone = extract(of_views(params, []), encoder=encoder)
    assert images.others == VIEWS and alone.others == [] and images.shape == alone.shape
    assert torch.equal(all_of(images), all_of(alone)) and torch.equal(images.tokens([3, 1]), alone.tokens([3, 1]))
    pictures = [decode(Path(name).read_bytes()) for name in images.rows["image"][:4]]
    mirrored = padded([encoder.preprocess(picture).flip(-1) for picture in pictures], params.vision.batch)
    found = images.tokens([0, 1, 2, 3], views=[1] * 4)
    torch.testing.assert_close(found, encoder.encode(mirrored)[:4], rtol=1e-2, atol=1e-2)
    assert (found - images.tokens([0, 1, 2, 3])).norm() > 0.1 * found.norm()
    mixed = images.tokens([5, 2, 5], views=[2, 0, 1])
    assert torch.equal(mixed, torch.stack([all_of(images, 2)[5], all_of(images)[2], all_of(images, 1)[5]]))
    assert sum(s.bytes for s in viewed.shards) > 2.8 * sum(s.bytes for s in plain.shards)


def test_without_views_nothing_is_named_otherwise_than_before(params):
    encoder = Counting()
    manifest, _ = extract(of_views(params, []), encoder=encoder)
    by = Encoder.of(params.vision).decoder(encoder.preprocess, torch.device("cpu")).identity
    known = {"stored": "float16", "batch": params.vision.batch, "version": versions.IMAGES}
    assert manifest.fingerprint == fingerprint(**encoder.identity, **by, **known)
    assert b"views" not in open_shard(manifest.folder / manifest.shards[0].name).schema.metadata
    prints = {extract(of_views(params, views))[0].fingerprint for views in ([], ["flip"], ["crop"], VIEWS)}
    assert len(prints) == 4


def test_views_of_pixels_are_those_of_the_picture():
    picture = Image.effect_noise((64, 48), 60).convert("RGB").resize((64, 48), Image.Resampling.BOX)
    of = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # noqa: E731
    assert torch.equal(flip(of(picture)), of(ImageOps.mirror(picture)))
    middle = picture.crop((4, 3, 60, 45)).resize((64, 48), Image.Resampling.BILINEAR)
    off = crop(of(picture)).int() - of(middle).int()
    assert off.abs().max() <= 1 and crop(of(picture)).dtype == torch.uint8
    in_float = crop(of(picture).double().float() / 255)
    torch.testing.assert_close(in_float * 255, crop(of(picture)).float(), atol=0.51, rtol=0)
    batch = torch.cat([of(picture), of(picture).flip(1)])
    assert [len(view) for view in views_of(batch, VIEWS)] == [2, 2, 2]
    assert torch.equal(crop(batch)[:1], crop(of(picture))), "whatever is beside it"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_views_come_back_in_every_type_also_from_tars(dtype, params):
    params = of_views(params, VIEWS, dtype)
    _, images = extract(params)
    encoder = Counting()
    pixels = torch.stack([encoder.preprocess(decode(Path(name).read_bytes())) for name in images.rows["image"]])
    for number, view in enumerate(views_of(pixels, VIEWS)):
        expected = unpack(pack(encoder.encode(view), dtype), dtype)
        assert torch.equal(all_of(images, number), expected)
    tars = Path("exported") / dtype
    export(images, CaptionTokens.open(RUN, "classes"), identity(RUN, "classes"), tars / "classes", 20, lambda n: None)
    cache = params.cache.model_copy(update={"tars": str(tars)})
    again, _ = open_tars(params.model_copy(update={"cache": cache}), "classes")
    assert again.others == VIEWS
    for number in range(3):
        assert torch.equal(all_of(again, number), all_of(images, number))
    first = str(next((tars / "classes").glob("train-*.tar")))
    for sample in webdataset.WebDataset(first, shardshuffle=False).decode():
        at = images.ids.index(sample["__key__"].replace("%2E", "."))
        np.testing.assert_array_equal(sample["tokens.npy"], images.tokens([at])[0])
        np.testing.assert_array_equal(sample["flip.npy"], images.tokens([at], views=[1])[0])


def test_rows_are_copied_with_their_views_and_damage_is_found(params):
    first, images = extract(of_views(params, VIEWS))
    encoder = Counting()
    second, again = extract(of_views(params, VIEWS, shards=2), encoder=encoder)
    alone = 3 * (params.vision.batch + 1)  # pictures that show whether rows stand alone
    assert encoder.pictures == alone and first.fingerprint == second.fingerprint
    assert all(torch.equal(all_of(again, view), all_of(images, view)) for view in range(3))
    assert verify("tiny") == []
    shard = second.folder / second.shards[0].name
    content, at = shard.read_bytes(), len(shard.read_bytes()) // 2
    shard.chmod(0o644)
    shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert [fault.path for fault in verify("tiny")] == [shard]
    shard.write_bytes(content)
    table = open_shard(shard)
    wrong = table.replace_schema_metadata({**table.schema.metadata, b"views": b"flip"})
    assert views_in(wrong.schema) == ["flip"]
    with pa.ipc.new_file("wrong.arrow", wrong.schema) as writer:
        writer.write_table(wrong)
    with pytest.raises(UserError, match="of another schema"):
        open_shard(Path("wrong.arrow"))


def test_training_draws_views_and_nothing_else_does(params):
    images, pairs = ImageTokens.open(RUN, "classes"), Pairs.open(params, params.pretrain_for("mlp"))
    task = Task.of("classify", params.evaluate)
    examples = Examples(images, "classes", task, params.finetune.recipes["classes"], 0)
    some = examples.train[:12]
    drawn, *_ = examples.draw(list(range(12)))
    views = torch.stack([images.tokens(some, views=[view] * 12) for view in range(3)])
    which = (drawn == views).flatten(2).all(2)  # [3, 12]
    assert which.any(0).all() and which.any(1).sum() == 3
    assert torch.equal(examples.fixed(some)[0], views[0])
    held = pairs.train[:12]
    drawn = [pairs.drawn(held) for _ in range(2)]
    assert pairs.views == 3 and not torch.equal(*drawn)
    sets = {at: ImageTokens.open(RUN, data) for data, at in zip(params.pretrain.data, pairs.starts, strict=True)}
    images, start = next((sets[at], at) for at in sorted(sets, reverse=True) if at <= held[0])
    views = torch.stack([images.tokens([i - start for i in held], views=[view] * 12) for view in range(3)])
    assert (drawn[0] == views).flatten(2).all(2).any(0).all() and torch.equal(pairs.tokens(held), views[0])


def test_where_there_is_one_view_no_random_number_is_drawn():
    state = torch.get_rng_state()
    assert drawn_views(1, 50) is None and torch.equal(torch.get_rng_state(), state)
    table = torch.randn(4, 5)
    pairs = Pairs(lambda some: table[some][:, None], [[[i]] for i in range(4)], table, [0, 1, 2, 3], [0, 1], [2, 3], 4)
    state = torch.get_rng_state()
    assert torch.equal(pairs.drawn([2, 1]), table[[2, 1]][:, None]) and torch.equal(torch.get_rng_state(), state)
    assert set(drawn_views(3, 100)) == {0, 1, 2}


def breaking(draw, at, seen):
    """Draws that are kept in `seen`, and break off at the `at`-th."""

    def drawn(self, some):
        found = draw(self, some)
        if len(seen) + 1 == at:
            raise KeyboardInterrupt
        seen.append(found if isinstance(found, torch.Tensor) else found[0])
        return found

    return drawn


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_resumed_training_draws_what_an_uninterrupted_one_does(stage, params, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    drawing, name = (Pairs, "drawn") if stage == "pretrain" else (Examples, "draw")
    draw = getattr(drawing, name)

    def run(at=None):
        seen = []
        monkeypatch.setattr(drawing, name, breaking(draw, at, seen))
        pretrain(params, "mlp") if stage == "pretrain" else finetune(params, "mlp", "classes")
        out = RUN.pretrained("mlp") if stage == "pretrain" else RUN.finetuned("mlp", "classes")
        return seen, load_adapter(out, "last" if stage == "pretrain" else "adapter").state_dict()

    whole, weights = run()
    with pytest.raises(KeyboardInterrupt):
        run(at=3)
    rest, resumed = run()
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[2:], strict=True))
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)


def test_the_discriminant_learns_from_all_views_of_a_picture(params, monkeypatch):
    monkeypatch.setattr(fit, "choose_shrinkage", lambda *_: 0.3)
    named = fit.fit_namer(params, "mlp", "classes")
    namer = Namer.load(RUN.named("mlp") / "classes", 1)
    images = ImageTokens.open(RUN, "classes")
    names, test = class_names(images), labelled(images, "test")

    def features(positions, view=0):
        means = images.tokens(positions, views=[view] * len(positions)).mean(1)
        return (means.sign() * means.abs().sqrt()).double().numpy()

    seen = [*labelled(images, "train"), *labelled(images, "val")]
    known = np.concatenate([features(seen, view) for view in range(3)])
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(known, numbers(images, seen, names) * 3)
    found = namer.discriminant.scores(images.tokens(test))
    np.testing.assert_allclose(found.exp().numpy(), reference.predict_proba(features(test)), atol=2e-3)
    assert len(named.rows) == len(seen) + len(test)


def test_all_views_of_a_picture_are_in_its_fold():
    rng = np.random.default_rng(0)
    own, folds = np.arange(24) % 3, np.arange(24) // 6
    known = rng.normal(size=(48, 10)) + 2 * rng.normal(size=(3, 10))[np.tile(own, 2)]
    found = cross_fitted(known, own.tolist(), folds, 3, 0.2)
    for fold in range(4):
        rest = np.flatnonzero(folds != fold)
        model = Discriminant.fit(known[[*rest, *(rest + 24)]], [*own[rest], *own[rest]], 3, 0.2)
        expected = model.of_features(torch.from_numpy(known[:24][folds == fold]))
        torch.testing.assert_close(found[folds == fold], expected)


def test_the_closed_form_is_fitted_on_views_as_on_more_pictures(monkeypatch):
    monkeypatch.setattr(closed_form, "RIDGES", (0.1,))
    images, table = torch.randn(2, 40, 4, 8), torch.randn(20, 5)  # two views
    captions = [[[i % 20, (7 * i) % 20]] for i in range(40)]
    settings = EMDSettings(cost="euclidean", word_weights="uniform", start="closed_form", closed_form="ridge")

    def viewed(some, views=None):
        return images[torch.tensor(views or [0] * len(some)), torch.tensor(some)]

    rows, every = list(range(20)), list(range(30))
    own = Pairs(viewed, captions, table, rows, every, list(range(30, 40)), 40, [], [0], 2)
    doubled = images.flatten(0, 1)
    more = Pairs(
        lambda some: doubled[some], captions * 2, table, rows, every + [40 + i for i in every], [30], 80, [], [0]
    )
    found, expected = (fit_closed_form(EMD(settings, pairs, Means(1)), lambda x: x) for pairs in (own, more))
    torch.testing.assert_close(found, expected)
    plain = Pairs(lambda some: images[0, some], captions, table, rows, every, [30], 40, [], [0])
    assert not torch.allclose(found, fit_closed_form(EMD(settings, plain, Means(1)), lambda x: x), atol=1e-2)


def test_an_adapter_of_views_answers_for_single_photos(params):
    encoder, adapter = load_vision_encoder(params.vision), RUN.pretrained("mlp")
    assert (
        check_encoder(adapter, encoder.identity).tokens == Manifest.read(RUN.features("images", "captions")).fingerprint
    )
    check_tokens(adapter, RUN, "captions")
    extract(of_views(params, []), "captions", encoder)
    with pytest.raises(UserError, match="trained on other image tokens"):
        check_tokens(adapter, RUN, "captions")


def test_a_plan_counts_views(params):
    plain = of_views(params, [])
    assert costs.token_bytes(params) == 3 * costs.token_bytes(plain)
    rows = {data: Rows(30, 10, 8, 1, 3.0, 12, True) for data in params.run.data}
    once, thrice = (
        Machine(one, rows, None, Vision(5.0, 1.0, 0.02, 0.01, 0.5, {}, 8e8, {})).estimate("extract_images@classes")
        for one in (plain, params)
    )
    assert thrice.bytes == 3 * once.bytes
    assert (once.work, thrice.work) == (pytest.approx(48 * 0.03), pytest.approx(48 * 0.07))


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("[flip, mirror]", r"vision\.views\.1 is mirror: should be 'flip' or 'crop'"),
        ("[flip, flip]", r"vision\.views is .*: each name once"),
        ("flip", r"vision\.views is flip: should be a list, such as \[flip\]"),
    ],
)
def test_a_view_that_is_none_is_told(value, fault):
    text = (Path(__file__).parent.parent / "profiles/demo.yaml").read_text()
    text = text.replace("vision:\n", f"vision:\n  views: {value}\n", 1)
    with pytest.raises(UserError, match=rf"^params\.yaml:\d+: .*{fault}$"):
        parse_params(text, "params.yaml")
