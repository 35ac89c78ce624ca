"""Configuration files in the formats that projects use, with one setting that a task asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from pytest_pocket import words
from pytest_pocket.task import Draw, Kinds

Sections = dict[str, dict[str, str]]


def _scalar(value: str) -> str:
    return value if value.isdigit() else f'"{value}"'


def _ini(sections: Sections) -> str:
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
        for name, keys in sections.items()
    )


def _toml(sections: Sections) -> str:
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {_scalar(value)}\n" for key, value in keys.items())
        for name, keys in sections.items()
    )


def _json(sections: Sections) -> str:
    typed = {
        name: {key: int(value) if value.isdigit() else value for key, value in keys.items()}
        for name, keys in sections.items()
    }
    return json.dumps(typed, indent=2) + "\n"


def _yaml(sections: Sections) -> str:
    return "".join(
        f"{name}:\n" + "".join(f"  {key}: {value}\n" for key, value in keys.items())
        for name, keys in sections.items()
    )


def _env(sections: Sections) -> str:
    return "".join(
        f"{name.upper()}_{key.upper()}={value}\n"
        for name, keys in sections.items()
        for key, value in keys.items()
    )


def _properties(sections: Sections) -> str:
    return "".join(
        f"{name}.{key} = {value}\n" for name, keys in sections.items() for key, value in keys.items()
    )


def _apache(sections: Sections) -> str:
    return "".join(
        f"<{name}>\n" + "".join(f"    {key} {value}\n" for key, value in keys.items()) + f"</{name}>\n"
        for name, keys in sections.items()
    )


@dataclass(frozen=True)
class Format:
    """How a format writes sections of settings; ``flat`` formats name a setting by section and key in one word."""

    ending: str
    render: Callable[[Sections], str]
    flat: Callable[[str, str], str] | None = None


FORMATS = Kinds(
    train=[
        Format("ini", _ini),
        Format("toml", _toml),
        Format("json", _json),
        Format("yaml", _yaml),
        Format("env", _env, lambda section, key: f"{section}_{key}".upper()),
    ],
    dev=[Format("properties", _properties, lambda section, key: f"{section}.{key}")],
    eval=[Format("conf", _apache)],
)

LOCATIONS = Kinds(
    train=[
        "`{key}` in the section `{section}`",
        "`{key}` under `{section}`",
        "the setting `{key}` of `{section}`",
        "`{section}` / `{key}`",
    ],
    dev=["`{key}` within `{section}`"],
    eval=["`{section}` > `{key}`", "`{key}`, in the part called `{section}`,"],
)


@dataclass(frozen=True)
class Config:
    """A drawn configuration: where it lies, what it says, and the setting to look for.

    ``setting`` names the setting for a prompt; ``section`` and ``key`` are as spelled in the file (for a flat
    format, ``section`` is "" and ``key`` the whole name).
    """

    path: str
    format: Format
    sections: Sections
    section: str
    key: str
    setting: str
    value: str

    def text(self, value: str | None = None) -> str:
        """The file's text, with the setting changed to ``value`` if given."""
        return self.format.render(self.sections if value is None else self._with(value))

    def find(self) -> str:
        """A command that prints the setting's line alone."""
        if not self.section:
            return f"grep -m 1 {self.key} {self.path}"
        return f"grep -A 20 {self.section} {self.path} | grep -m 1 {self.key}"

    def change(self, old: str, new: str) -> str:
        """A command that changes the setting's value and nothing else."""
        if not self.section:
            return f"sed -i '/{self.key}/ s/{old}/{new}/' {self.path}"
        return f"sed -i '/{self.section}/,/{self.key}/ {{ /{self.key}/ s/{old}/{new}/ }}' {self.path}"

    def _with(self, value: str) -> Sections:
        return {
            section: {key: value if self._is_setting(section, key) else old for key, old in keys.items()}
            for section, keys in self.sections.items()
        }

    def _is_setting(self, section: str, key: str) -> bool:
        if self.format.flat:
            return self.format.flat(section, key) == self.key
        return (section, key) == (self.section, self.key)


def draw_config(draw: Draw) -> Config:
    """A file of two to four sections that share some keys, so that the key alone does not find the setting."""
    shape = draw.kind("layout", FORMATS)
    stem, *names = words.nouns(draw, 1 + 4 + 7)
    sections_names, keys = names[: draw.number(2, 4)], names[4:]
    shared = draw.sample(keys, 2)
    settings = words.values(draw, 16, avoid=names)
    sections: Sections = {}
    for name in sections_names:
        own = [*shared, *draw.sample([key for key in keys if key not in shared], draw.number(1, 2))]
        draw.random.shuffle(own)
        sections[name] = {key: settings.pop() for key in own}
    section = draw.pick(sections_names)
    key = draw.pick(list(sections[section]))
    path = f"{words.directory(draw)}{stem}.{shape.ending}"
    where = draw.kind("wording", LOCATIONS).format(section=section, key=key)
    if shape.flat:
        spelled = shape.flat(section, key)
        return Config(path, shape, sections, "", spelled, f"`{spelled}`", sections[section][key])
    return Config(path, shape, sections, section, key, where, sections[section][key])


def decoy(draw: Draw, config: Config) -> dict[str, str]:
    """Another file of the same shape with the same keys and other values, and a note that mentions neither."""
    folder = words.directory(draw)
    stems = [noun for noun in words.nouns(draw, 6) if noun not in config.path][:2]
    other = words.values(
        draw, 16, avoid=[*config.sections, *(key for keys in config.sections.values() for key in keys)]
    )
    sections = {name: {key: other.pop() for key in keys} for name, keys in config.sections.items()}
    return {
        f"{folder}{stems[0]}.{config.format.ending}": config.format.render(sections),
        f"{stems[1]}.md": words.sentence(draw) + "\n",
    }
