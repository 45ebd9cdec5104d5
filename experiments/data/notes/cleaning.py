"""How texts of notes become words.

`official` is what the published scores were made with, oddities included: stop words are compared
after stemming, so that of those listed some survive as stems and others never match; numbers and
short words go, so that "no" is lost and "without" stays; digits become n. `minimal` keeps what a
reader needs to tell a denial from a finding: lower case, words of letters and digits, nothing else.
"""

import dataclasses
import functools
import re
import string
from collections.abc import Callable, Iterator

from attnzoo.experiments.data.errors import refuse, suggest

RULES = ("official", "minimal")

# Between the notes of one admission, which are cleaned each by itself: a record separator. To the
# official rules it is white space, so a loader may write a blank for one that a note already has.
NOTE_BREAK = "\x1e"

# Stored with a vocabulary: another implementation of the same algorithm makes other stems of some
# words (of 13,078 medical ones the snowballstemmer package differs in 17).
_STEMMER = "nltk EnglishStemmer (Porter2)"

# Only those that a stemmed word of three letters or more can equal.
_STOP_WORDS = frozenset(
  """
  myself our you your yourself him his himself she her herself itself they them their what which
  who whom this that these those are was were been have has had did the and but until while for
  with about against between into through after below from down out off over under again further
  then here there when where how all both each few more most other some such nor not own same than
  too can will just don should now ain aren couldn didn doesn hadn hasn haven isn mightn mustn needn
  shan shouldn wasn weren won wouldn
  birth date sex patient name last first past day one chief complaint
  """.split()
)

_BLANKS = str.maketrans(dict.fromkeys(set(string.punctuation) - {"-"}, " "))
_RAW_WORD = re.compile(r"\S+")
_MINIMAL_WORD = re.compile(r"[^\W_]+")
_NUMBER_BEFORE_SPACE = re.compile(r"\d+\s")
_NUMBER_AT_END = re.compile(r"\d+$")
_DIGIT = re.compile(r"\d")
_CACHED_WORDS = 1 << 18


@dataclasses.dataclass(frozen=True)
class Token:
  """A word of the cleaned text, and the stretch [start, end) of the raw text that it came from."""

  word: str
  start: int
  end: int


def stemmer_name(rules: str) -> str:
  """What is recorded with a vocabulary of texts cleaned by these rules; "" = no stemmer."""
  return _STEMMER if _check(rules) == "official" else ""


def clean(text: str, rules: str = "official") -> str:
  """The cleaned text. Official ones may hold double spaces and one-letter words: split them.

  Official, in this order: lower case, punctuation but `-` to spaces; the Porter2 stem of every
  word; without numbers, stems of less than three characters and stop words; joined by one space;
  without `-`; a number before a space becomes a space together with it; other digits become n.
  Texts on both sides of a NOTE_BREAK are cleaned apart and joined by one space.

  Raises:
    DataError: unknown rules; the stemmer's package is missing.
  """
  minimal = _check(rules) == "minimal"
  return " ".join((_minimal if minimal else _official)(part) for part in text.split(NOTE_BREAK))


def tokens_with_places(text: str, rules: str = "official") -> list[Token]:
  """`clean(text, rules).split()`, each word with its place in the raw text."""
  words = _minimal_words if _check(rules) == "minimal" else _official_words
  tokens, offset = [], 0
  for part in text.split(NOTE_BREAK):
    places = _places(part)
    tokens += [
      Token(word, offset + places(start)[0], offset + places(end - 1)[1])
      for word, start, end in words(part.lower())
    ]
    offset += len(part) + len(NOTE_BREAK)
  return tokens


def _check(rules: str) -> str:
  if rules not in RULES:
    raise refuse("note_rules", "be known", repr(rules), suggest(rules, RULES))
  return rules


def _minimal(text: str) -> str:
  return " ".join(_MINIMAL_WORD.findall(text.lower()))


def _minimal_words(lowered: str) -> Iterator[tuple[str, int, int]]:
  return ((found[0], found.start(), found.end()) for found in _MINIMAL_WORD.finditer(lowered))


def _official(text: str) -> str:
  words = filter(None, map(_stem_or_nothing(), text.lower().translate(_BLANKS).split()))
  joined = " ".join(words).replace("-", "")
  return _DIGIT.sub("n", _NUMBER_BEFORE_SPACE.sub(" ", joined))


def _official_words(lowered: str) -> Iterator[tuple[str, int, int]]:
  """(word, start, end) in the lower-cased text; the last steps of `_official`, word by word."""
  stem = _stem_or_nothing()
  blanked = lowered.translate(_BLANKS)
  found = [(stem(raw[0]), raw.start(), raw.end()) for raw in _RAW_WORD.finditer(blanked)]
  kept = [(word.replace("-", ""), start, end) for word, start, end in found if word]
  for number, (word, start, end) in enumerate(kept, 1):
    if number < len(kept):  # a space follows, even where nothing is left of the words behind it
      word = _NUMBER_AT_END.sub("", word)
    if word:
      yield _DIGIT.sub("n", word), start, end


@functools.cache
def _stem_or_nothing() -> Callable[[str], str]:
  """Lower-cased word -> its stem, "" for words that are dropped."""
  try:
    from nltk.stem.snowball import EnglishStemmer
  except ImportError as error:
    raise refuse("note_rules", "have its stemmer installed", "'official' without `nltk`",
                 "pip install 'attnzoo[data]', or take the minimal rules") from error  # fmt: skip
  stem = EnglishStemmer().stem

  @functools.lru_cache(_CACHED_WORDS)
  def stem_or_nothing(word: str) -> str:
    stemmed = stem(word)
    dropped = len(stemmed) < 3 or stemmed.isnumeric() or stemmed in _STOP_WORDS
    return "" if dropped else stemmed

  return stem_or_nothing


def _places(text: str) -> Callable[[int], tuple[int, int]]:
  """Position in `text.lower()` -> (start, end) of the character of `text` that it came from.

  Lower case is longer than the text where it writes one character as two (such as I with a dot).
  """
  if len(text.lower()) == len(text):
    return lambda at: (at, at + 1)
  origin = [number for number, character in enumerate(text) for _ in character.lower()]
  return lambda at: (origin[at], origin[at] + 1)
