"""README and docs/ name files, configurations and keys that exist, and every page is in the index."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from dtrain.launch import configuration

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_names_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(
        r"\b((?:configs|examples|tests|dtrain|strategies|launch|collectives)/[\w/]+\.(?:py|yaml))", text
    ):
        assert (ROOT / name).exists(), name


COMMAND = re.compile(r"mpirun -n (\d+) dtrain (?:run|verify) (configs/\S+\.yaml)((?: (?:[\w.]+=[^\s`']+|'[^']+'))*)")


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("configs/*.yaml"))], ids=lambda path: path.name)
def test_commands_fit_their_ranks(page):
    for ranks, config, overrides in COMMAND.findall(page.read_text()):
        loaded = configuration.load(ROOT / config, shlex.split(overrides))
        servers = loaded.parameter_server.servers  # they are no part of the mesh
        configuration.for_ranks(loaded, int(ranks) - servers)


def test_every_page_is_in_the_index():
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert listed == {page.name for page in PAGES} - {"README.md", "index.md"}


def test_every_configuration_of_a_layout_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for config in (ROOT / "configs").glob("*.yaml"):
        if "parallel" in yaml.safe_load(config.read_text()):
            assert f"configs/{config.name}" in text, config.name
