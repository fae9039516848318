"""Build a `Config` from a preset, a TOML file, the command line and ablations, in this order.

Every value is checked (known key, type, range, effect) and remembers where it came from. All
messages are `ValueError` or `FileNotFoundError` with the key, the value and what to do.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from .config import SECTIONS, Config
from .config_effects import ineffective_keys, value_of
from .config_section import show_value
from .config_values import describe_type, fit, python_value

Origin = Literal["default", "preset", "file", "cli"]
PRESETS = Path(__file__).parent / "presets"
UNKNOWN = "..."
"""In place of a text that is not set yet; in a preset, of one that it cannot do without."""

ABLATIONS: dict[str, tuple[str, Any]] = {
    "no-gan": ("gan.enabled", False),
    "no-distribution-matching": ("distribution_matching.enabled", False),
    "no-backward-simulation": ("backward_simulation.enabled", False),
    "critic-1to1": ("critic.updates_per_generator", 1),
}
"""What each name of `--ablate` sets."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dmd2": {},
    "dmd": {
        "sampling.steps": 1,
        "gan.enabled": False,
        "critic.updates_per_generator": 1,
    },
}
"""What each `training.objective` sets, where what names it does not set it otherwise."""

NEEDED_AT_TIMES = ("data.real_images", "regression.pairs", "regression.lpips_weights")
"""Keys that must be set where others ask for them."""

TYPES: dict[str, Any] = {
    f"{section}.{item.name}": get_type_hints(kind)[item.name]
    for section, kind in SECTIONS.items()
    for item in fields(kind)
}
"""Every known key, such as "student.rank", with its type."""

DEFAULTS: dict[str, Any] = {
    f"{section}.{item.name}": item.default
    for section, kind in SECTIONS.items()
    for item in fields(kind)
    if item.default is not MISSING
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A configuration and, for each of its keys, where the value came from."""

    config: Config
    origins: Mapping[str, Origin]
    missing: frozenset[str] = frozenset()
    """Keys that are needed and not set, of `load_unfinished`; their values mean nothing."""


def load(
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    ablations: Sequence[str] = (),
) -> LoadedConfig:
    """`overrides` are (key, text) pairs as on the command line; later sources win."""
    values, origins = _merged(preset, file, overrides, ablations)
    loaded = LoadedConfig(config=_build(values), origins=origins)
    _refuse_ineffective(loaded)
    return loaded


def load_unfinished(
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    ablations: Sequence[str] = (),
) -> LoadedConfig:
    """As `load`, to be looked at: keys that are needed may be missing, the rest is checked."""
    values, origins = _merged(preset, file, overrides, ablations)
    missing = _missing(values)
    config = _build(values | dict.fromkeys(missing, UNKNOWN))
    loaded = LoadedConfig(config=config, origins=origins, missing=frozenset(missing))
    _refuse_ineffective(loaded)
    return loaded


def _merged(
    preset: str | None,
    file: Path | None,
    overrides: Sequence[tuple[str, str]],
    ablations: Sequence[str],
) -> tuple[dict[str, Any], dict[str, Origin]]:
    """Key -> value, and -> where it came from."""
    layers: list[tuple[Origin, dict[str, Any]]] = [("default", DEFAULTS)]
    if preset is not None:
        layers.append(("preset", read_toml(_preset_path(preset))))
    if file is not None:
        layers.append(("file", read_toml(file)))
    typed = _parse_overrides(overrides)
    if "training.objective" not in typed:
        layers = _with_objective(layers)
    below = {key: value for _, layer in layers for key, value in layer.items()}
    layers.append(("cli", typed | _apply_ablations(ablations, below, typed)))
    if "training.objective" in typed:
        layers = _with_objective(layers)

    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for origin, layer in layers:
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    return {key: value for key, value in values.items() if value != UNKNOWN}, origins


def _with_objective(
    layers: Sequence[tuple[Origin, dict[str, Any]]],
) -> list[tuple[Origin, dict[str, Any]]]:
    """The layer that decides on the objective gets what that sets, below its own values."""
    last = max(place for place, (_, layer) in enumerate(layers) if "training.objective" in layer)
    implied = dict(OBJECTIVES[layers[last][1]["training.objective"]])
    if any(layer.get("sampling.timesteps") for _, layer in layers):
        implied.pop("sampling.steps", None)  # it would have no effect
    return [
        (origin, implied | layer if place == last else layer)
        for place, (origin, layer) in enumerate(layers)
    ]


def from_dict(nested: Mapping[str, Mapping[str, Any]]) -> Config:
    """The inverse of `Config.to_dict`; keys that are missing take their defaults."""
    return _build(DEFAULTS | _check_table(nested, "this configuration"))


def read_toml(path: Path) -> dict[str, Any]:
    """The checked value of each key that the file sets."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"The config file {path} {kind}; name a .toml file.")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"The config file {path} is not UTF-8 text; save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"The config file {path} is not valid TOML: {error}.") from error
    return _check_table(table, str(path))


def resolve_key(name: str) -> str:
    """The full key for `section.key` or for a `key` of one section only; dashes are underscores."""
    key = name.replace("-", "_")
    if key in TYPES:
        return key
    matches = [full for full in TYPES if full.partition(".")[2] == key]
    if len(matches) > 1:
        options = " or ".join(f"--{full}" for full in matches)
        raise ValueError(f"--{name} could mean several keys; write {options}.")
    if not matches:
        # "lr" is spelled like no key, but people write it for learning_rate.
        meant = [full for full in TYPES if initials(full) == key] or [nearest_key(key)]
        options = " or ".join(f"--{full}" for full in meant)
        raise ValueError(f"Unknown option --{name}; did you mean {options}?")
    return matches[0]


def initials(full_key: str) -> str:
    return "".join(word[0] for word in full_key.partition(".")[2].split("_"))


def nearest_key(name: str) -> str:
    """The known key that is spelled most like `name`, which may lack its section."""
    candidates: dict[str, str] = {}
    for full in TYPES:
        candidates.setdefault(full if "." in name else full.partition(".")[2], full)
    closest = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)[0]
    return candidates[closest]


def _refuse_ineffective(loaded: LoadedConfig) -> None:
    """An error for a key without effect, unless what switches it off was said later.

    So a preset with a GAN weight and `--ablate no-gan` go together; both in one file do not.
    """
    rank = {origin: position for position, origin in enumerate(get_args(Origin))}
    for key, switches in ineffective_keys(loaded.config).items():
        if not loaded.missing.isdisjoint((key, *switches)):
            continue  # nobody knows yet
        origin = loaded.origins[key]
        if origin == "default" or rank[origin] < max(rank[loaded.origins[s]] for s in switches):
            continue
        reason = " and ".join(f"{s} is {show_value(value_of(loaded.config, s))}" for s in switches)
        raise ValueError(
            f"{key} is {show_value(value_of(loaded.config, key))} but has no effect, because "
            f"{reason}; remove {key} or change {' or '.join(switches)}."
        )


def _build(values: Mapping[str, Any]) -> Config:
    missing = _missing(values)
    if not set(missing) <= set(NEEDED_AT_TIMES):  # `Config` says why these are
        section, _, name = missing[0].partition(".")
        others = f"; also needed: {', '.join(missing[1:])}" if missing[1:] else ""
        raise ValueError(
            f"{missing[0]} is not set; add {name} to [{section}] in the config file "
            f"or pass --{missing[0]} VALUE{others}."
        )
    sections = {
        section: kind(**{item.name: values[f"{section}.{item.name}"] for item in fields(kind)})
        for section, kind in SECTIONS.items()
    }
    return Config(**sections)  # type: ignore[arg-type]


def _missing(values: Mapping[str, Any]) -> list[str]:
    """The keys that must be set and are not."""
    takes_images = values["gan.enabled"] or not values["backward_simulation.enabled"]
    dmd = values["training.objective"] == "dmd"
    takes_pairs = dmd or values["regression.warmup_iterations"] > 0
    takes_lpips = takes_pairs and values["regression.loss"] != "mse"
    needed = dict(zip(NEEDED_AT_TIMES, (takes_images, takes_pairs, takes_lpips), strict=True))
    return [k for k in TYPES if k not in values or (needed.get(k, False) and values[k] is None)]


def presets() -> dict[str, str]:
    """Each preset's name, and the first line of its file: what it is for."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for path in sorted(PRESETS.glob("*.toml"))
    }


def _preset_path(name: str) -> Path:
    known = presets()
    if name not in known:
        raise ValueError(f'There is no preset "{name}"; the presets are: {", ".join(known)}.')
    return PRESETS / f"{name}.toml"


def _check_table(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for section, content in table.items():
        if not isinstance(content, Mapping):
            raise ValueError(
                f'Unknown key "{section}" in {source}; did you mean "{nearest_key(section)}", '
                "which belongs under its [section]?"
            )
        if section not in SECTIONS:
            closest = difflib.get_close_matches(section, SECTIONS, n=1, cutoff=0.0)[0]
            raise ValueError(f"Unknown section [{section}] in {source}; did you mean [{closest}]?")
        for name, value in content.items():
            key = f"{section}.{name}"
            if key not in TYPES:
                raise ValueError(
                    f'Unknown key "{key}" in {source}; did you mean "{nearest_key(key)}"?'
                )
            values[key] = _checked(key, value)
    return values


def _parse_overrides(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for name, text in overrides:
        key = resolve_key(name)
        if key in typed:
            raise ValueError(f"--{key} is given twice; keep one.")
        typed[key] = _checked(key, python_value(TYPES[key], text))
    return typed


def _apply_ablations(
    names: Sequence[str], below: Mapping[str, Any], typed: Mapping[str, Any]
) -> dict[str, Any]:
    """`below`: the values without the command line; `typed`: the command line's own."""
    changes: dict[str, Any] = {}
    for name in (name for listed in names for name in listed.split(",")):
        if name not in ABLATIONS:
            raise ValueError(f"Unknown ablation {name!r}; choose from {', '.join(ABLATIONS)}.")
        key, value = ABLATIONS[name]
        if key in typed:
            raise ValueError(f"--ablate {name} and --{key} both set {key}; keep one of them.")
        if key in changes or below[key] == value:
            raise ValueError(
                f"--ablate {name} has no effect: {key} is {show_value(value)} already; remove it."
            )
        changes[key] = value
    return changes


def _checked(key: str, value: Any) -> Any:
    """`value` in the type of `key`: lists become tuples, and whole numbers floats where asked."""
    fitted = fit(TYPES[key], value)
    if fitted is MISSING:
        raise ValueError(f"{key} is {show_value(value)}; set it to {describe_type(TYPES[key])}.")
    return fitted
