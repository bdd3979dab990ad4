"""What the HTTP layer and the engine tell each other about one request."""

import sys
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from models.controls import Controls
from models.errors import RequestError
from server.dials.board import Resolution
from server.web.errors import Failure

# Where the caller stands in the ASGI scope (server/policies/book.py), once it is known.
CALLER = "rheostat.caller"
# Where the body's JSON object stands, once it was read and found within its bounds.
BODY = "rheostat.body"
# Where the ids that open a turn travel in vLLM's `additional_config`.
TURN_IDS_KEY = "rheostat_turn_ids"
# Of requests to a server without a policy file.
DEFAULT_POLICY = "default"


@dataclass(frozen=True)
class Decision:
    """Which control token opened one choice.

    Attributes:
        category: Index of the refused category in manifest order, or None for an answer.
        margins: The model's own fp32 log-odds, one a category; None unless they were asked for.
        log_normaliser: Log-sum-exp of the whole vocabulary's logits minus the respond token's;
            None like the margins.
        shadow: Index of the category that a policy which is not enforced would have refused for.
    """

    category: int | None
    margins: tuple[float, ...] | None = None
    log_normaliser: float | None = None
    shadow: int | None = None


@dataclass(slots=True)
class DecisionContext:
    """One HTTP request on its way through the engine. The engine fills in the decisions.

    Attributes:
        dials: The effective dials.
        report: Whether margins are wanted.
        history: How many control tokens the server itself put into each prompt, in call order.
        continues: Whether the prompt ends inside an assistant turn that has its control token.
        beam_search: Whether ``generate()`` is called once a beam and step.
        opens_turn: Whether a chat template made the prompt, which then ends where the decision
            step begins.
        marked: Whether the guard put its mark into the request.
        enforce: Whether a refusal is one; otherwise it is only reported.
        texts: What a refusal says, one a category; None where its text is generated.
        in_content: Whether a chat message holds a refusal's text in ``content`` too.
        decisions: By call and choice index.
        refusal_texts: What each refused choice said and the HTTP layer has not yet taken, by call
            and choice index. vLLM's tool and reasoning parsers may read it as something else.
        calls: How many calls there were.
        beam_token: What the first call of a beam search decided.
        beam_start: Length of the prompt before the beams.
        logprobs: How many log-probabilities the answer may still hold.
        piece_logprobs: How many each step of an answer that is streamed may hold.
        prompts: How many prompts the request has.
        grammars: Whether its text may have to follow a grammar.
        has_floor: Whether the policy has a floor.
        names_length: Whether the client says how long the answer may be.
        policy: Name of the policy that the request follows.
        request_ids: vLLM's, by call.
        started: Whether the engine has put out anything of the answer.
        failure: Why the engine rejected the request, or failed.
    """

    dials: Resolution
    report: bool = False
    history: tuple[int, ...] = ()
    continues: bool = False
    beam_search: bool = False
    opens_turn: bool = False
    marked: bool = False
    enforce: bool = True
    texts: tuple[str | None, ...] = ()
    in_content: bool = False
    decisions: dict[tuple[int, int], Decision] = field(default_factory=dict)
    refusal_texts: dict[tuple[int, int], str] = field(default_factory=dict)
    calls: int = 0
    beam_token: int = -1
    beam_start: int = 0
    grammars: bool = False
    has_floor: bool = True
    logprobs: int = sys.maxsize
    piece_logprobs: int = sys.maxsize
    prompts: int = 1
    names_length: bool = True
    policy: str = DEFAULT_POLICY
    request_ids: list[str] = field(default_factory=list)
    started: bool = False
    failure: Failure | None = None

    @property
    def controls(self) -> Controls:
        """What the decision gets."""
        return self.dials.controls

    def adapt(self) -> None:
        """Fits the dials to an adapter, which changes the weights that calibrations measured.

        Raises:
            RequestError: A rate is asked of it.
        """
        if self.dials.calibrated:
            raise RequestError(
                "`model` names an adapter, and rates are known for the checkpoint's own weights "
                "only: ask for a sensitivity or a bias",
                param="model",
            )
        if self.dials.forecast is not None:
            self.dials = replace(self.dials, forecast=None)

    def take_logprobs(self, count: int) -> None:
        """Counts what a prompt and its answer will hold.

        Raises:
            RequestError: The request's prompts hold too many together.
        """
        self.logprobs -= count
        if self.logprobs < 0:
            raise RequestError(
                f"the answer would hold {-self.logprobs} log-probabilities more than are allowed "
                "here (RHEOSTAT_MAX_LOGPROBS): lower max_tokens, n, top_logprobs or "
                "prompt_logprobs, or stream the answer",
                param="logprobs",
            )

    def hold_piece(self, each_prompt: int) -> None:
        """Bounds what one step of a streamed answer holds, which all prompts put out together.

        Raises:
            RequestError: It would hold too many log-probabilities.
        """
        found = self.prompts * each_prompt
        if found > self.piece_logprobs:
            raise RequestError(
                f"each step of the stream would hold {found} log-probabilities, and at most "
                f"{self.piece_logprobs} are allowed here (an eighth of RHEOSTAT_MAX_LOGPROBS): "
                "lower n, top_logprobs, stream_interval or the number of prompts",
                param="logprobs",
            )

    def next_call(self) -> int:
        """Returns the number of this ``generate()`` call within the request, from 0."""
        self.calls += 1
        return self.calls - 1

    def history_of(self, call: int) -> int:
        """Returns how many control tokens the prompt of a call may hold."""
        return self.history[call] if call < len(self.history) else 0


DECISION_CONTEXT: ContextVar[DecisionContext | None] = ContextVar("context", default=None)
