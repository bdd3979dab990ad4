from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.toy import tiny_model
from training.model.states import decision_states, fingerprint

CONTROLS = [298, 299]
SHARED = [7, 8, 9, 10]
PROMPTS = [[*SHARED, *range(20, 20 + length)] for length in (1, 9, 3, 3, 30, 17)]


def _model() -> Any:
    return tiny_model(300)


def test_states_are_what_the_output_layer_reads(tmp_path: Path) -> None:
    model = _model()
    states = decision_states(model, PROMPTS, CONTROLS, tmp_path)
    for state, prompt in zip(states, PROMPTS, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
            read = model.lm_head(torch.from_numpy(state))
        assert torch.allclose(read, logits, atol=1e-4)


@pytest.mark.parametrize("prompts", [[[5]], [[5, 6], [5, 6]], [[5], [6, 7]], []])
def test_prompts_may_be_short_alike_or_none(prompts: list[list[int]], tmp_path: Path) -> None:
    states = decision_states(_model(), [*prompts, [1, 2, 3]], CONTROLS, tmp_path)
    alone = decision_states(_model(), [[1, 2, 3]], CONTROLS, tmp_path / "other")
    assert len(states) == len(prompts) + 1
    assert np.allclose(states[-1], alone[0], atol=1e-5)


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    first = decision_states(_model(), PROMPTS, CONTROLS, tmp_path)
    unable = _model()
    unable.model.forward = None
    assert (decision_states(unable, PROMPTS[::-1], CONTROLS, tmp_path) == first[::-1]).all()
    with pytest.raises(TypeError):
        decision_states(unable, [*PROMPTS, [1, 2]], CONTROLS, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_fingerprint_is_of_the_weights_that_prompts_pass(tied: bool) -> None:
    model = _model()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    before = fingerprint(model, CONTROLS)
    with torch.no_grad():
        model.get_output_embeddings().weight[CONTROLS] = 3
        assert fingerprint(model, CONTROLS) == before
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(model, CONTROLS) != before
