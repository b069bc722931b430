"""The documentation names what there is: links resolve, and the table of options is that of the code."""

import re
import subprocess
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path

import pytest
from typer.main import get_command

from nanoflow_compiler import LLM, CompileConfig, SamplingParams
from nanoflow_compiler.cli import app
from nanoflow_compiler.engine.engine_config import EngineConfig

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
ROW = re.compile(r"^\| ([^|]+) \| `([^`|]+)` \| ([^|]+) \|", re.MULTILINE)


def pages():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in listing.split("\0") if name and (ROOT / name).exists())


def links(page):
    found = LINK.findall(CODE.sub("", (ROOT / page).read_text(encoding="utf-8")))
    return [link for link in found if "://" not in link]


def anchors(path):
    """As GitHub makes them of headings: lower case, no punctuation, hyphens for spaces."""
    headings = HEADING.findall(CODE.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", pages())
def test_relative_links_resolve(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{page} links to {link}: no such heading"


def test_every_page_can_be_reached_from_the_readme():
    reached, pending = set(), ["README.md"]
    while pending:
        page = pending.pop()
        reached.add(page)
        targets = {(ROOT / page).parent / link.partition("#")[0] for link in links(page)}
        names = {str(t.resolve().relative_to(ROOT)) for t in targets if t.suffix == ".md"}
        pending += names - reached
    listed = {page for page in pages() if not page.startswith("docs/design/")}
    assert listed <= reached


def documented(place):
    """Default, as the table of options shows it, by name."""
    text = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    found = ROW.findall(text)
    rows = [(name, default) for where, name, default in found if place in where.split(", ")]
    assert len(dict(rows)) == len(rows), f"an option of {place} is listed twice"
    return dict(rows)


def shown(default):
    return "required" if default is Parameter.empty else f"`{default!r}`"


def parameters(function):
    found = signature(function).parameters.values()
    return {item.name: item.default for item in found if item.name != "self"}


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("compile", {field.name: field.default for field in fields(CompileConfig)}),
        ("`LLM`", parameters(LLM.__init__)),
        ("`SamplingParams`", {field.name: field.default for field in fields(SamplingParams)}),
    ],
)
def test_options_in_python_are_those_of_the_table(place, options):
    assert documented(place) == {name: shown(default) for name, default in options.items()}


def test_sizes_of_the_engine_are_options_of_llm():
    assert {field.name for field in fields(EngineConfig)} <= parameters(LLM.__init__).keys()


def commands(group, prefix=""):
    """Of all depths, by what a user types."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(commands(get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_those_of_the_table(name):
    defaults = parameters(COMMANDS[name].callback)
    flags = {_flag(option): shown(defaults[option.name]) for option in COMMANDS[name].params}
    assert documented(f"`{name}`") == flags


def test_the_table_has_no_other_commands():
    text = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    places = {place for where, _, _ in ROW.findall(text) for place in where.split(", ")}
    assert places - {"compile", "`LLM`", "`SamplingParams`"} == {f"`{name}`" for name in COMMANDS}


def _flag(option):
    if option.param_type_name == "argument":
        return option.name.upper()
    return "/".join([*option.opts, *option.secondary_opts])
