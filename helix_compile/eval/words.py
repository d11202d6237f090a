"""The words that our tasks are written in: some that mean something, each used once in a document, and some that fill.

The meaningful ones are made up of syllables: no model knows them, so what it says of one stands in the document.
"""

from __future__ import annotations

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
# 73 is prime to the number of pairs of syllables: neighbours in the list share neither half
WORDS = [SYLLABLES[n // 70] + SYLLABLES[n % 70] for n in ((73 * i) % 4900 for i in range(512))]
_COMMON = (
    "the of and to in is it that was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see"
)
FILLERS = _COMMON.split()
