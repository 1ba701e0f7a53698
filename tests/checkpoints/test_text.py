"""What is quoted from a file cannot act on a terminal."""

from __future__ import annotations

import pytest

from relu_doctor.text import clean_text, closest_name, name_some


@pytest.mark.parametrize(
    "text", ["\x1b[31mred", "a\nb", "a\r\tb", "\x9b1m", "\u202eabc", "\u2028", "\ud800", "\x00", "\u200b"]
)
def test_no_unprintable_character_is_left(text):
    assert clean_text(text).isprintable()
    clean_text(text).encode("utf-8")


def test_a_long_text_is_cut_and_says_so():
    assert clean_text("x" * 500, 20) == "x" * 19 + "…"


def test_printable_text_is_unchanged():
    assert clean_text("Größe: 3x32 – [bold]") == "Größe: 3x32 – [bold]"


def test_an_object_whose_str_fails_is_named_by_its_type():
    class Rude:
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert clean_text(Rude()) == "<Rude>"


def test_a_list_of_names_is_cut_with_a_count():
    assert name_some("abcdef", 2) == "'a', 'b' and 4 more"


def test_the_closest_name_is_found_or_none():
    assert closest_name("fc1.wieght", ["fc1.weight", "conv"]) == "fc1.weight"
    assert closest_name("zzz", ["fc1.weight"]) is None
