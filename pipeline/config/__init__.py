"""params.yaml: its sections (schema, params), the parts it names (components), what is wrong with one (faults)."""

from pipeline.config.faults import check_project, keys_of, load_params, parse_params, reads_text
from pipeline.config.params import Params
from pipeline.config.schema import LLM, Vision
from pipeline.config.yaml12 import read_yaml

__all__ = [
    "LLM", "Params", "Vision", "check_project", "keys_of", "load_params", "parse_params", "read_yaml", "reads_text",
]  # fmt: skip
