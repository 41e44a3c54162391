"""What a run trained goes out as a checkpoint, and comes in again as the pretrained models of another run."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tiny import left_padded, relative_gap
from tiny_run import CONFIG

from jaxnr import cli
from jaxnr.config import load_config, save_config
from jaxnr.errors import InputError
from jaxnr.export import export
from jaxnr.models.huggingface import load, save
from jaxnr.models.lora import trainable
from jaxnr.road import STAGES, Road, run_stages

pytestmark = pytest.mark.xdist_group("tiny_run")


@pytest.fixture(scope="module")
def pair(run, tmp_path_factory):
    """The teacher with 20 rows of its embedding that belong to no token, and the student as it is."""
    folder = tmp_path_factory.mktemp("pair")
    export(run, "student_on_policy", folder / "student")
    export(run, "teacher", folder / "narrow")
    model, params, tokenizer = load(folder / "narrow")
    table_VD = params["embed_tokens"]["embedding"]
    noise_VD = 10 * jax.random.normal(jax.random.key(0), (20, table_VD.shape[1]))
    params["embed_tokens"]["embedding"] = jnp.concatenate([table_VD, noise_VD])
    config = dataclasses.replace(model.config, vocab_size=model.config.vocab_size + 20)
    save(folder / "teacher", model.clone(config=config), params, tokenizer)
    return folder


def test_transformers_loads_what_was_trained_and_gives_its_logits(run, tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "teacher"
    monkeypatch.setattr(sys, "argv", ["jaxnr", "export", str(run), "--model", "teacher", "--out", str(out)])
    cli.main()
    assert str(out) in capsys.readouterr().out
    road = Road.open(load_config(run / "config.toml"), run)
    policy = road.policy("teacher")
    params = road.trained_params(policy, "grpo")
    tokens_BS, mask_BS = left_padded([9, 5], 9)
    position_BS = np.maximum(mask_BS.cumsum(-1) - 1, 0)
    hidden = policy.model.apply({"params": params}, tokens_BS, mask_BS)
    logits = np.asarray(hidden @ params["embed_tokens"]["embedding"].T)
    with torch.no_grad():
        arrays = (torch.tensor(array).long() for array in (tokens_BS, mask_BS, position_BS))
        expected = AutoModelForCausalLM.from_pretrained(out).eval()(*arrays).logits.numpy()
    assert relative_gap(logits[mask_BS], expected[mask_BS]) < 1e-4


def test_a_folder_that_is_there_is_not_overwritten(run, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        export(run, "teacher", tmp_path)


@pytest.mark.slow
def test_pretrained_models_of_other_embedding_sizes_walk_the_road_without_a_warm_start(run, pair, tmp_path):
    teacher = dataclasses.replace(CONFIG.teacher, path=str(pair / "teacher"), lora_rank=2)
    config = dataclasses.replace(
        CONFIG,
        teacher=teacher,
        student=dataclasses.replace(CONFIG.student, path=str(pair / "student")),
        warm_start=dataclasses.replace(CONFIG.warm_start, steps=0),
        grpo=dataclasses.replace(CONFIG.grpo, steps=2, uniform_steps=0),
    )
    out = tmp_path / "run"
    save_config(config, out / "config.toml")
    run_stages(config, out, STAGES)
    road = Road.open(config, out)
    policy = road.policy("teacher")
    assert policy.model.config.vocab_size == policy.vocabulary_size + 20
    before, after = (road.trained_params(policy, stage) for stage in ("warm_start_teacher", "grpo"))
    then = traverse_util.flatten_dict(after)
    changed = {path[-1] for path, leaf in traverse_util.flatten_dict(before).items() if (leaf != then[path]).any()}
    assert {"lora_b"} <= changed <= {"lora_a", "lora_b"}  # A has no gradient before B has left zero
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()),
            before["embed_tokens"],
            load(pair / "teacher").params["embed_tokens"],
        )
    )
    assert trainable(before).keys() == {"layers"}
    results = json.loads((out / "results.json").read_text())
    assert {"teacher", "student_on_policy"} <= results["offline"].keys()
    exported = json.loads((run / "results.json").read_text())
    # What was exported as the teacher came in as it was, and writes the same lists.
    assert results["rewards"]["prompt_only"] == pytest.approx(exported["rewards"]["teacher"], rel=1e-4)
    export(out, "teacher", tmp_path / "merged")
    assert "lora_a" not in load(tmp_path / "merged").params["layers"]["q_proj"]


def test_a_student_with_other_tokens_is_an_input_error_that_names_both(run, pair, tmp_path):
    other = tmp_path / "other"
    model, params, tokenizer = load(pair / "student")
    tokenizer.add_tokens(["zzzz"])
    config = dataclasses.replace(model.config, vocab_size=model.config.vocab_size + 1)
    table_VD = params["embed_tokens"]["embedding"]
    params["embed_tokens"]["embedding"] = jnp.concatenate([table_VD, table_VD[:1]])
    save(other, model.clone(config=config), params, tokenizer)
    config = dataclasses.replace(
        CONFIG,
        teacher=dataclasses.replace(CONFIG.teacher, path=str(pair / "teacher")),
        student=dataclasses.replace(CONFIG.student, path=str(other)),
    )
    with pytest.raises(InputError, match=r"other: its tokenizer has other tokens than that of .*teacher"):
        run_stages(config, tmp_path / "run", ["data"])


def test_a_checkpoint_that_cannot_be_used_ends_the_command_before_any_data_is_read(pair, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(pair / "student", broken)
    changes = {
        "config.json: expected": lambda: (broken / "config.json").unlink(),
        "model_type is 'llama'": lambda: (broken / "config.json").write_text('{"model_type": "llama"}'),
    }
    for message, change in changes.items():
        change()
        out = tmp_path / "run"
        config = dataclasses.replace(CONFIG, student=dataclasses.replace(CONFIG.student, path=str(broken)))
        save_config(config, tmp_path / "config.toml")
        monkeypatch.setattr(sys, "argv", ["jaxnr", "run", str(tmp_path / "config.toml"), "--out", str(out)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
