"""Properties of the config file: what is written loads back, and a mistake is named with its place."""

import dataclasses
import tomllib
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr import config_rules
from jaxnr.config import Config, ModelConfig, _field_docstrings, flatten, load_config, save_config, to_toml
from jaxnr.config_rules import validate
from jaxnr.errors import InputError

REPOSITORY = Path(__file__).parents[1]


def configs() -> st.SearchStrategy[Config]:
    """Configs with any value that the type of a field allows; the command line may give any of them."""
    return _section(Config())


def _section(default) -> st.SearchStrategy:
    fields = {
        name: _section(getattr(default, name)) if dataclasses.is_dataclass(kind) else _values(kind)
        for name, kind in get_type_hints(type(default)).items()
    }
    return st.builds(type(default), **fields)


def _values(kind) -> st.SearchStrategy:
    if get_origin(kind) is tuple:
        return st.lists(_values(get_args(kind)[0]), max_size=4).map(tuple)
    if get_args(kind):
        return st.sampled_from(get_args(kind))
    return {
        int: st.integers(-(2**40), 2**40),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(st.characters(codec="utf-8"), max_size=20),
    }[kind]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some.toml"
    path.write_text(text, encoding="utf-8")
    return path


@settings(max_examples=25, deadline=None)
@given(config=configs())
def test_every_field_survives_a_round_trip(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("round_trip") / "config.toml"
    save_config(config, path)
    assert load_config(path) == config


def test_saved_file_names_every_setting(tmp_path):
    save_config(Config(), tmp_path / "config.toml")
    tables = tomllib.loads((tmp_path / "config.toml").read_text())
    assert flatten(Config()).keys() == set(_dotted(tables))


def _dotted(table: dict, prefix: str = "") -> list[str]:
    return [
        key
        for name, value in table.items()
        for key in (_dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name])
    ]


def test_what_a_file_leaves_out_keeps_the_default_of_its_place(tmp_path):
    config = load_config(written(tmp_path, "[student]\nnum_layers = 1\n[grpo.optimizer]\nwarmup_steps = 9\n"))
    assert config.student == dataclasses.replace(Config().student, num_layers=1)
    assert config.student.hidden_size != ModelConfig().hidden_size
    assert config.grpo.optimizer == dataclasses.replace(Config().grpo.optimizer, warmup_steps=9)


def test_quickstart_file_holds_the_defaults_with_their_comments():
    text = (REPOSITORY / "configs" / "quickstart.toml").read_text(encoding="utf-8")
    assert text == to_toml(Config()), "regenerate it: python -m jaxnr.config > configs/quickstart.toml"
    assert load_config(REPOSITORY / "configs" / "quickstart.toml") == Config()
    assert "# Folder with the data; unused by `synthetic`.\npath" in text


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_config_in_the_repository_is_valid(path):
    config = load_config(path)
    given = dataclasses.replace(config, data=dataclasses.replace(config.data, path="given on the command line"))
    assert [*config_rules._out_of_bounds(given), *config_rules._problems(given)] == []


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("sead = 1", "sead", "seed"),
        ("[retreival]\nembedder = 'x'", "retreival", "retrieval"),
        ("[grpo]\ngroupsize = 4", "grpo.groupsize", "grpo.group_size"),
        ("[grpo.optimizer]\nlr = 0.1", "grpo.optimizer.lr", "grpo.optimizer.learning_rate"),
        ("[prompt]\ntie_word_embeddings = true", "prompt.tie_word_embeddings", "teacher.tie_word_embeddings"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, text, key, nearest):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert f"`{key}`" in str(caught.value)
    assert f"`{nearest}`" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed = 1.5", "`seed` is 1.5; expected a whole number"),
        ("seed = true", "`seed` is true; expected a whole number"),
        ("[data]\nvalid_days = 'three'", '`data.valid_days` is "three"; expected a number'),
        ("[data]\nformat = 'mnd'", '`data.format` is "mnd"; expected one of "synthetic", '),
        ("[prompt]\nreasoning = 1", "`prompt.reasoning` is 1; expected true or false"),
        ("[prompt]\nprompt_buckets = 96", "`prompt.prompt_buckets` is 96; expected a list, each item a whole number"),
        ("[prompt]\nprompt_buckets = [96, '192']", '`prompt.prompt_buckets[1]` is "192"; expected a whole number'),
        ("grpo = 3", "`grpo` is 3; expected a table, [grpo]"),
        ("seed = ", "not valid TOML: Invalid value (at "),
        ("seed = 1\nseed = 2\n", "line 2"),
    ],
)
def test_wrong_value_names_file_key_and_what_was_expected(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


def test_whole_number_will_do_for_a_float(tmp_path):
    days = load_config(written(tmp_path, "[data]\nvalid_days = 2")).data.valid_days
    assert isinstance(days, float)
    assert days == 2


def test_unreadable_files_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_config(tmp_path / "binary.toml")


def test_every_setting_has_a_help_text():
    def undocumented(section, prefix=""):
        notes = {name for kind in type(section).__mro__[:-1] for name in _field_docstrings(kind)}
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):  # tables have the docstring of their class
                yield from undocumented(value, f"{prefix}{field.name}.")
            elif field.name not in notes:
                yield prefix + field.name

    assert list(undocumented(Config())) == []


def test_by_default_every_training_stage_has_a_checkpoint_before_its_last_step():
    config = Config()
    for stage in (config.warm_start, config.grpo, config.supervised, config.distill):
        assert config.checkpoint_every < stage.steps


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("checkpoint_every", 0),
        ("data.format", "mind"),
        ("data.max_refused_share", 1.5),
        ("data.test_days", float("inf")),
        ("data.min_signals", 10**6),
        ("prompt.prompt_buckets", (96, 64)),
        ("prompt.prompt_buckets", ()),
        ("prompt.max_prompt_tokens", 10**6),
        ("prompt.min_queries", 10**6),
        ("prompt.vocabulary_size", 100),
        ("retrieval.embedder", "sentence_encoder"),
        ("reward.align", -1.0),
        ("judge.kind", "language_model"),
        ("judge.concurrency", 0),
        ("judge.max_failed_share", 1.1),
        ("judge.token_variable", "sk-1234"),
        ("teacher.num_kv_heads", 3),
        ("teacher.num_kv_heads", 0),
        ("student.head_dim", 7),
        ("grpo.group_size", 1),
        ("grpo.clip_low", 1.5),
        ("grpo.clip_high", -0.1),
        ("grpo.importance_cap", -1.0),
        ("grpo.kl_weight", -0.1),
        ("grpo.overlong_tokens", 10**6),
        ("grpo.optimizer.learning_rate", float("nan")),
        ("distill.temperature", 0.0),
        ("distill.jsd_beta", 0.0),
        ("distill.jsd_beta", 1.0),
        ("distill.prefix_tokens", -1),
        ("warm_start.steps", 0),
        ("evaluation.best_of_n", (1, 4, 2)),
        ("evaluation.best_of_n", ()),
        ("mesh.fsdp", 0),
        ("mesh.fsdp", -1),
    ],
)
def test_a_value_that_makes_no_sense_is_named(key, value):
    with pytest.raises(InputError) as caught:
        validate(_changed(Config(), key, value))
    section, _, name = key.rpartition(".")
    assert f"`{section or name}" in str(caught.value) or f"`{key}`" in str(caught.value)


def test_all_zero_reward_weights_are_refused():
    config = Config()
    for name in ("align", "coverage", "specificity", "diversity", "structure"):
        config = _changed(config, f"reward.{name}", 0.0)
    with pytest.raises(InputError, match="every weight"):
        validate(config)


def test_a_judge_over_http_needs_an_address_and_the_token_is_not_shown():
    config = _changed(_changed(Config(), "judge.kind", "http"), "judge.token_variable", "sk-1234")
    with pytest.raises(InputError) as caught:
        validate(config)
    assert all(f"`judge.{name}`" in str(caught.value) for name in ("model", "url", "token_variable"))
    assert "sk-1234" not in str(caught.value)


def test_a_model_from_scratch_needs_a_warm_start_where_it_is_trained():
    config = _changed(_changed(Config(), "warm_start.steps", 0), "teacher.path", "some/model")
    with pytest.raises(InputError, match=r"`student.path` is empty"):
        validate(config)
    validate(_changed(config, "student.path", "some/model"))
    validate(_changed(config, "distill.steps", 0))


@pytest.mark.parametrize("name", ["judge", "second_judge"])
def test_only_a_language_model_words_its_questions(name):
    config = _changed(Config(), f"{name}.rubric", "language_model")
    with pytest.raises(InputError, match=f'`{name}.rubric` is "language_model", but a judge of the kind "'):
        validate(config)
    validate(_changed(_changed(config, f"{name}.kind", "language_model"), f"{name}.model", "some/model"))


def test_the_second_judge_is_not_the_first():
    config = Config()
    for name in ("judge", "second_judge"):
        config = _changed(_changed(config, f"{name}.kind", "language_model"), f"{name}.model", "some/model")
    with pytest.raises(InputError, match="`second_judge` is the same"):
        validate(config)
    validate(_changed(config, "second_judge.model", "another/model"))


def _changed(section, key: str, value):
    name, _, rest = key.partition(".")
    return dataclasses.replace(section, **{name: _changed(getattr(section, name), rest, value) if rest else value})


def test_every_number_has_its_bounds():
    rules = (config_rules.POSITIVE, config_rules.NOT_NEGATIVE, config_rules.SHARE, config_rules.OWN_RULE)
    for key, value in flatten(Config()).items():
        if isinstance(value, bool | str):
            continue
        name = key.rpartition(".")[2]
        assert sum(name in rule for rule in rules) == 1, f"give {key} its bounds in jaxnr/config_rules.py"
