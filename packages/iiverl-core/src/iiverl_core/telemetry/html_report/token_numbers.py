"""The tokens of a report's samples, with a few numbers each, by which the browser of samples colours them.

Numbers are in base64, as a browser needs them in no other form: half-precision floats take 2.7 bytes a token.
"""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iiverl_core.errors import CheckpointError
from iiverl_core.samples import TokenSequence
from iiverl_core.sequence_files import SEQUENCES_SUFFIX, TOKENIZER_FILE, SequenceFile
from iiverl_core.telemetry.html_report.chosen_samples import spread

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKEN_BYTES_PER_STEP = 7_000
"""Of a report's `BYTES_PER_STEP`, if tokens are recorded."""
MAX_TOKENS = 2000  # of a sample
_CONTEXT = 4  # tokens before a response on which the text of its first token may depend


def add_token_numbers(folder: Path, samples: Sequence[dict[str, Any]], max_bytes: int) -> None:
    """Add `tokens` to as many samples as `max_bytes` allows, if their sequences are beside the dumps in `folder`.

    The first sample of each group comes before the second of any, with groups from the whole length of the run.
    `tokens` has `text`, what of it each token wrote as `lengths` uint8 in UTF-16 code units, and per trained token
    `log_prob`, of the engine, `mismatch`, the trainer's minus it, and `advantage`, a single number if it is the same for
    all. `trained` uint8 says which tokens are, unless all of them. `total` counts all tokens if some at the end are left
    out. The text is left out if it begins with the response, and `after` is what follows that; or if the response
    begins with it.
    """
    tokenizer = _read_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer is None:
        return
    files = lru_cache(maxsize=4)(lambda step: _open(folder / f"{step}{SEQUENCES_SUFFIX}"))
    for sample in _in_turn(samples):
        file = files(sample["step"])
        sequences = _sequences_of(file, sample) if file else []
        if not sequences:
            continue
        tokens = _tokens(tokenizer, sequences, sample.get("response", ""))
        if tokens is None:
            continue
        max_bytes -= sum(len(value.encode()) if isinstance(value, str) else 20 for value in tokens.values())
        if max_bytes < 0:
            return
        sample["tokens"] = tokens


def _in_turn(samples: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    groups = [list(group) for _, group in groupby(samples, lambda sample: (sample["step"], sample["group"]))]
    order = [groups[i] for i in spread(range(len(groups)))]
    for i in range(max(map(len, groups), default=0)):
        yield from (group[i] for group in order if i < len(group))


def _read_tokenizer(path: Path) -> "Tokenizer | None":
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the package has no class of its own for what is wrong with a file
        return None


def _open(path: Path) -> SequenceFile | None:
    try:
        return SequenceFile(path)
    except CheckpointError:
        return None


def _sequences_of(
    file: SequenceFile, sample: dict[str, Any]
) -> list[tuple[TokenSequence, dict[str, np.ndarray]]]:
    wanted = (sample["step"], sample["group"], sample["member"])
    positions = [position for position, id in enumerate(file.ids) if id == wanted]
    read = [(position, file.sequence(position)) for position in positions]
    return [(each, file.numbers(position, each.trained)) for position, each in read if each.trained]


def _tokens(
    tokenizer: "Tokenizer",
    sequences: Sequence[tuple[TokenSequence, dict[str, np.ndarray]]],
    response: str,
) -> dict[str, Any] | None:
    """Describe the tokens of a sample, those of each sequence from the first trained one on; None if they have no text."""
    pieces: list[str] = []
    masks: list[np.ndarray] = []
    numbers: dict[str, list[np.ndarray]] = {"log_prob": [], "mismatch": [], "advantage": []}
    for sequence, computed in sequences:
        start = int(sequence.loss_mask.argmax())
        pieces += _pieces(tokenizer, sequence.token_ids.tolist(), start)
        masks.append(sequence.loss_mask[start:])
        engine = sequence.trained_log_probs
        numbers["log_prob"].append(engine)
        if "old_log_probs" in computed:
            numbers["mismatch"].append(computed["old_log_probs"] - engine)
        if "advantages" in computed:
            numbers["advantage"].append(computed["advantages"])
    total, mask = len(pieces), np.concatenate(masks)[:MAX_TOKENS]
    pieces = pieces[:MAX_TOKENS]
    text = "".join(pieces)
    lengths = [len(piece.encode("utf-16-le", "surrogatepass")) // 2 for piece in pieces]
    if not text or max(lengths) > 255:
        return None
    tokens: dict[str, Any] = {"lengths": _base64(np.array(lengths, np.uint8))}
    if response and text.startswith(response):
        tokens["after"] = text.removeprefix(response)
    elif not response.startswith(text):
        tokens["text"] = text
    if not mask.all():
        tokens["trained"] = _base64(mask.astype(np.uint8))
    if total > len(pieces):
        tokens["total"] = total
    for name, parts in numbers.items():
        if len(parts) == len(sequences):
            x_T = np.concatenate(parts)[: int(mask.sum())]
            constant = len(x_T) > 0 and bool((x_T == x_T[0]).all())
            tokens[name] = float(f"{x_T[0]:.6g}") if constant else _base64(_halves(x_T))
    return tokens


def _pieces(tokenizer: "Tokenizer", ids: Sequence[int], start: int) -> list[str]:
    """Return what each token from `start` on adds to the text; of a character of several tokens, it is the last that does."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    for id in ids[max(0, start - _CONTEXT) : start]:
        stream.step(tokenizer, id)
    pieces = [stream.step(tokenizer, id) for id in ids[start:]]
    if pieces and pieces[-1] is None:  # it does not end with a whole character
        pieces[-1] = "\ufffd"
    return [piece or "" for piece in pieces]


def _halves(x_T: np.ndarray) -> np.ndarray:
    largest = float(np.finfo(np.float16).max)
    return x_T.clip(-largest, largest).astype("<f2")


def _base64(values: np.ndarray) -> str:
    return b64encode(values.tobytes()).decode()
