"""Adapters: the thesis's sizes, shapes, and what is saved comes back."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pipeline import devices
from pipeline.adapters.base import Architecture
from pipeline.adapters.blocks import Attention, Mixture
from pipeline.adapters.module import build_adapter, load_adapter, pool_grid
from pipeline.errors import UserError

OWN = """
from torch import nn

from pipeline.adapters.base import Architecture, ArchitectureSettings
from pipeline.config.base import Positive


class Settings(ArchitectureSettings):
    rank: Positive = 2


class LowRank(Architecture):
    Settings = Settings

    def body(self, d_in, d_out):
        return nn.Linear(d_in, self.settings.rank, bias=False), self.settings.rank
"""


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("linear", 2_101_248, 255),
        ("mlp", 37_761_024, 255),
        ("self_attention", 14_711_808, 255),
        ("query", 18_983_936, 128),
    ],
)
def test_thesis_sizes(name, parameters, tokens):
    with torch.device("meta"):
        adapter = build_adapter(name, 512, 4096)
        assert sum(p.numel() for p in adapter.parameters()) == parameters
        assert adapter(torch.empty(2, 255, 512)).shape == (2, tokens, 4096)
    architecture = Architecture.of(name, {})
    assert architecture.tokens(255) == tokens
    assert architecture.parameters(512, 4096) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("name", ["linear", "mlp", "self_attention", "query"])
def test_gradients_reach_every_parameter(name):
    adapter = build_adapter(name, 16, 24)
    adapter(torch.randn(3, 9, 16)).square().sum().backward()
    # A key bias shifts all scores of a query alike, so softmax leaves it without a gradient.
    silent = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in silent if not n.endswith("k.bias")] == []


def test_queries_start_like_bert():
    assert build_adapter("query", 64, 32).body.queries.std().item() == pytest.approx(0.02, rel=0.1)


def test_attention_equals_torch_multihead():
    ours, theirs = Attention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.k.weight, ours.v.weight])
    theirs.in_proj_bias.data = torch.cat([ours.q.bias, ours.k.bias, ours.v.bias])
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, y = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x, y), theirs(x, y, y)[0])


@pytest.mark.parametrize("is_mixture", [False, True])
@pytest.mark.parametrize("name", ["linear", "mlp", "self_attention", "query"])
def test_training_in_mixed_precision_is_training_in_float32(
    name: str, is_mixture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CPU with bfloat16 arithmetic computes: tokens and gradients are those of float32, but for its rounding."""
    adapter, images = build_adapter(name, 32, 48), torch.randn(4, 9, 32)
    if is_mixture:
        adapter.mix(torch.randn(20, 48) + 3)  # a mean that is large beside what they differ by

    def trained(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(devices, "pick_dtype", lambda *_: dtype)
        adapter.zero_grad()
        tokens = adapter.trained(images)
        tokens.square().sum().backward()
        assert {one.grad.dtype for one in adapter.parameters()} == {torch.float32} == {tokens.dtype}
        return tokens, torch.cat([one.grad.flatten() for one in adapter.parameters()])

    for exact, mixed in zip(trained(torch.float32), trained(torch.bfloat16), strict=True):
        assert 0 < (mixed - exact).norm() / exact.norm() < 0.02


def test_attention_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention
    spy = lambda *tensors: seen.append({one.dtype for one in tensors}) or attend(*tensors)  # noqa: E731
    monkeypatch.setattr("pipeline.adapters.blocks.F.scaled_dot_product_attention", spy)
    monkeypatch.setattr(devices, "pick_dtype", lambda *_: torch.bfloat16)
    build_adapter("query", 32, 48).trained(torch.randn(2, 9, 32))
    assert seen and all(types == {torch.float32} for types in seen)


@pytest.mark.parametrize(
    ("capabilities", "used", "dtype"),
    [
        ({"avx512_bf16": True}, "AVX512", torch.bfloat16),
        ({"amx_bf16": True}, "AVX512", torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": True}, "AVX2", torch.float32),  # as ATEN_CPU_CAPABILITY=avx2 has it
        ({"avx512_f": True}, "AVX512", torch.float32),
        ({"bf16": True}, "DEFAULT", torch.bfloat16),  # ARM
        ({}, "DEFAULT", torch.float32),
    ],
)
def test_a_processors_own_arithmetic_is_taken(
    capabilities: dict[str, bool], used: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert devices.pick_dtype("auto", devices.CPU) == dtype
    assert devices.mixed_precision(devices.CPU)._enabled == (dtype == torch.bfloat16)


def test_pooling_averages_the_grid():
    grid = torch.arange(16.0).view(1, 4, 4)
    pooled = pool_grid(grid.view(1, 16, 1), 2)
    expected = grid.view(1, 2, 2, 2, 2).mean((2, 4)).view(1, 4, 1)
    torch.testing.assert_close(pooled, expected)
    with pytest.raises(UserError, match="no square grid"):
        pool_grid(torch.zeros(1, 255, 4), 3)


@pytest.mark.parametrize("name", ["linear", "mlp", "self_attention", "query"])
def test_constant_start_is_nearly_image_blind_at_first(name):
    adapter = build_adapter(name, 8, 16, pool=2, **({"queries": 4} if name == "query" else {})).eval()
    constant, tokens = 0.13 * torch.randn(4, 16), torch.randn(5, 16, 8)
    adapter.start_at(constant, tokens)
    out = adapter(tokens)
    assert 0.01 * constant.std() < (out - constant).std() < 0.15 * constant.std()


def test_positions_tell_equal_tokens_apart():
    adapter = build_adapter("mlp", 8, 6, pool=2, positions=4)
    plain = build_adapter("mlp", 8, 6, pool=2)
    plain.load_state_dict({"body.0.weight": adapter.body[0].weight, "body.0.bias": adapter.body[0].bias,
                           "out.weight": adapter.out.weight, "out.bias": adapter.out.bias})  # fmt: skip
    alike = torch.randn(3, 1, 8).expand(-1, 16, -1)
    torch.testing.assert_close(adapter(alike), plain(alike))  # at first they change nothing
    (adapter(alike) * torch.arange(4.0)[:, None]).sum().backward()
    torch.optim.SGD(adapter.parameters(), 0.1).step()
    out = adapter(alike)
    assert all((out[:, i] - out[:, j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    with pytest.raises(UserError, match="positions is 4, but the adapter has 9 tokens"):
        build_adapter("mlp", 8, 6, positions=4)(torch.randn(1, 9, 8))


@pytest.mark.parametrize("name", ["linear", "mlp", "self_attention", "query"])
def test_mixtures_of_words_are_trained_and_come_back(name, tmp_path):
    adapter, words = build_adapter(name, 16, 24), torch.randn(11, 24)
    tokens = torch.randn(3, 9, 16)
    adapter.start_at(torch.randn(*adapter(tokens).shape[1:]), tokens)
    free = adapter.eval()(tokens)
    adapter.mix(words)
    mixed, shares = adapter(tokens), adapter.mixture.weights(free)
    assert (shares >= 0).all() and not torch.allclose(mixed, free, atol=0.1)
    torch.testing.assert_close(shares.sum(2), torch.ones(shares.shape[:2]))
    torch.testing.assert_close(mixed, shares @ words)
    mixed.square().sum().backward()
    assert adapter.mixture.log_temperature.grad.abs() > 0 and adapter.out.weight.grad.abs().sum() > 0
    assert not any("words" in key for key, _ in adapter.named_parameters())
    with torch.no_grad():
        adapter.mixture.log_temperature += 0.3
    adapter.save(tmp_path, "last")
    torch.testing.assert_close(load_adapter(tmp_path, "last")(tokens), adapter(tokens), rtol=0, atol=0)


def test_a_mixture_of_a_word_begins_as_that_word():
    words = torch.randn(300, 64) + torch.randn(64)  # as an LLM's, they share a direction
    assert Mixture(words).weights(words[None])[0].diagonal().mean() > 0.9


@pytest.mark.parametrize("with_offset", [False, True])
def test_save_and_load(tmp_path, with_offset):
    adapter = build_adapter("query", 8, 6, width=4, queries=3, heads=2).eval()
    if with_offset:
        adapter.start_at(torch.randn(3, 6), torch.randn(2, 9, 8))
    adapter.save(tmp_path, "last")
    tokens = torch.randn(2, 9, 8)
    torch.testing.assert_close(load_adapter(tmp_path, "last")(tokens), adapter(tokens), rtol=0, atol=0)


def test_an_own_architecture_is_a_class_of_settings_and_body(project, monkeypatch):
    (project / "own_adapters.py").write_text(OWN)
    monkeypatch.syspath_prepend(project)
    architecture = {"kind": "own_adapters:LowRank", "rank": 3, "pool": 2}
    adapter = build_adapter("own_adapters:LowRank", 8, 6, **architecture).eval()
    adapter.save(project / "saved", "last")
    tokens = torch.randn(2, 9, 8)
    found = load_adapter(project / "saved", "last")(tokens)
    assert found.shape == (2, 4, 6)
    torch.testing.assert_close(found, adapter(tokens), rtol=0, atol=0)
    of_params = Architecture.of("own_adapters:LowRank", architecture)
    assert of_params.tokens(9) == 4
    assert of_params.parameters(8, 6) == sum(p.numel() for p in adapter.parameters())
    with pytest.raises(UserError, match=r"architecture\.rank is 0: should be greater than 0"):
        build_adapter("own_adapters:LowRank", 8, 6, rank=0)


def test_faults_are_named(tmp_path):
    with pytest.raises(UserError, match=r"architecture\.hiden is 3: unknown key; did you mean hidden\?"):
        build_adapter("mlp", 8, 6, hiden=3)
    with pytest.raises(UserError, match=r"architecture\.width is 10: should be a multiple of heads, 4"):
        build_adapter("self_attention", 8, 6, width=10)
    with pytest.raises(UserError, match="width 10 is not a multiple of heads 4"):
        build_adapter("self_attention", 10, 6)
    with pytest.raises(UserError, match="kind is conv: should be 'linear', 'mlp'"):
        build_adapter("conv", 8, 6)
    with pytest.raises(UserError, match=r"last\.safetensors: cannot be loaded"):
        load_adapter(tmp_path, "last")
    build_adapter("mlp", 8, 6).save(tmp_path, "last")
    path = tmp_path / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"last\.safetensors: cannot be loaded"):
        load_adapter(tmp_path, "last")


@pytest.mark.parametrize("content", ["[]", "null", '{"name": "mlp", "d_in": 4, "d_out": 4, "architecture": null}'])
def test_a_damaged_description_is_one_line(project: Path, content: str) -> None:
    build_adapter("linear", 4, 4).save(project / "adapter", "last")
    (project / "adapter/adapter.json").write_text(content)
    with pytest.raises(UserError, match="cannot be loaded as an adapter"):
        load_adapter(project / "adapter", "last")


def test_an_adapter_from_elsewhere_runs_no_code_that_the_parameters_do_not_name(project: Path) -> None:
    (project / "sneaky.py").write_text("raise SystemExit('run')")
    build_adapter("linear", 4, 4).save(project / "adapter", "last")
    config = json.loads((project / "adapter/adapter.json").read_text()) | {"name": "sneaky:Adapter"}
    (project / "adapter/adapter.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter\.json: is of the class sneaky:Adapter, which params\.yaml does not"):
        load_adapter(project / "adapter", "last")
    assert "sneaky" not in sys.modules
