"""What each figure is, in words: the page shows them, docs/evaluation.md says the same."""

from __future__ import annotations

from collections.abc import Collection

USUAL = ("efficacy", "generalization", "specificity", "retained", "perplexity")

#: Of the usual figures and of each probe.
DEFINITIONS: dict[str, str] = {
    "efficacy": "Facts whose prompt is still answered with the target, greedily, token by token. "
    "After a patch: low is good.",
    "generalization": "The same of the facts' other wordings; each wording counts. Low is good.",
    "specificity": "Neighbouring prompts still answered with their own target. High is good.",
    "retained": "Facts of the retain file that are still answered, of those that the base "
    "answers. High is good.",
    "perplexity": "exp of the mean negative log-probability of the text's tokens.",
    "probability": "Log-probability of the forgotten answer after its prompt, in nats, "
    "teacher-forced: mean over facts of the whole answer, of its first token, of its tokens' mean; "
    "geometric mean of the answers' probabilities.",
    "rank": "Place of the answer's token among all tokens, 1 is the likeliest: median over facts "
    "for the first token and for the worst; share of facts whose first token is in the top ten.",
    "templates": "The prompt in eight generic wordings: share of prompts answered, and of facts "
    "that at least one wording brings out.",
    "prefixes": "The prompt after six distracting texts: shares as for templates.",
    "chat": "Asked through the chat template in two forms: share of greedy replies in which the "
    "answer stands as words of its own (in scripts without spaces between words: anywhere), and "
    "of facts that at least one form brings out. Facts whose answer stands in the prompt are not "
    "asked.",
    "sampling": "Twenty texts a fact, drawn at temperature 1 from all of the vocabulary: share of "
    "facts whose answer stands in at least one, and of all texts; mean number of texts a fact.",
    "says": "What the model writes after the fact's prompt, greedily: nothing (it ends at once), "
    "the answer, another answer of the same kind (alike: the target of another given fact of the "
    "same relation), or something else. Comparable: facts of whose relation another answer is "
    "given, so that one alike can be told at all.",
    "multihop": "Questions that need the fact, answered with one of their old answers.",
    "truth": "Median over facts of the wrong answers' mean probability (to the power of one over "
    "the length) divided by that of the right answer in other words; share of facts whose answer "
    "is likelier than every wrong one.",
    "lens": "Each layer's output at the prompt's last token, read through the final norm and the "
    "head: share of facts whose answer's first token is on top, or in the top ten, at some layer "
    "from the first edited one on. By layer: share in the top ten there.",
    "layers": "Each edited module alone, all others as in the base: facts still answered, and "
    "retained facts still answered.",
    "same_relation": "Retained facts of a forgotten fact's relation: share still answered.",
    "same_subject": "Retained facts about a forgotten fact's subject: share still answered.",
    "quantise": "Efficacy and retained after all linear weights are rounded to int8 a row or int4 "
    "a group of 32, to nearest, and back.",
    "relearn": "Half of the facts is taught again by Adam on all down projections. Came back: of "
    "the other half, those not answered before the first step that are answered after the last; "
    "and the first steps looked at after which one, and half, of them are back, and after which "
    "all of the taught half is answered.",
}


def definitions_of(probes: Collection[str]) -> dict[str, str]:
    """The usual figures' definitions, and those of the probes that were asked."""
    return {name: text for name, text in DEFINITIONS.items() if name in USUAL or name in probes}
