"""Templates escape for HTML alone, and refuse a name that nobody gave."""

import jinja2
import pytest

from senseflow.common.templates import markdown_table, templates


def test_html_is_escaped_and_markdown_is_not(tmp_path):
    for name in ("page.html", "card.md.j2"):
        (tmp_path / name).write_text("{{ words }}\n")
    given = {"words": 'a < b & "c"'}
    page = templates(tmp_path).get_template("page.html").render(given)
    assert page == "a &lt; b &amp; &#34;c&#34;\n"
    assert templates(tmp_path).get_template("card.md.j2").render(given) == 'a < b & "c"\n'


def test_a_name_nobody_gave_is_an_error(tmp_path):
    (tmp_path / "page.html").write_text("{{ misspelt }}")
    with pytest.raises(jinja2.UndefinedError, match="misspelt"):
        templates(tmp_path).get_template("page.html").render({})


def test_a_markdown_table_is_one_that_a_reader_of_markdown_sees():
    text = markdown_table(["", "FID"], [["teacher", "4.9"], ["student", ""]])
    assert text == "| | FID |\n|---|---|\n| teacher | 4.9 |\n| student | |\n"
