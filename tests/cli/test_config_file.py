"""Flags in a file: read, refused, written, and the same again."""

import json
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaml.cli import _compare, _presets, main
from imaml.cli._assignments import to_flags
from imaml.cli._command_line import defaults, parse
from imaml.cli._config_file import ConfigFile
from imaml.cli._options import (
    STRATEGIES,
    Compare,
    Dataset,
    EngineOptions,
    EpisodeOptions,
    MachineOptions,
    Model,
    PlanOptions,
    Train,
)
from imaml.cli._toml import to_toml
from imaml.training import Plan

TINY = ["--dataset", "sinusoid", "--meta-batch", "2", "--val-tasks", "2", "--eval-tasks", "5"]
TIMES = ("milliseconds", "seconds")


def parsed(folder, command, text, *flags, name="flags.toml"):
    (folder / name).write_text(text)
    return replace(parse([command, "--config", str(folder / name), *flags]), file=None)


def test_a_file_is_as_good_as_flags_which_win_over_it(tmp_path):
    text = """
        strategy = "imaml"
        steps = 7                 # the name of a flag needs no section
        save-minutes = 2
        [episodes]
        dataset = "sinusoid"
        [engine]
        inner-lr = 0.5
        chunk_size = "auto"
        [plan]
        optimizer = "SGD"
        optimizer_options = {momentum = 0.9}
        clip_norm = 1
    """
    flags = "--strategy imaml --dataset sinusoid --steps 7 --save-minutes 2 --inner-lr 0.5 --chunk-size auto "
    flags += "--optimizer sgd --optimizer-options momentum=0.9 --clip-norm 1"
    assert parsed(tmp_path, "train", text) == parse(["train", *flags.split()])
    later = parsed(tmp_path, "train", text, "--inner-lr", "0.25", "--optimizer-options", "nesterov=True", "momentum=1")
    assert later.engine.inner_lr == 0.25 and later.plan.optimizer_options == {"nesterov": True, "momentum": 1}
    assert later.engine.cg_steps == _presets.train("sinusoid", "imaml").engine.cg_steps  # defaults follow the file
    assert parsed(tmp_path, "train", text, "--strategy", "maml").engine.regularization is None


def test_every_command_takes_a_file(tmp_path):
    compared = parsed(tmp_path, "compare", 'strategies = ["maml", "imaml"]\n[plan]\noptimizer = "adamw"\nminutes = 1')
    assert compared.strategies == ("maml", "imaml") and (compared.plan.optimizer, compared.plan.minutes) == ("adamw", 1)
    assert parsed(tmp_path, "bench", 'problem = "a:b"\nmemory = 5', "--repeats", "2").memory == 5.0
    assert parsed(tmp_path, "plan", 'problem = "a:b"\nmemory = "5MB"').memory == "5MB"
    assert parsed(tmp_path, "verify", "tolerance = 1e-3\nsmoothness = true").smoothness


@pytest.mark.parametrize("name", ["flags.yaml", "flags.yml"])
def test_yaml_is_read_too_with_its_numbers_and_null(tmp_path, name):
    pytest.importorskip("yaml")
    text = "dataset: glyphs\nplan:\n  meta_lr: 1e-3\n  optimizer_options: {eps: 1.5E-4}\nengine:\n  adapt: null\n"
    read = parsed(tmp_path, "train", text, name=name)
    assert (read.plan.meta_lr, read.plan.optimizer_options, read.engine.adapt) == (0.001, {"eps": 1.5e-4}, None)


def test_without_pyyaml_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "flags.yaml").write_text("steps: 3")
    assert main(["train", "--config", str(tmp_path / "flags.yaml")]) == 2
    assert "needs pyyaml: pip install 'imaml[yaml]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "there is no option stepz. Expected steps, "),
        ("[plan]\nmeta_lrr = 3", "there is no option meta_lrr in [plan]. Expected meta_lr, "),
        ("[engine]\nsteps = 3", "there is no option steps in [engine]. Expected "),
        ("[plam]\nsteps = 3", "there is no option plam. Expected plan"),
        ("file = 'x'", "there is no option file"),
        ("steps = 'many'", "steps in [plan] must be a whole number. Got 'many'."),
        ("steps = 3.5", "steps in [plan] must be a whole number. Got 3.5."),
        ("steps = true", "steps in [plan] must be a whole number. Got True."),
        ("meta_lr = '1e-3'", "meta_lr in [plan] must be a number. Got '1e-3'."),
        ("adapt = 'head'", "adapt in [engine] must be a list of a text. Got 'head'."),
        ("compile = 1", "compile in [engine] must be true or false. Got 1."),
        ("strategy = 'mamml'", "strategy must be maml or fomaml or imaml. Got 'mamml'."),
        ("data = 3", "data in [episodes] must be a path in quotes. Got 3."),
        ("chunk_size = 'all'", "chunk_size in [engine] must be a whole number or auto. Got 'all'."),
        ("optimizer_options = 3", "optimizer_options in [plan] must be a table of names with values. Got 3."),
        ("steps = 3\n[plan]\nsteps = 4", "steps in [plan] stands there twice. Leave one out."),
        ("meta_batch = 0", "`meta_batch` must be at least 1. Got 0."),
        ("optimizer = 'adamm'", "`optimizer` must be a class of torch.optim"),
        ("steps = ", "is not TOML: "),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(tmp_path, capsys, text, message):
    (tmp_path / "flags.toml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "flags.toml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"imaml: {tmp_path / 'flags.toml'}") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("flags.ini", "", "that ends with .toml, .yaml, .yml"),
        ("none.toml", None, "none.toml"),
        ("flags.yaml", "- 1", "must hold names with values. Got list."),
        ("flags.yaml", "a: [", "is not YAML: "),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, capsys, name, text, message):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["train", "--config", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


COUNTS = st.integers(1, 10**12)
RATES = st.floats(1e-300, 1e300, exclude_min=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
EPISODES = st.builds(
    EpisodeOptions,
    dataset=st.sampled_from(get_args(Dataset)),
    model=st.none() | st.sampled_from(get_args(Model)),
    data=st.none() | TEXTS.filter(lambda text: text != "None").map(Path),
    split=st.none() | st.sampled_from(["random", "original"]),
    ways=st.none() | COUNTS,
    seed=COUNTS,
)
ENGINES = st.builds(
    EngineOptions,
    adapt=st.none() | st.lists(TEXTS, max_size=3),
    inner_lr=st.none() | RATES,
    inner_steps=st.none() | COUNTS,
    regularization=st.none() | st.floats(allow_nan=False),
    storage=st.none() | st.sampled_from(["device", "cpu", "disk"]),
    chunk_size=st.none() | st.just("auto") | COUNTS,
    compile=st.none() | st.booleans(),
    on_nonfinite=st.none() | st.sampled_from(["raise", "skip"]),
)
OPTIMIZERS = st.sampled_from(
    [
        ("adam", {}),
        ("AdamW", {"weight_decay": 1e-05, "betas": (0.5, 1e-3), "amsgrad": True}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("muon", {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}),
    ]
)
SHARED = {"minutes": st.none() | RATES, "clip_norm": st.none() | RATES, "eval_inner_steps": st.none() | COUNTS}
PLANS = OPTIMIZERS.flatmap(
    lambda chosen: st.builds(
        Plan,
        optimizer=st.just(chosen[0]),
        optimizer_options=st.just(chosen[1]),
        steps=COUNTS,
        meta_lr=RATES,
        schedule=st.sampled_from(["constant", "cosine"]),
        **SHARED,
    )
)
MACHINES = st.builds(MachineOptions, device=TEXTS, threads=st.none() | COUNTS)
TRAINS = st.builds(
    Train,
    strategy=st.sampled_from(STRATEGIES),
    save_minutes=st.floats(0, 1e9),
    track=st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2).map(tuple),
    episodes=EPISODES,
    engine=ENGINES,
    plan=PLANS,
    machine=MACHINES,
)
COMPARES = st.builds(
    Compare,
    strategies=st.lists(st.sampled_from(STRATEGIES), min_size=1, max_size=3).map(tuple),
    episodes=EPISODES,
    engine=ENGINES,
    plan=OPTIMIZERS.flatmap(
        lambda chosen: st.builds(
            PlanOptions, optimizer=st.just(chosen[0]), optimizer_options=st.just(chosen[1]), steps=COUNTS, **SHARED
        )
    ),
    machine=MACHINES,
)


@settings(max_examples=80, deadline=None)
@given(TRAINS | COMPARES)
def test_options_come_back_from_their_file(options):
    text = to_toml(options, defaults(options))
    read = ConfigFile.read(written(text)).onto(defaults(options))
    assert read == options
    assert to_toml(read, defaults(read)) == text


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    global _place
    _place = tmp_path_factory.mktemp("written") / "config.toml"


def written(text):
    _place.write_bytes(text.encode())
    return _place


def flags_of(options):
    """What one types to get these options."""
    found = []
    for name in (one.name for one in fields(options)):
        value = getattr(options, name)
        if is_dataclass(value):
            found += flags_of(value)
        elif name not in ("file", "out", "resume"):
            values = (
                to_flags(value) if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            found += ["--" + name.replace("_", "-"), *map(str, values)]
    return found


@settings(max_examples=8, deadline=None)
@given(TRAINS | COMPARES)
def test_options_come_back_from_flags_and_from_the_file_by_the_command_line(options):
    plain = replace(
        options, machine=MachineOptions(device="cpu"), engine=replace(options.engine, adapt=["head", "a.*"])
    )
    plain = replace(plain, episodes=replace(plain.episodes, data=None))  # what begins with a dash is no argument
    command = "train" if isinstance(options, Train) else "compare"
    assert parse([command, *flags_of(plain)]) == plain
    file = written(to_toml(options, defaults(options)))
    assert parse([command, "--config", str(file)]) == replace(options, file=file)


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_the_file_in_a_run_folder_does_the_same_run_again(tmp_path):
    options = [
        "--optimizer",
        "AdamW",
        "--optimizer-options",
        "weight_decay=0.1",
        "betas=0.8,0.99",
        "--clip-norm",
        "0.5",
    ]
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(["train", *TINY, "--steps", "3", "--eval-every", "2", "--out", str(run), *options]) == 0
    assert main(["train", "--config", str(run / "config.toml"), "--out", str(again)]) == 0
    assert metrics(run) == metrics(again) and all(record["gradient_norm"] > 0 for record in metrics(run))
    results = [json.loads((folder / "result.json").read_text())["mean"] for folder in (run, again)]
    assert results[0] == results[1]
    for name in ("config.toml", "config.json"):
        assert (run / name).read_bytes() == (again / name).read_bytes()
    assert main(["train", "--out", str(run), "--resume", "--config", str(run / "config.toml")]) == 0


def test_a_comparison_trains_every_strategy_with_the_optimizer_that_is_given():
    options = parse(["compare", "--optimizer", "SGD", "--optimizer-options", "momentum=0.5", "--clip-norm", "2"])
    for plan in _compare._plans(options).values():
        assert (plan.optimizer, plan.optimizer_options, plan.clip_norm) == ("sgd", {"momentum": 0.5}, 2.0)
    with pytest.raises(ValueError, match="Adam may be"):
        _compare._plans(parse(["compare", "--optimizer-options", "momentum=0.5"]))


def test_options_of_the_optimizer_on_the_command_line_are_names_with_values(tmp_path, capsys):
    given = ["weight-decay=1e-2", "amsgrad=TRUE", "betas=0.5,0.25", "foreach=False"]
    read = parse(["train", "--optimizer-options", *given]).plan.optimizer_options
    assert read == {"weight_decay": 0.01, "amsgrad": True, "betas": (0.5, 0.25), "foreach": False}
    assert parse(["train", "--optimizer-options"]).plan.optimizer_options == {}
    with pytest.raises(SystemExit):
        main(["train", "--optimizer-options", "weight_decay", "0.1"])
    assert "Expected NAME=VALUE" in capsys.readouterr().err
    assert main(["train", *TINY, "--out", str(tmp_path / "run"), "--optimizer-options", "momentum=1"]) == 2
    assert "`optimizer_options` of Adam may be amsgrad, " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
