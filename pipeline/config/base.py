"""What sections of params.yaml are made of: closed, typed models, and the types of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError


def _not_empty(path: object) -> object:
    """An empty text would silently be the current folder."""
    if path == "":
        raise ValueError("name the folder; the current one is .")
    return path


def whole(value: object) -> object:
    """4e3 is as good a count as 4000: YAML knows no whole number in that notation."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# A number in quotes is a text to every key, so that what one of them takes, all do, and DVC sees the same.
Whole = Annotated[int, BeforeValidator(whole), Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[Whole, Field(gt=0)]
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]
NotNegative = Annotated[Number, Field(ge=0)]
AboveZero = Annotated[Number, Field(gt=0)]
Rate = Annotated[Number, Field(gt=0, le=1)]
Share = Annotated[Number, Field(ge=0, lt=1)]
# What texts have to match, and the same in words.
NOT_BLANK = r"\S"
PROFILE, KEY, DEVICE = r"^[A-Za-z0-9_-]+$", r"^[A-Za-z][A-Za-z0-9_]*$", r"^(auto|cpu|mps|cuda(:\d+)?)$"
IN_WORDS = {
    NOT_BLANK: "should not be empty",
    PROFILE: "should be of the letters A to Z, digits, _ and - alone",
    KEY: "should be of the letters A to Z, digits and _ alone, and begin with a letter",
    DEVICE: "should be auto, cpu, mps, cuda or, of several, cuda:1",
}
Folder = Annotated[Path, BeforeValidator(_not_empty)]
Name = Annotated[str, StringConstraints(min_length=1, pattern=NOT_BLANK)]
Prompt = Annotated[str, StringConstraints(min_length=1)]


class Section(BaseModel):
    """A section of params.yaml: immutable, typed, closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        """No parameter is a boolean, and pydantic would take true for 1."""
        if isinstance(value, bool):
            raise ValueError("a number or a text is expected here; a text like true or yes needs quotes")
        return value


def fault_at(where: tuple[str, ...], message: str, value: Any = None) -> PydanticCustomError:
    """A fault of the key `where`, from the root of the file, found by a check that sees more than one section."""
    return PydanticCustomError("elsewhere", "{message}", {"where": where, "message": message, "value": value})
