"""Requests whose choices are decided, for tests that need no engine."""

from models.controls import Controls, Rule
from server.context import Decision, DecisionContext
from server.dials.board import Resolution

AS_TRAINED = Resolution(Controls(Rule.GREEDY, (0.0, 0.0), (False, False)))


def context_of(
    *choices: Decision, report: bool = False, beam_search: bool = False, in_content: bool = False
) -> DecisionContext:
    """Returns the context of one prompt, with its choices' decisions."""
    placed = {(0, index): decision for index, decision in enumerate(choices)}
    context = context_of_calls(placed, report=report, beam_search=beam_search)
    context.in_content = in_content
    return context


def context_of_calls(
    decisions: dict[tuple[int, int], Decision], *, report: bool = False, beam_search: bool = False
) -> DecisionContext:
    """Returns the context of several prompts, with decisions by call and choice."""
    return DecisionContext(
        AS_TRAINED,
        report=report,
        beam_search=beam_search,
        decisions=decisions,
        calls=1 + max((call for call, _ in decisions), default=0),
    )
