"""How large the images of a sample may be where the number of its tokens is limited."""

from __future__ import annotations

from collections.abc import Sequence

from vlmq_export.quantizer.samples.image_rules import ImageRule, Size


def fitted_sizes(rule: ImageRule, images: Sequence[Size]) -> list[Size]:
    """What images of these sizes are resized to where nothing limits their number of tokens."""
    return [rule.size(image) for image in images]


def scaled_sizes(
    rule: ImageRule,
    images: Sequence[Size],
    *,
    seq_len: int,
    text: int,  # tokens of the sample that belong to no image
    before: int,  # those of them that stand before the last image
) -> list[Size]:
    """What images of these sizes are resized to in a sample of at most `seq_len` tokens.

    The images share what the text leaves. Where a long answer leaves them little, they share half
    of what is left by the text before them, and the answer is cut. A rule may have a smallest size,
    so that the sample can be longer all the same.
    """
    fitted = fitted_sizes(rule, images)
    wanted = [rule.tokens(size) for size in fitted]
    allowed = shares(wanted, max(seq_len - text, (seq_len - before) // 2))
    return [
        size if most == tokens else rule.size(image, most)
        for image, size, tokens, most in zip(images, fitted, wanted, allowed)
    ]


def shares(wanted: Sequence[int], room: int) -> list[int]:
    """At most `room` in all, divided so that nobody gets more than wanted.

    Those who want less than an equal share get all of it, and the others share the rest equally.
    """
    given = list(wanted)
    for place, i in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        given[i] = min(wanted[i], room // (len(wanted) - place))
        room -= given[i]
    return given
