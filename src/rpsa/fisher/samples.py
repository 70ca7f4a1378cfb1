"""Samples as the estimators see them: rows of token ids, and where their responses are.

Shapes: B rows, T positions of each, N response tokens of all rows.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rpsa.errors import RPSAError, check_type

IGNORED = -100
_FIELDS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Responses:
    """The N response tokens of a batch of B rows, on the CPU; each field but `lengths` has one int64 entry a token."""

    rows: Tensor
    positions: Tensor
    labels: Tensor
    ranks: Tensor
    """The index of the token within its row's response."""
    lengths: Tensor
    """(B,), |y|: a row's labels that are not -100, the first position left out, as nothing predicts it."""
    largest: int
    """The largest of the labels."""


@dataclass(frozen=True)
class Samples:
    """B samples, right-padded: (B, T) int64 tensors, and each sample's id and place in the whole data."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def response_lengths(self) -> Tensor:
        """(B,), |y|: a row's labels that are not -100, but for the first position: nothing predicts it."""
        return (self.labels[:, 1:] != IGNORED).sum(dim=1)

    def select(self, rows: Sequence[int]) -> "Samples":
        """Some of the rows, without the padding that they do not need."""
        length = int(self.attention_mask[list(rows)].sum(dim=1).max())
        index = list(rows)
        return Samples(
            self.input_ids[index, :length],
            self.attention_mask[index, :length],
            self.labels[index, :length],
            tuple(self.ids[row] for row in rows),
            tuple(self.places[row] for row in rows),
        )

    def cut(self, tokens: int) -> "Samples":
        """Without what follows the first `tokens` tokens of the first response that starts."""
        start = int((self.labels[:, 1:] != IGNORED).nonzero()[:, 1].min()) + 1
        ids, mask, labels = (
            t[:, : start + tokens] for t in (self.input_ids, self.attention_mask, self.labels)
        )
        return Samples(ids, mask, labels, self.ids, self.places)

    def responses(self) -> Responses:
        is_response_BT = self.labels != IGNORED
        is_response_BT[:, 0] = False
        rows_N, positions_N = is_response_BT.nonzero(as_tuple=True)
        ranks_BT = is_response_BT.cumsum(dim=1) - 1
        labels_N = self.labels[rows_N, positions_N]
        return Responses(
            rows_N,
            positions_N,
            labels_N,
            ranks_BT[rows_N, positions_N],
            is_response_BT.sum(dim=1),
            int(labels_N.max()),
        )


def read_samples(batches: Iterable[Mapping[str, Any]]) -> list[Samples]:
    """Keep all batches, on the CPU, as `Samples`.

    Raises:
        RPSAError: a batch is not of that form, a sample has no response token, or there is no sample.
    """
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        hint = ", such as D_ref's batches(batch_size, max_length)" if hasattr(batches, "batches") else ""
        check_type("batches", batches, (), f"a list of batches{hint}")
    result: list[Samples] = []
    seen = 0
    for number, batch in enumerate(batches):
        input_ids, mask, labels = _tensors(number, batch)
        places = tuple(range(seen, seen + len(input_ids)))
        seen += len(places)
        ids = tuple(str(i) for i in batch.get("sample_ids", places))
        if len(ids) != len(places):
            raise RPSAError(f"batch {number} has {len(places)} samples, and {len(ids)} sample_ids")
        samples = Samples(input_ids, mask, labels, ids, places)
        for name, length in zip(ids, samples.response_lengths.tolist(), strict=True):
            if length == 0:
                raise RPSAError(f"sample {name!r} has no response token: give it labels that are not -100")
        result.append(samples.select(range(len(samples))))
    if not result:
        raise RPSAError("there are no samples to estimate the Fisher on: `batches` is empty")
    return result


def _tensors(number: int, batch: Any) -> list[Tensor]:
    """`input_ids`, `attention_mask` and `labels` of a batch as (B, T) int64 tensors, or what is wrong with them."""
    check_type(f"batch {number}", batch, Mapping, f"a dict of {', '.join(_FIELDS)}")
    for field in _FIELDS:
        if field not in batch:
            raise RPSAError(f"batch {number} has no {field!r}: Fisher estimation needs it")
        check_type(f"batch {number}: {field}", batch[field], Tensor, "a (B, T) tensor of whole numbers")
    found = [batch[field].cpu() for field in _FIELDS]
    for field, tensor in zip(_FIELDS, found, strict=True):
        if (
            tensor.ndim != 2
            or tensor.is_floating_point()
            or tensor.shape != found[0].shape
            or not len(tensor)
        ):
            raise RPSAError(
                f"batch {number}: {field} is {tuple(tensor.shape)}, {tensor.dtype}, beside input_ids of "
                f"{tuple(found[0].shape)}: give all three as (B, T), whole numbers, with one sample at least"
            )
    input_ids, mask, labels = (tensor.long() for tensor in found)
    is_response = labels != IGNORED
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise RPSAError(f"batch {number} is padded on the left: pad it on the right")
    if bool((is_response & (mask == 0)).any()):
        raise RPSAError(f"batch {number} has labels where attention_mask is 0: set them to {IGNORED}")
    shifted = labels[:, :-1][is_response[:, :-1]] == input_ids[:, 1:][is_response[:, :-1]]
    if bool(shifted.all()) and bool((labels != input_ids)[is_response].any()) and len(shifted):
        raise RPSAError(
            f"batch {number}: its labels are shifted, each is the next token's: give them unshifted, as Hugging Face "
            "has them"
        )
    if bool((input_ids < 0).any()) or bool((labels[is_response] < 0).any()):
        raise RPSAError(f"batch {number} has token ids below 0")
    return [input_ids, mask, labels]


def refuse_foreign_ids(model: nn.Module, called: str, largest: int) -> None:
    """Raise RPSAError for a token id beyond the embedding, which ends in a crash of the device that says nothing."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embedding, nn.Embedding) and largest >= embedding.num_embeddings:
        raise RPSAError(
            f"{called}: there is token {largest}, and the model embeds {embedding.num_embeddings}: they are another "
            "tokenizer's"
        )


def data_fingerprint(data: Iterable[Samples]) -> str:
    """SHA-256 over every sample's token ids and labels in order; batching and padding do not change it."""
    digest = hashlib.sha256()
    for samples in data:
        lengths = samples.attention_mask.sum(dim=1).tolist()
        for row, length in enumerate(lengths):
            digest.update(length.to_bytes(8, "little"))
            digest.update(samples.input_ids[row, :length].numpy().tobytes())
            digest.update(samples.labels[row, :length].numpy().tobytes())
    return digest.hexdigest()
