"""What a model makes of prompts at the decision step, kept on disk so that it is made once."""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.files import write_atomically

States = npt.NDArray[np.float32]

ROWS_AT_ONCE = 16
ROWS_A_FILE = 256


def decision_states(
    model: Any, prompts: Sequence[list[int]], controls: Sequence[int], cache: Path
) -> States:
    """Returns what the output layer reads at the end of each prompt.

    A batch is in the folder as soon as it is computed, so a run that was killed goes on from there.

    Args:
        model: A causal language model.
        prompts: Token ids, without any control token.
        controls: Ids of the control tokens, whose rows change nothing here.
        cache: Folder of what was computed before, for this and other models.

    Returns:
        `[n, width]`, a row a prompt, in their order.
    """
    folder = cache / fingerprint(model, controls)
    folder.mkdir(parents=True, exist_ok=True)
    known = _read(folder)
    keys = [_key(prompt) for prompt in prompts]
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    # Alike in length: little is padded. The longest first: memory that does not suffice shows soon.
    todo = sorted(missing, key=lambda key: -len(missing[key]))
    prefix = _prefix(model, list(missing.values()))
    with _progress(len(todo)) as advance:
        for start in range(0, len(todo), ROWS_A_FILE):
            part = todo[start : start + ROWS_A_FILE]
            rows = _computed(model, [missing[key] for key in part], prefix, advance)
            _write(folder, part, rows)
            known |= dict(zip(part, rows, strict=True))
    return np.stack([known[key] for key in keys])


def fingerprint(model: Any, controls: Sequence[int]) -> str:
    """Returns the hash of the weights that prompts without control tokens pass."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    digest = hashlib.sha256(str(getattr(model.config, "rope_parameters", None)).encode())
    for name, weight in sorted(model.named_parameters()):
        if weight is embedding.weight:
            weight = weight[np.setdiff1d(np.arange(weight.shape[0]), controls)]
        elif weight is output.weight:
            continue
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _key(prompt: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(prompt, np.int64).tobytes()).hexdigest()


def _prefix(model: Any, prompts: Sequence[list[int]]) -> tuple[int, Any]:
    """Reads what all prompts begin with: a system prompt costs once what it would cost each."""
    import torch

    if not prompts:
        return 0, None
    # What the first and the last in order have in common, all have.
    first, last = min(prompts), max(prompts)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    length = min(sum(1 for _ in shared), min(map(len, prompts)) - 1)
    if length < 1:
        return 0, None
    with torch.no_grad():
        ids = torch.tensor([first[:length]], device=model.device)
        return length, model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _computed(
    model: Any,
    prompts: Sequence[Sequence[int]],
    prefix: tuple[int, Any],
    advance: Callable[[int], None],
) -> States:
    rows = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        batch = prompts[start : start + ROWS_AT_ONCE]
        rows.append(_last(model, batch, prefix))
        advance(len(batch))
    return np.concatenate(rows)


def _last(model: Any, prompts: Sequence[Sequence[int]], prefix: tuple[int, Any]) -> States:
    import copy

    import torch

    length, cache = prefix
    tails = [torch.tensor(prompt[length:]) for prompt in prompts]
    # Behind the end of a prompt: causal attention never looks there.
    ids = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True).to(model.device)
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(prompts))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, past_key_values=cache).last_hidden_state
    ends = torch.tensor([len(tail) - 1 for tail in tails], device=hidden.device)
    last = hidden[torch.arange(len(tails), device=hidden.device), ends]
    rows: States = last.float().cpu().numpy()
    return rows


def _read(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    from safetensors.numpy import load_file

    known: dict[str, npt.NDArray[np.float32]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        known |= dict(zip((k.tobytes().hex() for k in part["keys"]), part["states"], strict=True))
    return known


def _write(folder: Path, keys: Sequence[str], rows: States) -> None:
    from safetensors.numpy import save

    told = np.stack([np.frombuffer(bytes.fromhex(key), np.uint8) for key in keys])
    name = hashlib.sha256(told.tobytes()).hexdigest()[:32]
    content = save({"keys": told, "states": rows})
    write_atomically(folder / f"{name}.safetensors", content, unique=True)


@contextmanager
def _progress(rows: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    silent = rows < ROWS_A_FILE or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=silent) as bar:
        task = bar.add_task("reading prompts", total=rows)
        yield lambda done: bar.advance(task, done)
