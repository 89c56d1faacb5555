"""The model at the service of many requests at once."""

from __future__ import annotations

import base64
import io
import sys
import threading
import time
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipeline.answers.best import NAMES_ALONE, finetuned, namers, pretrained, taught_names_alone
from pipeline.answers.familiar import unlike
from pipeline.answers.model import Answer, Ask, Model
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.media.pictures import FORMATS, decode

Event = dict[str, Any]
"""One part of an answer as JSON; "event" says which."""
# What is said of a picture, in the order in which it is found out: the first without the LLM.
WAYS: dict[str, Callable[[Model], Ask]] = {
    "names": lambda model: model.names(),
    "emd": lambda model: model.names(rule="emd"),
    "caption": lambda model: model.captions(),
    "before": lambda model: model.captions(trained=False),
    "classes": lambda model: model.names(llm=True),
}
WITHOUT_LLM = ("names", "emd")
# The task whose data sets each is learned from, and what a run without such is told.
TASKS = {"names": "classify", "emd": "classify", "caption": "caption", "before": "caption", "classes": "classify"}
UNTAUGHT = {
    "classify": "it was trained on pictures without classes",
    "caption": "it was trained on pictures without captions",
}
MOST_PIXELS = 50_000_000
LONGEST_QUESTION = 1000  # characters
SHOWN = 900  # pixels of the longer side of what is sent back


class _Gone(Exception):
    """Whoever asked has left."""


class Desk:
    """Answers about pictures; any thread may ask. One at a time has the LLM, and names need not wait for it."""

    def __init__(self, model: Model):
        self.model = model
        tasks = tasks_of(model.params)
        self.ways = [way for way, task in TASKS.items() if task in tasks]  # what the run was trained for, done or not
        self._asks: dict[str, Ask] = {}
        self._making, self._turn = threading.Lock(), threading.Lock()

    def warm(self) -> None:
        """Load what the first answer needs; what is not there yet is told when it is asked for."""
        missing = lacking(self.model.params)
        self.model.trained_on(b"")  # before the LLM is loaded, for which its list would wait
        for way in (way for way in self.ways if way not in missing):
            try:
                ask = self._ask(way)
                if way in WITHOUT_LLM:
                    ask(self.model.encode([Image.new("RGB", (64, 64), "grey")]))
            except UserError as fault:
                print(f"{way}: {fault}", file=sys.stderr)

    def answer(self, content: bytes) -> Generator[Event, None, None]:
        """All that is said of a picture, part by part; nothing of it is kept.

        Raises ValueError with the reason before the first part, where it is no picture that is wanted.
        """
        picture = checked(content)
        tokens = self.model.encode([content])
        return self._parts(picture, tokens, self.model.trained_on(content))

    def ask(self, content: bytes, question: str) -> Generator[Event, None, None]:
        """The answer to a question as it grows: events "text", then "answer". Raises as `answer`, and UserError."""
        if len(question) > LONGEST_QUESTION:
            raise UserError("", f"the question has {len(question)} characters", f"at most {LONGEST_QUESTION} are read")
        checked(content)
        return self._said(self.model.encode([content]), question)

    def _parts(self, picture: Image.Image, tokens: Tensor, known: bool | None) -> Generator[Event, None, None]:
        yield {
            "event": "picture", "width": picture.width, "height": picture.height, "uri": data_uri(picture),
            "trained_on": known,
        }  # fmt: skip
        for way in self.ways:
            if way not in WITHOUT_LLM and self._turn.locked():
                yield {"event": "waiting", "for": way}
            yield self._part(way, tokens)

    def _part(self, way: str, tokens: Tensor) -> Event:
        began = time.perf_counter()
        try:
            if way in WITHOUT_LLM:
                [answer] = self._ask(way)(tokens)
            else:
                with self._turn:
                    [answer] = self._ask(way)(tokens)
        except UserError as fault:
            return {"event": way, "missing": str(fault)}
        return {"event": way, **as_json(answer), "seconds": round(time.perf_counter() - began, 2)}

    def _ask(self, way: str) -> Ask:
        """Made once: finding out which adapter answers waits for the LLM to be free."""
        if way not in self._asks:
            with self._making:
                if way not in self._asks:
                    self._asks[way] = WAYS[way](self.model)
        return self._asks[way]

    def _said(self, tokens: Tensor, question: str) -> Generator[Event, None, None]:
        """Made in a thread of its own, which stops after the next token where nobody listens any more."""
        said, gone = SimpleQueue[Event | None](), threading.Event()

        def on_text(text: str) -> None:
            if gone.is_set():
                raise _Gone
            said.put({"event": "text", "text": text})

        def work() -> None:
            try:
                with self._turn:
                    on_text("")
                    [answer] = self.model.question(question, on_text)(tokens)
                said.put({"event": "answer", **as_json(answer), "caution": self._caution(answer)})
            except _Gone:
                pass
            except UserError as fault:
                said.put({"event": "answer", "missing": str(fault)})
            except BaseException:
                said.put({"event": "answer", "missing": "a fault of the program, which is in its terminal"})
                raise
            finally:
                said.put(None)

        if self._turn.locked():
            yield {"event": "waiting", "for": "answer"}
        threading.Thread(target=work, daemon=True).start()
        try:
            while (event := said.get()) is not None:
                yield event
        finally:
            gone.set()

    def _caution(self, answer: Answer) -> str | None:
        """What is to be known of answers to questions."""
        alone = answer.recipe and taught_names_alone(self.model.params, answer.adapter, answer.recipe)
        return f"It {NAMES_ALONE}." if alone else None


def tasks_of(params: Params) -> set[str]:
    return {params.data[data].task for data in params.run.data}


def lacking(params: Params) -> dict[str, str]:
    """Which of WAYS a run cannot say anything by, as far as its files tell, and why."""
    found, tasks = {}, tasks_of(params)
    for way, task in TASKS.items():
        try:
            if task not in tasks:
                found[way] = UNTAUGHT[task]
            elif way in WITHOUT_LLM:
                pretrained(params)
            else:
                finetuned(params, task)
        except UserError:
            found[way] = f"no adapter is {'trained' if way in WITHOUT_LLM else 'fine-tuned for them'} yet"
    return found


def offered(params: Params) -> str:
    """What a run can answer and what it cannot, in words."""
    missing = lacking(params)
    untuned = {"caption", "classes"} <= missing.keys()
    why = {
        "names": missing.get("names"),
        "captions": missing.get("caption"),
        "questions": "no adapter is fine-tuned yet" if untuned else None,
    }
    rules = ["EMD"]
    if not why["names"]:
        rules += ["discriminant analysis"] if namers(params) else []
        rules += [] if "classes" in missing else ["the language model"]
    said = {"names": f"names (by {', '.join(rules)})"}
    can = ", ".join(said.get(what, what) for what, reason in why.items() if not reason)
    return "; ".join([can or "nothing yet", *(f"no {what}: {reason}" for what, reason in why.items() if reason)])


def checked(content: bytes) -> Image.Image:
    """A picture that was sent, decoded. Raises ValueError with the reason; of too many pixels by its header alone."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
    except UnidentifiedImageError:
        reason = f"not a picture; {', '.join(FORMATS[:-1])} and {FORMATS[-1]} are read" if content else "empty file"
        raise ValueError(reason) from None
    except Exception:  # whatever a damaged header leads to; `decode` says what
        width = height = 0
    if width * height > MOST_PIXELS:
        raise ValueError(f"too large: {width} x {height} pixels; at most {MOST_PIXELS // 10**6} million are read")
    return decode(content)


def as_json(answer: Answer) -> Event:
    return {
        "text": answer.text, "adapter": answer.adapter, "recipe": answer.recipe, "names": list(answer.names.items()),
        "strangeness": answer.strangeness,
        "warning": unlike(answer.adapter, answer.strangeness) if answer.is_strange else None,
    }  # fmt: skip


def data_uri(picture: Image.Image, side: int = SHOWN) -> str:
    """An RGB picture as a page holds it, JPEG, no side longer than `side`."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(picture, side)).decode()


def jpeg(picture: Image.Image, side: int) -> bytes:
    file = io.BytesIO()
    small = picture.copy()
    small.thumbnail((side, side))
    small.save(file, "JPEG", quality=88)
    return file.getvalue()
