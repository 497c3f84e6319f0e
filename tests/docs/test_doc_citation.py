"""CITATION.cff has what its schema (1.2.0) requires, and agrees with README and setup.py."""

import yaml
from doc_pages import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_required_keys_and_kinds():
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    for work in (CITATION, CITATION["preferred-citation"]):
        assert work["title"] and work["authors"]
        assert all(
            {"family-names", "given-names"} <= a.keys() or "name" in a for a in work["authors"]
        )
    assert {"message", "license", "version"} <= CITATION.keys()
    assert CITATION["preferred-citation"]["type"] == "conference-paper"


def test_the_version_is_the_packages():
    assert f'version="{CITATION["version"]}"' in (ROOT / "setup.py").read_text()


def test_the_paper_is_the_readmes():
    paper, readme = CITATION["preferred-citation"], (ROOT / "README.md").read_text()
    names = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert f"author={{{names}}}" in readme and f"title={{{paper['title']}}}" in readme
    assert f"year={{{paper['year']}}}" in readme
