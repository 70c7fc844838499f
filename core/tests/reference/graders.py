"""Writes graders.json: graders.py > graders.json.

Similarities of pairs of texts by rapidfuzz 3.14, nltk 3.9.2 and rouge-score 0.1.2. nltk gives a
BLEU without a common 4-gram as a number near 1e-231 and warns; by the formula it is 0.
"""

import json
import sys
import warnings

from nltk.translate.bleu_score import sentence_bleu
from nltk.translate.gleu_score import sentence_gleu
from rapidfuzz import fuzz
from rouge_score.rouge_scorer import RougeScorer

PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("the cat sat on the mat today", "the cat sat on the mat"),
    ("the cat sat on", "the cat sat on the mat"),
    ("the the the the the the the", "the cat is on the mat"),
    ("It is a guide to action which ensures that the military always obeys the commands of the party",
     "It is a guide to action that ensures that the military will forever heed Party commands"),
    ("Paris", "paris"),
    ("kitten", "sitting"),
    ("a b c d e f", "f e d c b a"),
    ("Hello, World! 42", "hello world 42"),
    ("größe über alles", "Grösse über alles"),
    ("one two three four five six seven", "one two four five six seven eight"),
    ("nothing in common", "xyz"),
    ("the quick brown fox jumps over the lazy dog and runs away",
     "the quick brown fox jumped over the lazy dog and ran away"),
]


def scores(answer, reference):
    a, b = answer.split(), reference.split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bleu = sentence_bleu([b], a)
    names = ["rouge1", "rouge2", "rouge3", "rouge4", "rouge5", "rougeL"]
    rouge = RougeScorer(names, use_stemmer=False).score(reference, answer)
    found = {
        "fuzzy_match": fuzz.ratio(answer, reference) / 100,
        "bleu": 0.0 if bleu < 1e-70 else bleu,
        "gleu": sentence_gleu([b], a),
    }
    for name in names:
        found["rouge_" + name[5:].lower()] = rouge[name].fmeasure
    return found


def main():
    cases = [{"input": a, "reference": b, "scores": scores(a, b)} for a, b in PAIRS]
    json.dump({"cases": cases}, sys.stdout, indent=1, ensure_ascii=False)
    print()


if __name__ == "__main__":
    main()
