"""Prompts for engines that serve the LLM alone. The server is a stand-in that checks requests as vLLM's own does."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters.module import build_adapter
from pipeline.config import LLM
from pipeline.errors import UserError
from pipeline.llms.load import load_embedding, load_llm
from pipeline.lmms.photos.utils import process_results
from pipeline.origin import Origin, Words
from pipeline.serving import Prompter, complete
from pipeline.vlm import VLM


class Server(HTTPServer):
    """Greedy answers of a transformers model to prompt embeddings, which it takes as vLLM does.

    vLLM's rules (renderers/embed_utils.py): base64 without stray characters, torch.load of tensors alone, two
    dimensions, the LLM's width, floating point.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.network = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.asked: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        try:
            assert self.path == "/v1/completions" and self.headers["Content-Type"] == "application/json"
            assert self.headers.get("Authorization") in (None, "Bearer secret")
            answers = [self._answer(one, body["max_tokens"]) for one in body["prompt_embeds"]]
            found = {"choices": [{"index": i, "text": text} for i, text in reversed(list(enumerate(answers)))]}
            code = 200
        except (AssertionError, ValueError) as error:
            found, code = {"error": {"message": str(error) or "refused"}}, 400
        content = json.dumps(found).encode()
        self.send_response(code)
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, encoded: str, limit: int) -> str:
        network, tokenizer = self.server.network, self.server.tokenizer
        tensor = torch.load(io.BytesIO(base64.b64decode(encoded, validate=True)), weights_only=True)
        if not (tensor.ndim == 2 and tensor.shape[1] == network.config.hidden_size and tensor.is_floating_point()):
            raise ValueError(f"prompt_embeds of shape {tuple(tensor.shape)}")
        ids = network.generate(inputs_embeds=tensor[None], max_new_tokens=limit, do_sample=False)
        return str(tokenizer.decode(ids[0], skip_special_tokens=True))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tiny_mistral: Path) -> Iterator[Server]:
    with Server(tiny_mistral) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_of_the_llm_alone_answers_about_pictures(tiny_mistral: Path, tmp_path: Path, server: Server) -> None:
    params = LLM(loader="huggingface", model=str(tiny_mistral), dtype="float32", system_prompt="Be brief.")
    adapter = build_adapter("linear", 8, 32).eval()
    adapter.save(tmp_path / "mine", "adapter")
    Origin("", {}, Words.of_module(load_embedding(params))).write(tmp_path / "mine")
    prompter, url = Prompter.load(params, tmp_path / "mine"), f"http://127.0.0.1:{server.server_port}/"
    tokens = torch.randn(3, 4, 8)
    prompts = prompter.embeddings(tokens, "Describe this image", "It may be: a cat.")
    found = complete(url, "tiny", prompts, 6, key="secret", seed=1)
    model = VLM(adapter, load_llm(params, "cpu")).eval()
    assert found == model.generate(tokens, "Describe this image", 6, hints=["It may be: a cat."] * 3)
    [asked] = server.asked
    assert {key: asked[key] for key in ("model", "max_tokens", "temperature", "seed")} == {
        "model": "tiny", "max_tokens": 6, "temperature": 0, "seed": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"400: .*prompt_embeds of shape \(2, 5\).*--enable-prompt-embeds"):
        complete(url, "tiny", [torch.zeros(2, 5)], 6)


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1/completions: cannot be reached .*vllm serve"):
        complete("http://127.0.0.1:9", "tiny", [torch.zeros(2, 5)], 6)


def test_lmms_evals_closed_set_task_takes_the_name_that_costs_least() -> None:
    """As numbers, and as the text that lmms-eval 0.7.3 makes of them."""
    costs = [(3.5, False), (1.25, True), (2.0, False)]
    for given in (costs, [str(one) for one in costs]):
        assert process_results({"label": 1}, given) == {"acc": 1.0}
        assert process_results({"label": 0}, given) == {"acc": 0.0}
