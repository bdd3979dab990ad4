"""The decisions of one request, by the choices of its answer."""

from models.manifest import Manifest
from server.context import Decision, DecisionContext
from server.dials.reports import RefusalReport, build_report


class Verdicts:
    """The decisions of one request, by the index of a choice in the answer.

    Args:
        choices_per_prompt: The request's ``n``; vLLM numbers the choices of all prompts in one
            sequence.
    """

    def __init__(
        self, manifest: Manifest, context: DecisionContext, *, choices_per_prompt: int = 1
    ) -> None:
        self._manifest = manifest
        self._context = context
        self._choices_per_prompt = choices_per_prompt

    @property
    def any_refusal(self) -> bool:
        """Whether any choice decided so far is refused."""
        return any(d.category is not None for d in self._context.decisions.values())

    @property
    def reports(self) -> bool:
        """Whether the request asked for reports."""
        return self._context.report

    @property
    def in_content(self) -> bool:
        """Whether a refusal's text stands in a chat message's ``content`` too."""
        return self._context.in_content

    def in_order(self) -> list[str | None]:
        """Returns each choice's refused category, None for an answer, in the answer's order."""
        return [self._name(decision) for _, decision in sorted(self._context.decisions.items())]

    def decided(self, index: int = 0) -> bool:
        """Returns whether a choice is decided yet."""
        return self._decision(index) is not None

    def category(self, index: int = 0) -> str | None:
        """Returns a choice's refused category; None for an answer, or before the decision."""
        decision = self._decision(index)
        return None if decision is None else self._name(decision)

    def take_text(self, index: int = 0) -> str | None:
        """Returns a refused choice's text since the last call; None if there is none.

        vLLM's answer may lack it: tool and reasoning parsers parse it as something else, or hold it
        back.
        """
        return self._context.refusal_texts.pop(self._place(index), None)

    def report(self, index: int = 0) -> RefusalReport | None:
        """Returns a choice's ``refusal_report``; None if not asked for, or before the decision."""
        decision = self._decision(index)
        if not self.reports or decision is None or decision.margins is None:
            return None
        report = build_report(
            self._manifest.names,
            self._name(decision),
            decision.margins,
            self._context.controls,
            self._context.dials.forecast,
            clamped=dict(self._context.dials.clamped),
            replaced_decision=self._context.dials.replaced_decision,
        )
        if not self._context.enforce:
            shadow = decision.shadow
            report["would_refuse"] = None if shadow is None else self._manifest.names[shadow]
        return report

    def without_control_tokens(self, text: str) -> str:
        """Returns a text without control tokens."""
        for control in self._manifest.control_tokens:
            text = text.replace(control.token, "")
        return text

    def _decision(self, index: int) -> Decision | None:
        return self._context.decisions.get(self._place(index))

    def _place(self, index: int) -> tuple[int, int]:
        if self._context.beam_search:  # one decision for all beams
            return 0, 0
        return divmod(index, self._choices_per_prompt) if self._context.calls > 1 else (0, index)

    def _name(self, decision: Decision) -> str | None:
        return None if decision.category is None else self._manifest.names[decision.category]
