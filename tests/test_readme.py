"""What the README says of models and weights is what the code reads."""

from tests.readme_tables import README, with_tables


def test_the_tables_are_those_of_the_code() -> None:
    text = README.read_text("utf-8")
    assert text == with_tables(text), "python -m tests.readme_tables writes them again"
