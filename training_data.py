"""The data of a run: which documents, and how micro batches are made of them.

One need not read this to understand Bone.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import check_data
import corpus
import data
import devices
import tokenizer
from loss import Batch, Counts
from options import Options


def read_vocabulary(options: Options) -> Any:
    """Return the characters that vocab.json lists, beside the base or in proj_dir; None: neither.

    ValueError where a base has none, or where the two differ.
    """
    here = os.path.join(options.proj_dir, "vocab.json")
    paths = [here]
    if options.load_model:
        beside_base = os.path.join(os.path.dirname(options.load_model), "vocab.json")
        if not os.path.exists(beside_base):
            raise ValueError(
                f"{options.load_model}: has no vocab.json beside it that says which characters it "
                "reads. A World model reads none: write the text as a .jsonl"
            )
        paths = [beside_base, here]
    found = [tokenizer.read_vocabulary(path) for path in paths if os.path.exists(path)]
    if not found:
        return None
    if found[0] != found[-1]:
        raise ValueError(f"{here}: has other characters than {paths[0]}; give another --proj_dir")
    return found[0]


def open_documents(options: Options, vocab_size: int | None = None) -> tuple[Any, Any]:
    """Open the training data and the held-out data, which is None where no flag asks for it."""
    kind = options.data_type or corpus.guess_data_type(options.data_file)
    is_text = kind in tokenizer.CHARACTERS
    vocabulary = read_vocabulary(options) if is_text else None
    documents = corpus.open_data(
        options.data_file, vocab_size, kind, ctx_len=options.ctx_len, vocabulary=vocabulary
    )
    if documents.vocabulary and vocab_size not in (None, documents.vocab_size()):
        advice = "drop --vocab_size"
        if options.load_model:
            advice = "take the vocab.json that it was trained with"
        raise ValueError(
            f"{options.data_file or kind}: has {documents.vocab_size()} characters, but the "
            f"model's vocabulary is {vocab_size}; {advice}"
        )
    if options.val_split:
        return corpus.hold_out(documents, options.val_split, options.random_seed)
    if not options.val_file:
        return documents, None
    if is_text and (kind == "dummy" or not options.data_type):
        # The encoding of each text is told by its own name.
        kind = "utf-16le" if corpus.guess_data_type(options.val_file) == "utf-16le" else "utf-8"
    vocabulary = documents.vocabulary
    held_out = corpus.open_data(
        options.val_file, vocab_size, kind, ctx_len=options.ctx_len, vocabulary=vocabulary
    )
    return documents, held_out


def longest_row(options: Options, documents: Any = None) -> int:
    """Return how many tokens the longest row has that the model will see.

    documents: those in question; without, all for training and all that are held out.
    """
    if options.dataload == "get" or not options.data_file:
        return options.ctx_len
    opened = [documents] if documents is not None else open_documents(options)
    longest = max(int(found.sizes.max()) - 1 for found in opened if found is not None)
    padded_to = options.ctx_len if options.loss_mask == "none" else 1
    longest = max(longest, padded_to)
    return longest if options.train_type == "infctx" else min(longest, options.ctx_len)


class StepData(NamedTuple):
    """What a rank needs for an optimizer step."""

    micro_batches: Sequence[Batch]  # this rank's, on the host
    counts: Counts  # of all ranks' micro batches
    size: float  # tokens in all of them, padding included


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The documents of a run, and how micro batches are made of them."""

    documents: Any
    held_out: Any  # documents, or None
    batches: data.BatchConfig  # which rows a micro batch has, and what of them counts
    epoch_steps: int  # steps in an epoch; 0: as many as it takes to see the data once

    @classmethod
    def open(cls, options: Options, vocab_size: int) -> "TrainingData":
        """Open the files. ValueError where they cannot be trained on as the options say."""
        documents, held_out = open_documents(options, vocab_size)
        tokenizer.forget_tokenizer()  # which a .jsonl may have needed
        for note in [*documents.notes, *(held_out.notes if held_out else ())]:
            print(note)
        if held_out and held_out.fingerprint() == documents.fingerprint():
            print(
                "note: --val_file holds the same as --data_file, so its loss says nothing of what "
                "is new to the model"
            )
        loss_mask: data.LossMask = options.loss_mask
        if loss_mask == "se":
            loss_mask = options.mask_id["mask1"], options.mask_id["mask0"]
        batches = data.BatchConfig(
            options.micro_bsz,
            options.ctx_len,
            options.dataload,
            seed=options.random_seed,
            shuffle=bool(options.data_shuffle),
            loss_mask=loss_mask,
            cut=options.train_type != "infctx",
        )
        opened = cls(documents, held_out, batches, options.epoch_steps)
        silent, looked_at = check_data.check_mask(documents, batches)
        if held_out:
            # Held-out documents are rows, however the training data are loaded.
            try:
                check_data.check_mask(held_out, dataclasses.replace(batches, dataload="pad"))
            except ValueError as error:
                if not options.val_split:
                    raise
                raise ValueError(
                    f"--val_split {options.val_split}: none of the {len(held_out)} held-out "
                    "documents has an answer to measure; hold out more, or take another "
                    "--random_seed"
                ) from error
        if silent:
            marker, _ = data.markers_of(loss_mask) or ("", "")
            rows = "windows" if batches.dataload == "get" else "documents"
            within = f" within {options.ctx_len} tokens" if batches.cut else ""
            print(
                f"note: {silent} of the first {looked_at} {rows} have nothing "
                f"after {marker}{within} and count for nothing"
            )
        opened.micro_batch(0)  # what cannot be batched is refused here
        return opened

    def micro_batch(self, number: int) -> Batch:
        """Return a micro batch, a function of its number and the options alone."""
        return data.batch(self.documents, number, self.batches)

    def steps_per_epoch(self, micro_batches_per_step: int) -> int:
        """Return how many steps an epoch has."""
        if self.epoch_steps:
            return self.epoch_steps
        return math.ceil(self.rows / (self.batches.micro_bsz * micro_batches_per_step))

    @property
    def rows(self) -> float:
        """How many rows hold as many tokens as the data."""
        if self.batches.dataload == "get":
            return len(self.documents.tokens) / self.batches.ctx_len
        return len(self.documents)

    def held_out_batches(self) -> Iterator[Batch]:
        """Yield this rank's batches of the held-out documents, as many as on any other rank."""
        batches, micro_bsz = self.batches, self.batches.micro_bsz
        for start in range(0, len(self.held_out), micro_bsz * devices.size()):
            first = start + micro_bsz * devices.rank()
            numbers = range(first, min(first + micro_bsz, len(self.held_out)))
            documents = [self.held_out[i] for i in numbers]
            if documents:
                yield data.collate(documents, batches.ctx_len, batches.loss_mask, cut=batches.cut)
            else:
                yield data.empty_batch()
