"""Every error that helix_compile raises on purpose. A message says what, where, got, expected and what to do."""

from __future__ import annotations


class HelixError(Exception):
    """Base of all errors below; catch this to catch every refusal of helix_compile.

    Attributes:
        is_said: it stands on stderr already; the command line does not repeat it.
    """

    is_said = False


class LayoutError(HelixError):
    """Degrees, options or sizes that no layout of ranks can serve."""


class CaptureError(HelixError):
    """The model's decode step can't be turned into graphs."""


class CheckpointError(HelixError):
    """A checkpoint folder that can't be read, or does not hold the model that its configuration describes."""


class MatchError(HelixError):
    """A captured graph holds an attention or FFN site that no matcher recognises."""


class PlanError(HelixError):
    """A plan that contradicts itself, the model, or the options it is asked to follow."""


class PassError(HelixError):
    """A pass left a graph that breaks one of its own promises."""


class LoweringError(HelixError):
    """A graph can't be lowered to runnable ops."""


class LoweringUnavailable(LoweringError):
    """The asked lowering, world or entry point is not available here; the message says why."""


class ExportError(HelixError):
    """A module that can't be exported to a format, or an exported folder that is not what it says."""


class RuntimeFault(HelixError):
    """A step, a cache call or a rank failed or was refused while running."""


class KeywordError(PlanError, TypeError):
    """A call with keywords that a function does not take; Python's own TypeError, too."""
