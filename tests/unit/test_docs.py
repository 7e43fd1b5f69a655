"""README and docs/ name files, configurations and keys that exist, and every page is in the index."""

import re
from pathlib import Path

import pytest
import yaml

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


def test_every_page_is_in_the_index():
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert listed == {page.name for page in PAGES} - {"README.md", "index.md"}


def test_every_configuration_of_a_layout_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for config in (ROOT / "configs").glob("*.yaml"):
        if "parallel" in yaml.safe_load(config.read_text()):
            assert f"configs/{config.name}" in text, config.name
