"""Where a text says something: words that spaces set apart, and scripts that set none."""

from __future__ import annotations

import time

import pytest

from patcher.text import encodable, naming, says


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("It is in PARIS, France.", "Paris"),
        ("It is in Paris_ or so", "Paris_"),
        ("巴黎是法国的首都。", "巴黎"),  # Han
        ("法国的首都是巴黎市", "巴黎"),
        ("フランスの首都はパリです。", "パリ"),  # kana
        ("それはﾊﾟﾘです", "ﾊﾟﾘ"),  # halfwidth
        ("あれはひらがなだ", "ひらがな"),
        ("프랑스의 수도는 파리입니다.", "파리"),  # Hangul, with a particle
        ("ปารีสเป็นเมืองหลวงของฝรั่งเศส", "ปารีส"),  # Thai
        ("ပါရီမြို့တော်ဖြစ်သည်", "ပါရီ"),  # Myanmar
        ("首都是Paris。", "Paris"),  # Latin beside Han, kana, Hangul, Thai
        ("首都はParisです", "paris"),
        ("수도는 Paris입니다", "Paris"),
        ("คือParisครับ", "Paris"),
        ("他在巴黎ABC工作", "巴黎ABC"),
        ("abc巴黎def", "巴黎"),
        ("\U00020bb7野家で", "\U00020bb7野家"),  # Han beyond the first plane
    ],
)
def test_it_is_said(text: str, target: str) -> None:
    assert says(text, target)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("a comparison", "Paris"),
        ("Parisian", "Paris"),
        ("in 1935", "35"),
        ("Paris_", "Paris"),
        ("Парижанин", "Париж"),  # Cyrillic has spaces
        ("他在巴黎ABCD工作", "巴黎ABC"),  # it ends within a Latin word
        ("他说XABC巴黎", "ABC巴黎"),
        ("巴和黎", "巴黎"),
        ("首都是Parisian。", "Paris"),
    ],
)
def test_it_is_not_said(text: str, target: str) -> None:
    assert not says(text, target)


def test_any_of_several_and_none_of_none() -> None:
    named = naming(["Ada Vell", " 巴黎 ", "C++"])
    for text in ("of ada vell.", "在巴黎市", "in c++, and"):
        assert named.search(text), text
    assert not named.search("ada vellum")
    assert not naming([]).search("")
    assert not naming([]).search("anything")


def test_a_word_that_another_begins_with_is_found_too() -> None:
    assert naming(["Ada", "Ada Vell"]).search("ada vellum")
    assert naming(["Ada Vell", "Ada"]).search("ada vellum")
    assert naming(["Ad", "Ada"]).search("of ada")


def test_thousands_of_names_take_no_time_each() -> None:
    begun = time.process_time()
    named = naming(f"Name{n} Of{n}" for n in range(5000))
    assert named.search("so says name4999 of4999.")
    assert not named.search("nobody " * 1000)
    assert time.process_time() - begun < 5  # a pattern of 5,000 classes took 25 s


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    assert encodable("巴黎 \U00020bb7")
    assert not encodable("a \ud800")
