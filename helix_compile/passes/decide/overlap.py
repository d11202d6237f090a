"""In how many parts a batch attends and exchanges, so that one part is on its way while the next attends (HOP-B, paper 2.1.3)."""

from __future__ import annotations

from collections.abc import Iterable

from helix_compile.config.options import HelixOptions
from helix_compile.errors import PlanError
from helix_compile.plan.helix_plan import BodyPlan, Decision

# the least with which anything overlaps; each more starts its collectives, and reads a W_UV before them, once more. And the most: graphs
# are captured with two sequences, and a part without one would be traced as if it had none ever
PARTS = 2


def parts_of_batch(options: HelixOptions) -> int:
    """Parts of a site that exchanges.

    Raises:
        PlanError: overlap="hopb" where no batch has two sequences.
    """
    if options.overlap == "none":
        return 1
    if options.max_batch_size == 1:
        raise PlanError(
            "option overlap='hopb' has no effect at max_batch_size=1: one sequence is no two parts of a batch; drop it or use "
            "max_batch_size >= 2"
        )
    return PARTS


def overlap_decision(bodies: Iterable[BodyPlan], options: HelixOptions) -> Decision | None:
    """What was decided; None where nothing overlaps."""
    if options.overlap == "none":
        return None
    sites = [(site, len(body.layers)) for body in bodies for site in body.attentions]
    return Decision(
        "overlap",
        "as asked; part i of n are rows [B i // n, B (i + 1) // n) of the batch: it attends, starts its exchange, and the next part attends "
        "meanwhile. Two parts: the least that overlap. W_UV before the exchange is multiplied with all rows in each part, zeros in those of "
        "the others, so that the bits are those of overlap='none'; what exchanges nothing stays whole",
        (
            ("option", options.overlap),
            ("max_batch_size", options.max_batch_size),
            ("attentions_in_parts", sum(n for site, n in sites if site.parts > 1)),
            ("attentions_that_exchange_nothing", sum(n for site, n in sites if site.parts == 1)),
            ("reads_of_W_UV", max((site.parts for site, _ in sites if site.v_up == "before"), default=1)),
        ),
        PARTS,
    )
