"""Parameter files: the committed ones are valid, and a bad one is answered by file, line, key, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from pipeline.config import load_params, parse_params
from pipeline.config.params import merged
from pipeline.errors import UserError
from pipeline.runs import stages

PROJECT = Path(__file__).parents[1]
DEMO = (PROJECT / "profiles" / "demo.yaml").read_text(encoding="utf-8")
EPOCHS = next(line for line in DEMO.splitlines() if line.startswith("  epochs: "))


def line_of(text: str, part: str) -> int:
    """1-based number of the first line that holds `part`."""
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def of_mlp(old: str, new: str) -> str:
    """The demo with one change in adapters.mlp."""
    before, name, after = DEMO.partition("  mlp:\n")
    assert old in after
    return before + name + after.replace(old, new, 1)


def fault_in(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_params(text, "params.yaml")
    return str(caught.value)


def test_the_committed_parameters_are_the_demo_profile() -> None:
    assert (PROJECT / "params.yaml").read_bytes() == (PROJECT / "profiles" / "demo.yaml").read_bytes()


@pytest.mark.parametrize("name", ["photos", "thesis"])
def test_profiles_with_folders_want_only_their_roots(name: str) -> None:
    text = (PROJECT / "profiles" / f"{name}.yaml").read_text(encoding="utf-8")
    faults = fault_in(text).splitlines()
    assert len(faults) == 2
    for data, fault in zip(("captions", "classes"), faults, strict=True):
        assert f"data.{data}.root is null" in fault and f"--set data.{data}.root=FOLDER" in fault
    assert parse_params(text.replace("root: null", "root: pictures"), name).profile == name


def test_thesis_has_the_numbers_of_the_thesis() -> None:
    text = (PROJECT / "profiles" / "thesis.yaml").read_text(encoding="utf-8").replace("root: null", "root: pictures")
    params = parse_params(text, "thesis.yaml")
    assert params.pretrain.epochs == 4  # its batch of 8 would leave a large GPU idle
    assert params.finetune_for("mlp", "captions").epochs == 4
    assert params.finetune_for("query", "captions").epochs == 5
    assert params.finetune_for("mlp", "classes").epochs == 2
    assert params.finetune.lora.model_dump() == {"r": 8, "alpha": 32, "dropout": 0.1, "modules": ["q_proj", "v_proj"]}
    assert params.adapters["query"].architecture == {"width": 512, "blocks": 4, "heads": 4, "queries": 128}


def test_an_adapter_overrides_the_common_values() -> None:
    text = of_mlp("    pretrain: {}\n    finetune: {}", "    pretrain: {lr: 0.5}\n    finetune: {classes: {batch: 3}}")
    params = parse_params(text, "demo")
    assert params.pretrain_for("mlp").lr == 0.5 and params.pretrain_for("query").lr == params.pretrain.lr
    assert (
        params.finetune_for("mlp", "classes").batch == 3
        and params.finetune_for("mlp", "captions").batch
        == load_params(PROJECT / "profiles/demo.yaml").finetune.recipes["captions"].batch
    )


# What stands in demo.yaml, what replaces it, the key the fault must name, and what else it must say.
BAD = {
    "unknown key": ("  candidates: 100", "  candidats: 100", "pretrain.candidats is 100", "did you mean candidates?"),
    "unknown section": ("pca:\n", "pcaa:\n", "pcaa", "did you mean pca?"),
    "missing key": ("seed: 17\n", "", "seed", "missing"),
    "text for a number": (EPOCHS, "  epochs: many", "pretrain.epochs is many", "valid integer"),
    "number in quotes": (EPOCHS, "  epochs: '12'", "pretrain.epochs is '12'", "valid integer"),
    "fraction for a count": ("  batch: 32", "  batch: 2.5", "pretrain.batch is 2.5", "valid integer"),
    "true for a number": ("  batch: 32", "  batch: true", "pretrain.batch is true", "number"),
    "nothing": ("  batch: 32", "  batch:", "pretrain.batch is null", "valid integer"),
    "negative": ("  lr: 0.001", "  lr: -0.001", "pretrain.lr is -0.001", "greater than 0"),
    "not a number": ("  lr: 0.001", "  lr: .nan", "pretrain.lr is .nan", "finite"),
    "too large": ("    dropout: 0.1", "    dropout: 1.5", "finetune.lora.dropout is 1.5", "less than 1"),
    "choice": ("cost: euclidean", "cost: manhattan", "pretrain.objective.cost is manhattan", "'cosine'"),
    "empty prompt": (
        '["What type of food is that?"]',
        '[""]',
        "finetune.recipes.classes.prompts.classes.0 is ''",
        "at least 1",
    ),
    "no prompts": (
        '["What type of food is that?"]',
        "[]",
        "finetune.recipes.classes.prompts.classes is []",
        "at least 1",
    ),
    "unknown adapter": ("  linear:\n", "  lineal:\n", "adapters.lineal", "'linear'"),
    "adapter without section": ("  query:\n    arch", "  linear2:\n    arch", "adapters.linear2", "'query'"),
    "scratch not trained": ("scratch: [self_attention]", "scratch: [linear]", "run.scratch", "run.adapters"),
    "adapter twice": ("adapters: [mlp, self_attention", "adapters: [mlp, mlp", "run.adapters", "once"),
    "architecture key": ("queries: 9,", "querries: 9,", "adapters.query.architecture.querries is 9", "queries"),
    "architecture value": ("queries: 9,", "queries: 0,", "adapters.query.architecture.queries is 0", "greater"),
    "architecture of another": (
        "pool: 3, dropout",
        "queries: 3, dropout",
        "adapters.mlp.architecture.queries",
        "hidden",
    ),
    "width": ("width: 192, blocks", "width: 190, blocks", "self_attention.architecture.width is 190", "multiple of"),
    "rendered without count": ("    count: 4000\n", "", "data.captions.count", "how many"),
    "profile name": ("profile: demo", "profile: ../up", "profile is ../up", "letters A to Z"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_named_with_its_line(case: str) -> None:
    old, new, key, remedy = BAD[case]
    assert old in DEMO
    text = DEMO.replace(old, new, 1)
    fault = fault_in(text)
    assert key in fault and remedy in fault, fault
    if new and case != "adapter without section":
        line = DEMO[: DEMO.index(old)].count("\n") + 1
        assert fault.startswith(f"params.yaml:{line}: "), fault


def test_a_bad_override_is_named_where_it_stands() -> None:
    text = of_mlp("    pretrain: {}", "    pretrain:\n      lr: 7")
    assert fault_in(text).startswith(f"params.yaml:{line_of(text, 'lr: 7')}: adapters.mlp.pretrain.lr is 7: ")
    text = of_mlp("    finetune: {}", "    finetune:\n      classes:\n        epoch: 7")
    assert "adapters.mlp.finetune.classes.epoch is 7: unknown key; did you mean epochs?" in fault_in(text)


def test_every_fault_is_reported_on_its_own_line() -> None:
    faults = fault_in(DEMO.replace(EPOCHS, "  epochs: 0", 1).replace("seed: 17", "seed: -1")).splitlines()
    assert len(faults) == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"task": "caption", "source": "webdataset"}, "needed here: webdataset: tars"),
        (
            {"task": "caption", "source": "webdataset", "shards": "a.tar", "root": "set"},
            "unknown key; known here: count,",
        ),
        ({"task": "caption", "source": "coco", "root": "set", "shards": "a.tar"}, "known here: captions,"),
        ({"task": "classify", "source": "coco", "root": "set"}, "no texts for task classify, only for caption"),
        ({"task": "count", "source": "coco", "root": "set"}, "should be 'caption' or 'classify'"),
        ({"task": "caption", "source": "cocoa", "root": "set"}, "should be 'coco', 'food101'"),
    ],
)
def test_parameters_that_do_not_fit_together(section: dict[str, str], message: str) -> None:
    values = yaml.safe_load(DEMO)
    values["data"]["captions"] = section
    found = fault_in(yaml.safe_dump(values))
    assert message in found and "data.captions." in found and "\n" not in found


def test_names_of_data_sets_and_recipes_fit_together() -> None:
    for old, new, message in (
        (
            "  data: [captions, classes]\n  adapters",
            "  data: [captions, food]\n  adapters",
            "run.data: names food, which",
        ),
        ("  recipes: [captions, classes]", "  recipes: [captions, all]", "run.recipes: names all, which finetune.rec"),
        ("  scratch_recipes: [captions]", "  scratch_recipes: [all]", "run.scratch_recipes: names all, which run.rec"),
        (
            "      data: [captions]",
            "      data: [classes]",
            "prompts has to name exactly the data sets of data: classes",
        ),
        ("  data: captions", "  data: caption", "pca.data: names caption, which run.data does not have"),
        ("  data: [captions, classes]\n  epochs", "  data: [words]\n  epochs", "pretrain.data: names words"),
        (
            "      max_steps: 16\n",
            "      hints: 2\n      max_steps: 16\n",
            "captions.hints: is for data sets with the task",
        ),
        ("      hints: 3 ", "      hints: 11 ", "recipes.classes.hints is 11"),
    ):
        assert old in DEMO
        assert message in fault_in(DEMO.replace(old, new, 1))


def test_a_recipe_may_mix_data_sets() -> None:
    values = yaml.safe_load(DEMO)
    both = {"captions": ["What is this?"], "classes": ["Which food?"]}
    recipe = {**values["finetune"]["recipes"]["captions"], "data": list(both), "prompts": both}
    values["finetune"]["recipes"]["both"] = {**recipe, "mixture": {"captions": 3, "classes": 1}}
    values["run"]["recipes"].append("both")
    params = parse_params(yaml.safe_dump(values), "params.yaml")
    assert params.finetune_for("mlp", "both").mixture == {"captions": 3, "classes": 1}
    values["finetune"]["recipes"]["both"]["mixture"] = {"captions": 3}
    assert "mixture has to name exactly the data sets" in fault_in(yaml.safe_dump(values))


def test_an_override_keeps_to_what_adapters_may_differ_in() -> None:
    text = of_mlp("    pretrain: {}", "    pretrain: {data: [classes]}")
    assert "adapters.mlp.pretrain.data is [classes]: is the same for all adapters" in fault_in(text)
    text = of_mlp("    finetune: {}", "    finetune: {captions: {data: [classes]}}")
    assert "adapters.mlp.finetune.captions.data is [classes]: is the same" in fault_in(text)
    text = of_mlp("    finetune: {}", "    finetune: {captions: {mixture: {captions: 2}}}")
    assert parse_params(text, "params.yaml").finetune_for("mlp", "captions").mixture == {"captions": 2}
    assert "adapters.mlp.pretrain.lr" in fault_in(of_mlp("    pretrain: {}", "    pretrain: {lr: {a: 2}}"))


def test_an_adapter_may_have_an_objective_of_its_own() -> None:
    def of(override: str) -> Any:
        text = of_mlp("    pretrain: {}", f"    pretrain: {override}")
        return parse_params(text, "params.yaml").pretrain_for("mlp")

    demo = parse_params(DEMO, "params.yaml").pretrain
    assert of("{objective: {unmatched: 0.5}}").objective == demo.objective.model_copy(update={"unmatched": 0.5})
    assert of("{objective: {name: emd, unmatched: 0.2}}").objective == demo.objective
    other = of("{epochs: 9, objective: {name: qformer, blocks: 3}}")  # no key of EMD is left
    assert other.objective.model_dump() == {"name": "qformer", "width": 256, "blocks": 3}
    assert other.epochs == 9 and other.batch == demo.batch
    for override, fault in (
        ("{objective: {name: qformer, unmatched: 0.2}}", "objective.unmatched"),
        ("{objective: {name: qformer, width: 100}}", "objective.width is 100"),
        ("{objective: {name: caption_ce, prompt: ''}}", "objective.prompt"),
        (
            "{objective: {name: nonsense}}",
            "objective.name is nonsense: should be 'emd', 'caption_ce', 'qformer', 'mmd'",
        ),
        ("{objective: {name: null}}", "objective.name"),
    ):
        assert f"adapters.mlp.pretrain.{fault}" in fault_in(of_mlp("    pretrain: {}", f"    pretrain: {override}"))


def test_keys_that_dvc_watches_one_by_one_have_to_be_there() -> None:
    for old, key in (("  dtype: float16\n", "cache.dtype"), ("    pretrain: {}\n", "adapters.linear.pretrain")):
        assert f"{key}: this key is missing" in fault_in(DEMO.replace(old, "", 1))


def test_a_task_that_no_data_set_has_needs_no_keys() -> None:
    values = yaml.safe_load(DEMO)
    del values["data"]["captions"], values["finetune"]["recipes"]["captions"]
    values["run"] |= {key: ["classes"] for key in ("data", "recipes", "scratch_recipes")}
    values["pretrain"]["data"], values["pca"] = ["classes"], values["pca"] | {"data": "classes", "recipe": "classes"}
    for key in [key for key in values["evaluate"] if key.startswith(("pretrained", "finetuned"))]:
        del values["evaluate"][key]
    assert parse_params(yaml.safe_dump(values), "params.yaml").evaluate.batch == 64
    del values["evaluate"]["class_prompt"]
    assert "evaluate.class_prompt: this key is missing" in fault_in(yaml.safe_dump(values))


def test_a_misspelt_section_of_finetune_is_not_an_earlier_one() -> None:
    values = yaml.safe_load(DEMO)
    values["finetune"]["recipe"] = values["finetune"].pop("recipes")
    assert "finetune.recipe: unknown key; did you mean recipes?" in fault_in(yaml.safe_dump(values))


def test_keys_of_earlier_files_say_where_they_went() -> None:
    values = yaml.safe_load(DEMO)
    for name, recipe in values["finetune"].pop("recipes").items():
        values["finetune"][name] = recipe | {"prompts": recipe["prompts"][name]}
    del values["run"]["data"], values["run"]["recipes"], values["data"]["captions"]["task"]
    faults = fault_in(yaml.safe_dump(values, sort_keys=False)).splitlines()
    for name in ("captions", "classes"):
        assert any(f"finetune.{name}: moved to finetune.recipes.{name}," in fault for fault in faults)
    for key in ("run.data", "run.recipes", "data.captions.task", "finetune.recipes"):
        assert any(f"{key}: this key is missing" in fault for fault in faults)
    assert len(faults) == 6


def test_a_default_is_read_from_the_file_that_dvc_watches() -> None:
    defaults = yaml.safe_load((PROJECT / "pipeline/config/defaults.yaml").read_text())
    params = parse_params(DEMO, "params.yaml")
    assert params.pretrain.weight_decay == defaults["pretrain"]["weight_decay"]
    assert params.finetune_for("mlp", "captions").clip == defaults["finetune"]["recipe"]["clip"]
    assert params.llm.max_caption_tokens == defaults["llm"]["max_caption_tokens"]


def test_unmatched_mass_needs_an_exact_solver() -> None:
    values = yaml.safe_load(DEMO)
    values["pretrain"]["objective"] |= {"unmatched": 0.1, "solver": "sinkhorn"}
    assert "pretrain.objective: unmatched mass needs an exact solver" in fault_in(yaml.safe_dump(values))


def test_a_key_given_twice_is_refused() -> None:
    text = DEMO.replace(EPOCHS, f"{EPOCHS}\n  epochs: 13", 1)
    assert fault_in(text).startswith(
        f"params.yaml:{line_of(text, 'epochs: 13')}: pretrain.epochs is here for the second"
    )


@pytest.mark.parametrize("text", ["", "- a list\n", "just words\n"])
def test_a_file_that_is_no_mapping(text: str) -> None:
    assert "expected a mapping of sections" in fault_in(text)


def test_broken_yaml_is_named_with_its_line() -> None:
    assert fault_in("seed: 1\nrun: [mlp\n").startswith("params.yaml:3: not valid YAML: ")


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="terraalign profile use demo"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"profile: caf\xe9\n")
    with pytest.raises(UserError, match="cannot be read as text"):
        load_params(tmp_path / "latin.yaml")


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "0.1e-2", ".001", "1.e-3"])
def test_a_number_means_the_same_to_every_key_and_to_dvc(number: str) -> None:
    text = DEMO.replace("  lr: 0.001", f"  lr: {number}", 1).replace("dropout: 0.1", f"dropout: {number}", 1)
    text = text.replace("    pretrain: {}", f"    pretrain: {{lr: {number}}}", 1)
    params = parse_params(text, "params.yaml")
    assert params.pretrain.lr == params.adapters["mlp"].architecture["dropout"] == params.pretrain_for("linear").lr
    assert params.pretrain.lr == YAML(typ="safe").load(f"a: {number}")["a"] == 0.001  # as DVC reads it


def test_a_count_may_be_written_with_an_exponent_and_no_number_in_quotes() -> None:
    text = DEMO.replace("pool: 3, dropout", "hidden: 1e2, dropout", 1).replace("seed: 17", "seed: 2e3")
    params = parse_params(text, "params.yaml")
    assert params.seed == 2000 and params.adapters["mlp"].architecture["hidden"] == 100
    assert type(params.seed) is type(params.adapters["mlp"].architecture["hidden"]) is int
    for key in ("  lr: 0.001", "    alpha: 32"):
        name, value = key.split(": ")
        assert f"{value}': should be a valid" in fault_in(DEMO.replace(key, f"{name}: '{value}'", 1))


def test_a_text_that_yaml_takes_for_something_else_wants_quotes() -> None:
    for value in ("007", "2024-01-01", "1e3"):
        assert "a text is expected here; put it in quotes" in fault_in(
            DEMO.replace("revision: null", f"revision: {value}")
        )
        params = parse_params(DEMO.replace("revision: null", f"revision: '{value}'"), "params.yaml")
        assert params.llm.revision == value
    assert parse_params(DEMO.replace("profile: demo", "profile: no"), "params.yaml").profile == "no"


def test_an_empty_folder_is_not_the_current_one() -> None:
    assert "name the folder" in fault_in(DEMO.replace("    source: openmoji_scenes", "    source: coco\n    root: ''"))


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])
# A file, the line it must be told with (None: of none), and what else must be said.
HOSTILE = {
    "alias of itself in a list": ("a: 1\nb: &b [*b]", 2, "an alias of what it stands in"),
    "alias of itself in a mapping": ("a: &a {b: {c: *a}}", 1, "a.b.c: an alias of what it stands in"),
    "merge of itself": ("a: &a {<<: *a}", 1, "an alias of what it stands in"),
    "billion laughs": (BOMB, 1, "more than 10,000 values"),
    "object": ("a: 1\nb: !!python/object/apply:os.mkdir [x]", 2, "has no place here"),
    "own tag": ("a: !mine 1", 1, "has no place here"),
    "bytes": ("a: !!binary aGk=", 1, "has no place here"),
    "tab": ("a:\n\tb: 1", 2, "not valid YAML"),
    "number as key": ("a: 1\n2: b", 2, "a key that is no text"),
    "list as key": ("? [a, b]\n: 1", 1, "a key that is no text"),
    "two documents": ("a: 1\n---\nb: 2", 2, "another document"),
    "merged twice": ("x: &x {b: 1}\na: {<<: *x, <<: *x}", 2, "here for the second time"),
    "twice under a merge": ("x: &x {b: 1}\na: {<<: *x, c: 1, c: 2}", 2, "a.c is here for the second time"),
    "merge of a number": ("a: {<<: 3}", 1, "not valid YAML"),
    "unknown alias": ("a: *b", 1, "undefined alias"),
    "no date": ("a: 2024-13-45", 1, "a text needs quotes"),
    "endless number": ("a: " + "9" * 5000, 1, "a is 999"),
    "half a character": ('a: "\\ud800"', 1, "half a surrogate pair"),
    "zero byte": ("a: 1\nb: \x00", 2, "not valid YAML"),
    "nested": ("[" * 1000, None, "nested too deeply"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_mapping_of_plain_values_is_named_with_its_line(case: str, project: Path) -> None:
    text, line, message = HOSTILE[case]
    fault = fault_in(text)
    assert message in fault and "\n" not in fault and len(fault) < 300, fault
    assert fault.startswith(f"params.yaml:{line}: " if line else "params.yaml: "), fault
    assert not list(project.iterdir())


def test_aliases_and_merges_are_plain_values() -> None:
    text = DEMO.replace("  mlp:\n", "  mlp: &mlp\n", 1).replace("  query:\n", "  query:\n    <<: *mlp\n", 1)
    assert parse_params(text, "demo").adapters["query"].architecture["queries"] == 9  # its own goes before the merged
    wrong = text.replace("  mlp: &mlp\n    architecture: {pool: 3", "  mlp: &mlp\n    architecture: {pol: 3")
    assert f"params.yaml:{line_of(wrong, 'pol: 3')}: adapters.mlp.architecture.pol" in fault_in(wrong)


def test_the_recipe_of_the_docs_is_one() -> None:
    page = (PROJECT / "docs/recipes.md").read_text(encoding="utf-8").partition("## Several data sets, one model")[2]
    block = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    params = parse_params(yaml.safe_dump(merged(yaml.safe_load(DEMO), block)), "params.yaml")
    assert params.finetune_for("mlp", "both").data == params.run.data and params.pca.recipe == "both"
    assert "finetune@mlp-both" in stages(params) and "finetune_scratch@self_attention-both" in stages(params)
