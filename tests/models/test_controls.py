import math
import struct

import pytest

from models.controls import Controls, Rule, bias_of_sensitivity, refused_by_own_rule


@pytest.mark.parametrize(
    ("sensitivity", "bias"),
    [
        (0.0, -math.inf),
        (0, -math.inf),
        (0.5, 0.0),
        (0.75, 1.0986122886681098),  # ln 3
        (0.25, -1.0986122886681098),
        (0.9, 2.1972245773362196),  # ln 9
        (1.0, math.inf),
        (1, math.inf),
    ],
)
def test_bias_is_the_logit_of_the_sensitivity(sensitivity: float, bias: float) -> None:
    assert bias_of_sensitivity(sensitivity) == pytest.approx(bias, rel=1e-12)


def test_bias_rises_with_the_sensitivity_to_the_ends_of_the_floats() -> None:
    steps = [0.0, 5e-324, 1e-300, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-9, math.nextafter(1, 0), 1.0]
    biases = [bias_of_sensitivity(step) for step in steps]
    assert biases == sorted(set(biases))
    assert all(math.isfinite(bias) for bias in biases[1:-1])


@pytest.mark.parametrize("sensitivity", [-0.1, 1.2, math.nan, math.inf, -math.inf])
def test_bias_of_anything_else_is_refused(sensitivity: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        bias_of_sensitivity(sensitivity)


def test_own_rule_is_margin_plus_bias_at_least_zero() -> None:
    margins = [-1.0, -1.0, -1.0, 5.0, -5.0, 5.0]
    bias = [1.0, 0.999, 1.001, -math.inf, math.inf, 0.0]
    assert refused_by_own_rule(margins, bias) == [True, False, True, False, True, True]
    infinite = refused_by_own_rule([-math.inf, math.inf], [math.inf, -math.inf])
    assert infinite == [True, False], "always and never hold whatever the margin is"


def test_own_rule_wants_one_bias_a_margin() -> None:
    with pytest.raises(ValueError, match="zip"):
        refused_by_own_rule([1.0], [1.0, 2.0])


def floats(row: bytes) -> list[float]:
    return list(struct.unpack(f"{len(row) // 4}f", row))


def test_wire_form_is_plain_values() -> None:
    wire = Controls(Rule.PAPER, (math.inf, -2.0), (True, False)).to_wire()
    assert wire.keys() == {"rule", "row"}
    assert type(wire["rule"]) is int
    shift, bias = [0.0, -math.inf, -math.inf], [math.inf, -2.0]
    assert floats(wire["row"]) == [*shift, *bias, 1.0, 0.0, 2.0, 0.0, 0.0]


def test_biases_beyond_fp32_travel_as_always_and_never() -> None:
    wire = Controls(Rule.GREEDY, (1e39, -1e39), (True, True)).to_wire()
    assert floats(wire["row"])[:2] == [math.inf, -math.inf]


def test_wire_form_survives_msgpack_with_infinities() -> None:
    import msgspec

    wire = Controls(Rule.SAMPLE, (math.inf, -math.inf), (True, True)).to_wire()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(wire)) == wire
