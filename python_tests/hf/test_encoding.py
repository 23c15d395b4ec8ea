"""Tokens of prompts and answers, by tokenizers that add marks of their own, merge letters, or have a chat template."""

import resource

import pytest
import torch
from hf.words import TEMPLATE, llama, tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align_ext.data.encode import encode, features, fits
from align_ext.data.rows import Example
from align_ext.evaluation.evaluate import evaluate

MARKS = ["[PAD]", "<s>", "</s>", "<mask>"]
WITH_BOS = "{{ bos_token }}" + TEMPLATE
TALK = (("system", "Be kind."), ("user", "hi"), ("assistant", "ho"), ("user", "2+2="))
TEXT = "the answer is four\nthe answer is \nfour is the answer\n 2+2= and five <user><bot>"


def made(opening="", closing="", *, kind="bpe", template=None, eos="</s>"):
    """A tokenizer of merged letters that puts marks before and behind a text, trained on a few words."""
    bpe = models.BPE(unk_token=None, byte_fallback=False) if kind != "unigram" else models.Unigram()
    inner = Tokenizer(bpe)
    if kind == "metaspace":
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:  # one word of everything, so that merges go over every border
        inner.normalizer = normalizers.NFC()
        inner.decoder = decoders.Fuse()
    alphabet = [chr(i) for i in range(32, 127)] + ["\n", "\u2581"]
    trainer = {"unigram": trainers.UnigramTrainer}.get(kind, trainers.BpeTrainer)
    inner.train_from_iterator([TEXT] * 9, trainer(vocab_size=180, special_tokens=MARKS, initial_alphabet=alphabet))
    parts = f"{opening} $A {closing}".split()
    special = [(mark, inner.token_to_id(mark)) for mark in MARKS]
    inner.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=special)
    names = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": eos, "clean_up_tokenization_spaces": False}
    result = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    result.chat_template = template
    return result


@pytest.mark.parametrize("kind", ["bpe", "metaspace", "unigram"])
@pytest.mark.parametrize("opening", ["", "<s>", "<mask> <s>"])
@pytest.mark.parametrize("closing", ["", "</s>", "</s> <mask>"])
def test_marks_before_a_prompt_stay_and_those_behind_it_never_stand_before_the_answer(kind, opening, closing):
    words = made(opening, closing, kind=kind)
    prompt, answer = encode(words, "the answer is", "four")
    text = words("the answer is\n", add_special_tokens=False)["input_ids"]
    assert prompt == words.convert_tokens_to_ids(opening.split()) + text
    assert answer == [*words("four", add_special_tokens=False)["input_ids"], words.eos_token_id]
    assert words("the answer is\n")["input_ids"][-1] == (words.convert_tokens_to_ids(closing.split() or ["x"])[-1]
                                                         if closing else text[-1])  # fmt: skip
    (row,) = features(words, [Example("t", "the answer is", "four")], {"t": 0})
    assert row["input_ids"].count(words.eos_token_id) == 1
    assert row["input_ids"][-1] == words.eos_token_id


def test_a_prompt_that_holds_marks_itself_keeps_them():
    for opening in ("", "<s>"):
        words = made(opening, "</s>")
        prompt, _ = encode(words, "<s></s>the", "four")
        assert words.decode(prompt) == f"{opening}<s></s>the\n"


@pytest.mark.parametrize("template", [TEMPLATE, WITH_BOS])
@pytest.mark.parametrize(("opening", "closing"), [("", ""), ("<s>", ""), ("", "</s>"), ("<s>", "</s>")])
def test_a_chat_template_writes_all_marks_itself(template, opening, closing):
    words = made(opening, closing, template=template)
    begin = "<s>" if template is WITH_BOS else ""
    prompt, answer = encode(words, "2+2=", "four")
    assert words.decode(prompt) == f"{begin}<user>2+2=<bot>"
    assert words.decode(answer) == "four</s>"
    prompt, _ = encode(words, TALK, "four")
    assert words.decode(prompt) == f"{begin}<system>Be kind.<user>hi<assistant>ho<user>2+2=<bot>"
    own = words.apply_chat_template(
        [{"role": role, "content": text} for role, text in TALK], add_generation_prompt=True, return_dict=False
    )
    assert prompt == list(own)


def test_a_tokenizer_without_an_end_token_adds_none():
    _, answer = encode(made("<s>", "</s>", eos=None), "the", "four")
    assert made().decode(answer) == "four"


@pytest.mark.parametrize(
    ("template", "prompt", "said"),
    [
        (None, TALK, "needs a chat template, and this tokenizer has none"),
        ("{{ raise_exception('System role not supported') }}", TALK, "refuses the prompt: System role not supported"),
        ("{{ messages[0].name.first }}", "hi", "refuses the prompt"),
        ("{% if %}", "hi", "refuses the prompt"),
        ("{{ messages[-1].content }}", TALK, "leaves out text of the system's turn"),
        ("none", "hi", "leaves out text of the user's turn"),
    ],
)
def test_what_a_template_cannot_hold_is_refused_with_the_row(template, prompt, said):
    example = Example("t", prompt, "four", where="x.jsonl, line 3")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 3: ") as caught:
        fits(made(template=template), example, 99)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_or_prompt_of_no_tokens_is_refused():
    words = made()
    words.backend_tokenizer.normalizer = normalizers.Replace("\N{SNOWMAN}", "")
    with pytest.raises(ValueError, match="line 3: the tokenizer makes no token of the answer '\N{SNOWMAN}'"):
        fits(words, Example("t", "the", "\N{SNOWMAN}", where="line 3"), 99)
    words.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(ValueError, match="makes no token of the prompt"):
        fits(words, Example("t", " ", "four", where="line 3"), 99)


@pytest.mark.parametrize("chat", [False, True])
def test_labels_stand_on_the_answer_and_the_end_token_alone(chat):
    words = tokenizer(chat)
    (row,) = features(words, [Example("t", "2+2=", "four")], {"t": 3})
    text = words.decode(row["input_ids"])
    assert text == ("<user>2+2=<bot>four[END]" if chat else "2+2=\nfour[END]")
    supervised = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert words.decode(supervised) == "four[END]"
    assert row["labels"][-len(supervised) :] == supervised
    assert (row["task_ids"], sum(row["attention_mask"])) == (3, len(row["input_ids"]))


@pytest.mark.parametrize("template", [None, WITH_BOS])
@pytest.mark.parametrize("choices", [(), ("four", "the answer is five")])
def test_scoring_and_generation_see_the_prompt_that_is_trained(template, choices, monkeypatch):
    words = made("<s>", "</s>", template=template)
    examples = [
        Example("t", prompt, "four", choices, 0 if choices else -1) for prompt in ("2+2=", "the answer is", "5")
    ]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(words), pad_token_id=0)).eval()
    seen, forwarded, generate, forward = [], [], model.generate, model.forward

    def watched(input_ids, attention_mask, **options):
        seen.extend(x[m.bool()].tolist() for x, m in zip(input_ids, attention_mask, strict=True))
        return generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    def watched_forward(input_ids, attention_mask=None, use_cache=None, **options):
        if use_cache is False:  # not a step of generate
            forwarded.extend(x[m.bool()].tolist() for x, m in zip(input_ids, attention_mask, strict=True))
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **options)

    monkeypatch.setattr(model, "generate", watched)
    monkeypatch.setattr(model, "forward", watched_forward)
    evaluate(model, words, examples, generate="all")
    trained = list(features(words, examples, {"t": 0}))
    prompts = [
        [x for x, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100] for row in trained
    ]
    assert sorted(seen) == sorted(prompts)
    assert all(row["input_ids"] in forwarded for row in trained)
    assert len(forwarded) == len(examples) * max(1, len(choices))


def test_an_example_fits_whole_with_each_of_its_answers_or_not_at_all():
    assert fits(tokenizer(), Example("t", "12345", "67"), 9)
    assert not fits(tokenizer(), Example("t", "12345", "678"), 9)
    assert not fits(tokenizer(), Example("t", "1", "2", ("2", "3" * 9), 0), 9)


@pytest.mark.parametrize("size", [5_000, 40_000])
def test_blanks_that_become_one_token_do_not_make_a_text_too_long(size):
    words = tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    assert fits(words, Example("t", "a" + " " * size + "b", "c"), 9)
    assert not fits(words, Example("t", "a" + " " * size + "b" * 9, "c"), 9)


@pytest.mark.parametrize("chat", [False, True])
def test_a_huge_prompt_is_too_long_without_being_tokenised(chat):
    words, calls = tokenizer(chat), []

    class Counted:
        eos_token_id, chat_template = words.eos_token_id, words.chat_template
        apply_chat_template = words.apply_chat_template

        def __call__(self, text, **options):
            calls.append(len(text))
            return words(text, **options)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for example in (Example("t", "x" * 16_000_000, "c"), Example("t", "x", "c" * 16_000_000)):
        assert not fits(Counted(), example, 256)
    assert max(calls) < 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_a_conversation_trains_a_model_with_a_template():
    words = tokenizer(chat=True)
    scores = evaluate(llama(), words, [Example("t", TALK, "four")])
    assert scores["t"].examples == 1
