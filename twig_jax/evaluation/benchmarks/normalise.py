"""Answers as the EvalAI scorers of VQAv2 and TextVQA compare them.

The rules, oddities included, are those of the official VQA evaluation (visualqa.org) and of the
TextVQA scorer in facebookresearch/mmf.
"""

import re
from collections.abc import Sequence

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")
# The official scripts hand a flag to a parameter that counts: so many periods go, no more.
_PERIODS = int(re.UNICODE)

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# Where one apostrophe is missing it is put back.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED
    for i, letter in enumerate(word)
    if letter == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table's slip


def blank(text: str) -> str:
    """Breaks and tabs are spaces, and none is at an end."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _unpunctuated(text: str) -> str:
    """A mark goes where a space is beside it or digits have commas, and is a space elsewhere."""
    out = text
    drops = _COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if drops or beside else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def vqa(text: str) -> str:
    """Of the VQA evaluation: no punctuation and articles, digits, apostrophes in contractions."""
    text = _unpunctuated(blank(text))
    words = [_DIGITS.get(w, w) for w in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def textvqa(text: str) -> str:
    """Of the TextVQA scorer: in small letters, no commas and question marks, "'s" apart."""
    return vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def consensus(answer: str, annotators: Sequence[str]) -> float:
    """min(1, agreeing annotators / 3), the mean over leaving each annotator out in turn."""
    agree = [other == answer for other in annotators]
    return sum(min(1.0, (sum(agree) - one) / 3) for one in agree) / len(agree)
