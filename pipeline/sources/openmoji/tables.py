"""What the rendered pictures show and how they are told, from the YAML files beside this one."""

from __future__ import annotations

from importlib import resources
from typing import Any, NamedTuple

import yaml


def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(resources.files(__package__).joinpath(name).read_text("utf-8"))
    return values


class Layout(NamedTuple):
    """How the drawings of a scene lie, and how that is told."""

    centres: list[list[int]]
    """(x, y) of each drawing, in pixels."""
    sizes: list[int]
    """Their smallest and largest size, in pixels."""
    templates: list[str]
    fields: dict[str, str]
    """Words that the templates need."""


def _layouts() -> dict[int, list[Layout]]:
    """The layouts of one, two and three drawings."""
    captions: dict[str, list[str]] = _SCENES["captions"]
    found = {
        1: [
            Layout([centre], sizes, captions["one"], {"place": place, "size": size})
            for place, centre in _SCENES["places"].items()
            for size, sizes in _SCENES["sizes"].items()
        ]
    }
    for count, layouts in _SCENES["layouts"].items():
        found[count] = [
            Layout(one["centres"], one["sizes"], [text for name in one["captions"] for text in captions[name]], {})
            for one in layouts
        ]
    return found


_SCENES, _FOOD = _read("scenes.yaml"), _read("food.yaml")
NOUNS: dict[str, tuple[str, str]] = {noun: (drawing, word) for noun, (drawing, word) in _SCENES["nouns"].items()}
"""Noun -> (drawing, an adjective true of the drawing or "")."""
MASS_NOUNS: list[str] = _SCENES["mass_nouns"]
BACKGROUNDS: dict[str, list[int]] = _SCENES["backgrounds"]
LAYOUTS = _layouts()
FOODS: dict[str, str] = _FOOD["foods"]
"""Display name -> drawing."""
CLUTTER: str = _FOOD["clutter"]
"""Drawings, one a character."""
