"""Counts the differences between the fast and the exact way of GPT-1's tokenizer, by kind.

    python scripts/compare_words.py encoder_bpe_40000.json vocab_40000.bpe FILES...

It needs ftfy and spaCy. docs/tokenization.md has its results.
"""

import collections
import difflib
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gptjax.data.tokens import tokenizer

# The kind of a difference is that of the first pattern that its text matches.
KINDS = (
    ("contraction or possessive", r"'"),
    ("run of one mark", r"([^\w\s])\s*\1"),
    ("number with a mark or a unit", r"\d"),
    ("abbreviation, initial or address", r"\w\s*\.|\.\s*\w"),
    ("colon, slash or sign inside a word", r"\w\s*[^\w\s]\s*\w"),
    ("mark at the edge of a word", r"[^\w\s]"),
    ("word that spaCy divides", r"[a-z]"),
)


def kind(text: str) -> str:
    """Returns the kind of a text that two tokenizers divide in different ways."""
    return next((name for name, pattern in KINDS if re.search(pattern, text)), "other scripts")


def main(vocabulary: str, merges: str, *files: str) -> None:
    """Prints the counts, most frequent first, with examples."""
    exact = tokenizer.load_gpt1(vocabulary, merges, exact=True)
    fast = tokenizer.load_gpt1(vocabulary, merges)
    lines = [
        line
        for name in files
        for line in pathlib.Path(name).read_text(encoding="utf-8-sig").splitlines()
        if line.strip()
    ]
    counts: collections.Counter[str] = collections.Counter()
    examples = collections.defaultdict(collections.Counter)
    total = same_lines = 0

    def text(ids: list[int]) -> str:
        return "".join(exact.token(i) for i in ids).replace("</w>", " ").strip()

    for wanted, found in zip(exact.encode_batch(lines), fast.encode_batch(lines), strict=True):
        wanted, found = wanted.tolist(), found.tolist()
        total += len(wanted)
        same_lines += wanted == found
        if wanted == found:
            continue
        matcher = difflib.SequenceMatcher(None, wanted, found, autojunk=False)
        for tag, a, b, c, d in matcher.get_opcodes():
            if tag != "equal":
                left, right = text(wanted[a:b]), text(found[c:d])
                name = kind(max(left, right, key=len))
                counts[name] += b - a or 1
                examples[name][f"{left} | {right}"] += 1
    rows = len(lines)
    print(f"{rows:,} lines, {total:,} exact tokens; {same_lines / rows:.2%} of the lines are equal")
    print(f"{1 - counts.total() / total:.2%} of the exact tokens are found")
    for name, count in counts.most_common():
        shown = ", ".join(f"`{each}`" for each, _ in examples[name].most_common(4))
        print(f"| {name} | {count:,} | {count / total:.3%} | {shown} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
