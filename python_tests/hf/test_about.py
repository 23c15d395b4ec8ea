"""Columns that are named as if they were about the row: what is somebody's text is refused, what is not is reported."""

import json

import pytest

from align_ext.data.metadata import words_in
from align_ext.data.sources import read_source

LETTERS = "abcdefghij"
WORDS = ["river", "stone", "paper", "cloud", "engine", "garden", "window", "market", "silver", "forest"]
WIKI = "The river flows through the old town and past the market"
ABOUT = {  # a column by name, and what it holds in ten rows: whether that is about the row
    "a sentence in each": ("source", lambda i: f"Der Hund Nummer {i} sucht einen Ball.", False),
    "signs for words": ("source_id", lambda i: "今日は天気がいい" + "猫犬鳥魚虫"[i % 5] * i, False),
    "questions": ("subject", lambda i: f"what would {LETTERS[i]}nna say", False),
    "a word in each": ("source", lambda i: WORDS[i], False),
    "a word in another column": ("Domain", lambda i: WORDS[i], False),
    "two words": ("category", lambda i: f"{WORDS[i]} market", False),
    "a title in each": ("title", lambda i: f"The {WORDS[i]}", False),
    "a sign in each": ("source", lambda i: "一二三四五六七八九十"[i], False),
    "Hindi": ("source", lambda i: f"कुत्ता {i} लाल गेंद पसंद करता है", False),
    "Thai": ("source", lambda i: "สุนัขชอบลูกบอลสีแดง" + "กขคงจฉชซญด"[i], False),
    "Khmer": ("source_id", lambda i: "ឆ្កែចូលចិត្តបាល់" + "កខគឃងចឆជឈញ"[i], False),
    "Korean": ("source", lambda i: "개는 공을 좋아한다" + "가나다라마바사아자차"[i], False),
    "hyphens and quotes": ("source_id", lambda i: f"“don't” ({WORDS[i]}) well-known {i}", False),
    "three words in an id": ("row_id", lambda i: f"the old {WORDS[i]}", False),
    "code": ("source_id", lambda i: f"x{i}=1\ny=2", False),
    "a list": ("source", lambda i: [f"The {WORDS[i]}", "is old"], False),
    "an object": ("metadata", lambda i: {"table": [[WORDS[i]], {"b": "is old"}]}, False),
    "names in an object": ("meta", lambda i: {f"the old {WORDS[i]}": 1}, False),
    "a passage of several rows": ("source", lambda i: f"{WIKI} {'abc'[i % 3]}", False),
    "half held by the prompt": ("source", lambda i: [f"please say the number {i}", WORDS[i]], False),
    "a few kinds": ("subject", lambda i: f"high school {('history', 'physics of waves')[i % 2]} questions", True),
    "two long kinds": ("subject", lambda i: f"{WIKI} {'ab'[i % 2]}", True),
    "a few titles": ("title", lambda i: ("University of Notre Dame", "Normans")[i % 2], True),
    "names of files": ("title", lambda i: f"{WORDS[i]}_of_the_town.html", True),
    "numbers": ("question_id", lambda i: f"part {i} of 10", True),
    "a word in an id": ("doc_id", lambda i: WORDS[i], True),
    "addresses": ("source", lambda i: f"https://example.org/some/page-{LETTERS[i]}.html", True),
    "a list of addresses": ("source", lambda i: [f"a/{LETTERS[i]}", {"by": f"{LETTERS[i]}x@example.org"}], True),
    "domains": ("source", lambda i: f"{WORDS[i]}.example.org", True),
    "times": ("timestamp", lambda i: f"2024-01-{i + 10} 12:00:00 UTC", True),
    "Japanese times": ("timestamp", lambda i: f"2024年1月{i}日 12時30分", True),
    "names": ("author", lambda i: f"{'ABCDEFGHIJ'[i]}. Smith", True),
    "long names": ("annotator", lambda i: f"Mary Anne {WORDS[i].title()} of the Hill", True),
    "held by the prompt": ("source", lambda i: f"please say the number {i}", True),
    "a list held by the prompt": ("source", lambda i: ["please say", f"the number {i}"], True),
    "numbers in lists": ("source", lambda i: [i, {"a": i}], True),
}


def write(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("kind", ABOUT)
def test_a_column_named_as_if_it_were_about_the_row_is_refused_where_it_holds_sentences(kind, tmp_path):
    column, text, about = ABOUT[kind]
    rows = [{"prompt": f"please say the number {i}", "answer": str(i), column: text(i)} for i in range(10)]
    file = write(tmp_path / "x.jsonl", rows)
    if about:
        assert read_source(file).unused == {column: 10}
    else:
        with pytest.raises(ValueError, match=f"^the column {column} would be lost, with texts such as"):
            read_source(file)
        assert read_source(file, [column]).unused == {column: 10}
    assert read_source(write(tmp_path / "x.jsonl", rows[:3])).unused == {column: 3}, "of three rows nothing follows"


def test_sentences_are_found_and_quoted_among_rows_that_hold_something_else(tmp_path):
    asked = [{"prompt": f"please say the number {i}", "answer": str(i), "source": "wiki"} for i in range(60)]
    said = [{**row, "source": f"The dog likes the {WORDS[i]} very much"} for i, row in enumerate(asked[:10])]
    with pytest.raises(ValueError, match=r"with texts such as 'The dog likes the"):
        read_source(write(tmp_path / "x.jsonl", asked + said))
    write(tmp_path / "x.jsonl", asked)
    write(tmp_path / "y.jsonl", [{**row, "source": WORDS[i]} for i, row in enumerate(asked[:10])])
    with pytest.raises(ValueError, match=r"the column source would be lost, with texts such as 'river'"):
        read_source(str(tmp_path))


def test_prompt_and_answer_once_more_in_one_text_are_no_sentences_that_would_be_lost(tmp_path):
    rows = [{"prompt": f"What is a {word}?", "answer": f"A {word} is that."} for word in WORDS]
    rows = [{**row, "text": f"### Q: {row['prompt']}\n### A: {row['answer']}"} for row in rows]
    assert read_source(write(tmp_path / "x.jsonl", rows)).unused == {"text": 10}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("The “old” town-hall, (isn't) it?", 5),
        ("river,stone—paper/cloud x_y a@b C:\\d 3rd 12:30 e.org", 2),
        ("कुत्ता लाल है", 3),
        ("สุนัขชอบ", 3),
        ("今天很好。我去12:30", 2),
        ("2024年1月2日", 0),
        ("x\ny", 8),
        ("a b c", 0),
        ("🙂 🙂", 0),
    ],
)
def test_words_are_counted_in_every_script(text, words):
    assert words_in(text) == words
