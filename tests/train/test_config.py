"""Configuration: sources and their order, ranges, messages, options without effect."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from train_lora.config import Config, DataConfig, ModelConfig, OutputConfig
from train_lora.config_effects import ineffective_keys, value_of
from train_lora.config_load import ABLATIONS, DEFAULTS, TYPES, load, resolve_key
from train_lora.config_section import Bounds

REQUIRED = (
    '[model]\npath = "m"\n[data]\nprompts = "p.txt"\nreal_images = "r"\n[output]\ndirectory = "o"\n'
)


@pytest.fixture
def toml(tmp_path: Path):
    """Writes a config file with the required keys and what it is given, tables after tables."""

    def write(text: str = "", required: str = REQUIRED) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(required + text, encoding="utf-8")
        return path

    return write


def minimal(**sections) -> Config:
    return Config(
        model=ModelConfig(path="m"),
        data=DataConfig(prompts="p", real_images="r"),
        output=OutputConfig(directory="o"),
        **sections,
    )


# -- sources ---------------------------------------------------------------------------------------


def test_defaults_are_the_papers_for_an_sdxl_lora():
    config = minimal()
    for network in (config.student, config.critic):
        assert (network.rank, network.alpha, network.learning_rate) == (64, 8, 5e-5)
    assert config.critic.updates_per_generator == 5
    assert config.distribution_matching.guidance == 8
    assert (config.gan.generator_weight, config.gan.critic_weight) == (5e-3, 1e-2)
    assert (config.training.weight_decay, config.training.betas) == (0.01, (0.9, 0.999))
    assert config.training.max_grad_norm == 10
    matching = config.distribution_matching
    assert (matching.min_timestep, matching.max_timestep) == (20, 980)


def test_later_sources_win_and_each_value_knows_its_own(toml):
    file = toml("[student]\nrank = 16\n[critic]\nrank = 24\n")
    loaded = load(preset="demo", file=file, overrides=[("critic.rank", "48")])
    assert loaded.config.student.rank == 16
    assert loaded.config.critic.rank == 48
    assert loaded.origins["student.rank"] == "file"
    assert loaded.origins["critic.rank"] == "cli"
    assert loaded.origins["student.learning_rate"] == "preset"
    assert loaded.origins["training.weight_decay"] == "default"
    assert set(loaded.origins) == set(TYPES)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_goes_with_the_demo_preset_and_changes_one_value(name):
    plain, ablated = load(preset="demo"), load(preset="demo", ablations=[name])
    key, value = ABLATIONS[name]
    changed = [k for k in TYPES if value_of(plain.config, k) != value_of(ablated.config, k)]
    assert changed == [key]
    assert value_of(ablated.config, key) == value
    assert ablated.origins[key] == "cli"


def test_several_ablations():
    config = load(preset="demo", ablations=["no-gan", "critic-1to1"]).config
    assert load(preset="demo", ablations=["no-gan,critic-1to1"]).config == config
    assert not config.gan.enabled
    assert config.critic.updates_per_generator == 1


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("rank", None, None),  # student or critic
        ("student.rank", "8", 8),
        ("student.learning-rate", "1e-3", 1e-3),
        ("alpha", None, None),
        ("iterations", "7", 7),
        ("batch-size", "2", 2),
        ("gan.enabled", "false", False),
        ("weight-decay", "0", 0.0),
        ("training.betas", "0,0.9", (0.0, 0.9)),
        ("critic.betas", "[0, 0.9]", (0.0, 0.9)),
        ("critic.betas", "none", None),
        ("timesteps", "999, 499", (999, 499)),
        ("timesteps", "[749]", (749,)),
        ("timesteps", "[]", ()),
        ("conditioning_timestep", "399", 399),
        ("conditioning_timestep", "none", None),
        ("mixed_precision", "bf16", "bf16"),
        ("trackers", "tensorboard, wandb", ("tensorboard", "wandb")),
        ("trackers", "[]", ()),
        ("gan.layers", "[down1, middle]", ("down1", "middle")),  # as the shell leaves it
        ("gan.layers", '["down1"]', ("down1",)),
        ("validation.prompts", "a red ring, big", ("a red ring, big",)),
        ("validation.prompts", '["a", "b, c"]', ("a", "b, c")),
        ("directory", "a b", "a b"),
    ],
)
def test_command_line_values_take_the_type_of_their_key(key, text, value):
    if text is None:
        with pytest.raises(ValueError, match=r"could mean several keys.*student.*critic"):
            resolve_key(key)
        return
    needed = [("sampling.steps", "1")] if key == "conditioning_timestep" else []
    loaded = load(preset="demo", overrides=[*needed, (key, text)])
    found = value_of(loaded.config, resolve_key(key))
    assert found == value
    assert type(found) is type(value)


def test_whole_numbers_are_welcome_where_a_float_is_meant(toml):
    alpha = load(file=toml("[student]\nalpha = 4\n")).config.student.alpha
    assert alpha == 4
    assert type(alpha) is float


# -- what is wrong, the value, what to do ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[student]\nrnak = 3\n",
            r'Unknown key "student.rnak" in .*; did you mean "student.rank"\?',
        ),
        ("[studnet]\nrank = 3\n", r"Unknown section \[studnet\].*\[student\]"),
        ("[student]\nrank = 0\n", r"student.rank is 0; set it to at least 1 and at most 4096\."),
        ("[student]\nrank = 1.5\n", r"student.rank is 1.5; set it to a whole number\."),
        ("[student]\nrank = true\n", r"student.rank is true; set it to a whole number\."),
        ("[student]\nrank = '8'\n", r"student.rank is '8'; set it to a whole number\."),
        ("[student]\nalpha = 0\n", r"student.alpha is 0.0; set it to greater than 0\."),
        ("[student]\nalpha = nan\n", r"student.alpha is nan"),
        ("[student]\nalpha = inf\n", r"student.alpha is inf"),
        (
            "[training]\nema_decay = 1\n",
            r"ema_decay is 1.0; set it to at least 0 and less than 1\.",
        ),
        ("[training]\nbetas = [0.9]\n", r"betas is \[0.9\]; set it to a list of 2 numbers"),
        ("[training]\nbetas = [0.9, 1]\n", r"betas is \[0.9, 1.0\]; set each of its numbers to"),
        ("[training]\nmixed_precision = 'fp16'\n", r"'fp16'; set it to \"no\" or \"bf16\"\."),
        ("[gan]\nenabled = 1\n", r"gan.enabled is 1; set it to true or false\."),
        (
            "[sampling]\ntimesteps = [499, 749]\n",
            r"\[499, 749\]; its numbers must descend.*\[749, 499\]",
        ),
        ("[sampling]\ntimesteps = [499, 499]\n", r"must descend, such as \[499\]"),
        (
            "[sampling]\ntimesteps = [1000, 1]\n",
            r"\[1000, 1\]; set each .* at least 1 and at most 999",
        ),
        ("[sampling]\ntimesteps = [9, -1]\n", r"\[9, -1\]; set each of its numbers to at least 1"),
        ("[sampling]\ntimesteps = [0]\n", r"\[0\]; set each of its numbers to at least 1"),
        ("[sampling]\nconditioning_timestep = 0\n", r"is 0; set it to at least 1"),
        (
            "[sampling]\nconditioning_timestep = 399\n",
            r"is 399, which belongs to one-step students, but sampling.steps is 4; set sampling",
        ),
        ("[sampling]\ntimesteps = 999\n", r"timesteps is 999; set it to a list of whole numbers"),
        (
            "[distribution_matching]\nmin_timestep = 900\nmax_timestep = 100\n",
            r"min_timestep is 900, above max_timestep 100; set it to at most 100\.",
        ),
        ("[gan]\nenabled = false\n[distribution_matching]\nenabled = false\n", r"both false"),
        ("[gan\n", r"is not valid TOML: .*line"),
        (
            "[logging]\ntrackers = ['mlflow']\n",
            r"trackers is \['mlflow'\]; set it to a list in brackets of \"tensorboard\" or",
        ),
        (
            "[logging]\ntrackers = ['wandb', 'wandb']\n",
            r"trackers is \['wandb', 'wandb'\]; name each tracker once\.",
        ),
    ],
)
def test_messages_name_key_value_and_remedy(toml, text, message):
    with pytest.raises(ValueError, match=message):
        load(file=toml(text))


def test_resolution_must_be_a_multiple_of_64():
    with pytest.raises(
        ValueError, match=r"data.resolution_px is 1000.*multiple of 64, such as 1024"
    ):
        DataConfig(prompts="p", resolution_px=1000)


@pytest.mark.parametrize(
    ("key", "closest"), [("learning_rte", "learning_rate"), ("itertions", "training.iterations")]
)
def test_unknown_option_names_the_nearest(key, closest):
    with pytest.raises(ValueError, match=rf"Unknown option --{key}; did you mean --.*{closest}\?"):
        load(preset="demo", overrides=[(key, "1")])


def test_an_abbreviation_is_understood():
    with pytest.raises(ValueError, match=r"--lr; .*--student.learning_rate or --critic.learning_r"):
        load(preset="demo", overrides=[("lr", "1")])


def test_a_key_outside_its_section(toml):
    with pytest.raises(ValueError, match=r'"iterations".*did you mean "training.iterations"'):
        load(file=toml(required="iterations = 3\n"))


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.toml does not exist"):
        load(file=tmp_path / "nothing.toml")
    with pytest.raises(FileNotFoundError, match=r"is a folder"):
        load(file=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(ValueError, match=r"not UTF-8"):
        load(file=tmp_path / "latin.toml")


def test_missing_required_values(toml):
    with pytest.raises(
        ValueError, match=r"model.path is not set; add path to \[model\].*--model.path"
    ):
        load()
    no_images = REQUIRED.replace('real_images = "r"\n', "")
    with pytest.raises(ValueError, match=r"data.real_images is not set, but gan.enabled is true"):
        load(file=toml(required=no_images))
    assert load(file=toml(required=no_images), ablations=["no-gan"]).config.data.real_images is None
    with pytest.raises(ValueError, match=r"backward_simulation.enabled is false"):
        load(file=toml(required=no_images), ablations=["no-gan", "no-backward-simulation"])


def test_unknown_preset_and_ablation():
    with pytest.raises(ValueError, match=r'no preset "dmo"; the presets are: .*demo'):
        load(preset="dmo")
    with pytest.raises(ValueError, match=r"Unknown ablation 'gan'; choose from no-gan"):
        load(preset="demo", ablations=["gan"])


def test_the_same_thing_twice():
    with pytest.raises(ValueError, match=r"--training.iterations is given twice"):
        load(preset="demo", overrides=[("iterations", "1"), ("training.iterations", "2")])
    with pytest.raises(ValueError, match=r"--ablate no-gan and --gan.enabled both set"):
        load(preset="demo", overrides=[("gan.enabled", "true")], ablations=["no-gan"])
    with pytest.raises(ValueError, match=r"--ablate no-gan has no effect"):
        load(preset="demo", ablations=["no-gan", "no-gan"])


# -- options without effect ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[gan]\nenabled = false\ngenerator_weight = 1.0\n", "gan.generator_weight"),
        (
            "[distribution_matching]\nenabled = false\nguidance = 2.0\n",
            "distribution_matching.guidance",
        ),
        ("[sampling]\nsteps = 2\ntimesteps = [999, 499]\n", "sampling.steps"),
        ("[validation]\nevery = 0\nseed = 3\n", "validation.seed"),
        ("[validation]\nprompts = ['a']\nnum_prompts = 3\n", "validation.num_prompts"),
        ("[logging]\nproject = 'mine'\n", "logging.project"),
        ("[gan]\nenabled = false\n", "data.real_images"),
    ],
)
def test_an_option_without_effect_is_an_error(toml, text, key):
    with pytest.raises(ValueError, match=rf"{key} is .* has no effect, because .*; remove {key}"):
        load(file=toml(text))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([("data.teacher_images", "3")], "data.teacher_images"),
        ([("data.stream", "true")], "data.stream"),
        ([("data.prompt_column", "caption")], "data.prompt_column"),
        ([("data.real_images", "teacher"), ("data.min_size_px", "64")], "data.min_size_px"),
        ([("data.real_images", "demo"), ("data.size_ids", "image")], "data.size_ids"),
        ([("data.real_images", "teacher"), ("data.split", "test")], "data.split"),
    ],
)
def test_data_options_without_effect_are_errors(toml, overrides, key):
    with pytest.raises(ValueError, match=rf"{key} is .* has no effect, because .*; remove {key}"):
        load(file=toml(), overrides=overrides)


def test_the_teachers_images_take_guidance_even_without_distribution_matching(toml):
    switches = "[distribution_matching]\nenabled = false\nguidance = 2.0\n"
    load(file=toml(switches), overrides=[("data.real_images", "teacher")])


def test_a_later_switch_may_leave_earlier_values_without_effect(toml):
    file = toml("[gan]\ngenerator_weight = 0.5\n")
    loaded = load(file=file, ablations=["no-gan"])
    assert "gan.generator_weight" in ineffective_keys(loaded.config)
    with pytest.raises(ValueError, match=r"gan.critic_weight is 0.5 but has no effect"):
        load(file=file, overrides=[("gan.critic_weight", "0.5")], ablations=["no-gan"])


# -- dataclasses -----------------------------------------------------------------------------------


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        minimal().training.iterations = 3


def test_defaults_lie_within_their_bounds():
    minimal()  # every section's __post_init__ has run
    assert set(TYPES) - set(DEFAULTS) == {"model.path", "data.prompts", "output.directory"}


@pytest.mark.parametrize("value", [0, 1, math.nan, math.inf, -math.inf])
def test_open_bounds_exclude_their_ends(value):
    assert not Bounds(low=0, high=1, open_low=True, open_high=True).holds(value)
    assert Bounds(low=0, high=1).holds(value) == (value in (0, 1))
