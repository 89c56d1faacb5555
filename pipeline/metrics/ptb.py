"""Words of a caption as the published figures of captions count them: Penn Treebank tokens in lower case, without Java.

COCO's caption evaluation (Chen et al. 2015, arXiv:1504.00325) runs PTBTokenizer of Stanford CoreNLP 3.4.1, in Java,
with -lowerCase, and drops the tokens of a list. Here a regular expression has its rules for what captions hold; the
list is the library's own, by which round brackets stay: in lower case they are `-lrb-` and `-rrb-`, and not in it.

Equal: contractions (do n't, dog 's, it 's), common abbreviations (u.s., p.m., mr.), numbers (10.5, 1,000, 3/4), words
with hyphens, slashes and dots inside, quotation marks straight and curled, dashes, brackets, sentences in a caption;
and all of 3,750 captions of Flickr8k. Different: Java knows more abbreviations (no. before a number), web addresses,
faces such as :-) and markup such as <b> as one token each, and more words with apostrophes (ne'er, y' all, l'eau); it
cuts units off numbers (2.5 lb), writes currencies as $ or #, and drops characters that it does not know, such as
emoji.
"""

from __future__ import annotations

import re

ABBREVIATIONS = (
    "mr mrs ms dr prof rev hon gov sen rep pres gen col lt capt sgt jr sr ph.d st mt ft ave blvd rd vs etc inc co corp "
    "ltd jan feb mar apr jun jul aug sep sept oct nov dec"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ASCII = str.maketrans(
    {
        **dict.fromkeys("‘’", "'"), **dict.fromkeys("“”„«»", '"'), **dict.fromkeys("–—―", "--"), "…": "...",
        **{mark: f" {name} " for mark, name in _BRACKETS.items()},
    }
)  # fmt: skip
_TOKEN = re.compile(
    rf"""
      -[lr][rsc]b-                                                # a bracket
    | (?:[a-z]\.)+(?![^\W_])                                      # u.s., p.m., an initial
    | (?:{"|".join(map(re.escape, ABBREVIATIONS.split()))})\.(?!\w)
    | (?:can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | gim(?=me\b) | lem(?=me\b))
    | 't(?=is\b|was\b) | '(?:n'|em\b|til\b|cause\b|\d\ds?\b)      # 'tis, rock 'n' roll, 'em, '90s
    | n't\b | '(?:s|m|d|re|ve|ll)\b
    | [a-z]+?(?=n't\b) | [od]'[a-z]{{2,}} | ma'am\b               # do n't, o'clock
    | [+-]?\.?\d+(?:[.,:/-]\d+)*(?![-./:]?[^\W_])                 # 10.5, 1,000, 10:30, 3/4
    | [^\W_]+(?:[-./&@_][^\W_]+)*                                 # t-shirt, at&t
    | \.{{2,}} | -{{2,}} | [?!]+ | '' | `` | \S
    """,
    re.VERBOSE,
)


def tokens(text: str) -> str:
    """The tokens of a caption, a space between each and the next, as pycocoevalcap's scorers take them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS  # a list; what runs Java is not touched

    dropped = {*PUNCTUATIONS, '"'}
    found = (match[0] for match in _TOKEN.finditer(text.lower().translate(_ASCII)))
    return " ".join(token for token in found if token not in dropped and token[:2] not in ("..", "--"))
