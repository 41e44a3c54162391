"""Tokenizers: byte-level BPE trained for models from scratch, and any Hugging Face tokenizer with a chat template."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxnr.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as the Qwen models have it, without a system message of its own."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The split of Qwen2: words with the space before them, digits one by one."""


PIECES = 256
"""Merges of a trained tokenizer: what words outside of its vocabulary are put together from."""


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, folder: Path) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE and saves it in the Hugging Face layout; returns it as loaded from there.

    Every string round trips but for its case and a blank after an opening quote: bytes never seen in training are
    tokens of their own. Raises InputError where the vocabulary has no room for the 256 bytes and the special tokens.
    """
    least = 256 + len((PAD, START, END))
    if vocabulary_size < least:
        raise InputError(
            f"prompt.vocabulary_size is {vocabulary_size}: a byte-level tokenizer needs at least {least}, the 256 "
            f"bytes and {least - 256} special tokens."
        )
    _save(
        PreTrainedTokenizerFast(
            tokenizer_object=train_byte_level(texts, vocabulary_size, (PAD, START, END)),
            pad_token=PAD,
            eos_token=END,
            additional_special_tokens=[START],
            chat_template=CHAT_TEMPLATE,
            clean_up_tokenization_spaces=False,
        ),
        folder,
    )
    return load_tokenizer(folder)


def train_byte_level(texts: Iterable[str], vocabulary_size: int, special_names: Sequence[str]) -> Tokenizer:
    """A byte-level BPE over ``texts``, its special tokens first.

    Beyond the bytes and up to ``PIECES`` merges the vocabulary is whole words, the most frequent first; they need no
    merges (as in Llama 3's tokenizer). BPE alone spends half of a small vocabulary on the parts of its words.

    The same texts give the same tokenizer. A small corpus may give fewer tokens than asked for.
    """
    specials = [AddedToken(name, special=True, normalized=False) for name in special_names]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = list(texts)
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary_size, len(alphabet) + len(specials) + PIECES),
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for word in _frequent_words(tokenizer, texts):
        if len(vocabulary) == vocabulary_size:
            break
        vocabulary.setdefault(word, len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.add_special_tokens(specials)
    return tokenizer


def train_roberta_tokenizer(texts: Iterable[str], vocabulary_size: int, folder: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE with RoBERTa's special tokens, which makes `<s>a</s>` of a text.

    Saved in the Hugging Face layout and returned as loaded from there.
    """
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # the numbers of RoBERTa's vocabulary, but for the mask
    tokenizer = train_byte_level(texts, vocabulary_size, names)
    start, _, end, *_ = names
    tokenizer.post_processor = processors.RobertaProcessing((end, 2), (start, 0), trim_offsets=False)
    special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), names, strict=True))
    _save(PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token=start, sep_token=end, **special), folder)
    return read_tokenizer(folder)


def _frequent_words(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The words that occur more than once, as byte-level strings, the most frequent first."""
    counts = Counter(
        word
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    )
    return [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count > 1]


def _byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer to which a word is one and the same wherever it stands after a blank or a quote, capital or not.

    Small models have neither the vocabulary for all variants nor the steps to learn that they are one word. Only case
    and the blank after an opening quote are lost, and retrieval and parser see neither.
    """
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r'"(?=\w)'), '" ')])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def adopt_tokenizer(models: Sequence[Path], folder: Path) -> PreTrainedTokenizerBase:
    """Copies the tokenizer that pretrained models share into ``folder``; returns it as loaded from there.

    Raises InputError where two models have other tokens: a student learns the teacher's distribution token by token.
    """
    tokenizer = load_tokenizer(models[0])
    for other in models[1:]:
        if load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
            raise InputError(f"{other}: its tokenizer has other tokens than that of {models[0]}; expected the same.")
    _save(tokenizer, folder)
    return load_tokenizer(folder)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that chats, from where ``read_tokenizer`` finds it.

    Its pad token is its end token where it has none. Raises InputError where it has no end token or no chat template.
    """
    tokenizer = read_tokenizer(name_or_path)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name_or_path}: the tokenizer has no end token (eos_token in tokenizer_config.json).")
    if not tokenizer.chat_template:
        raise InputError(
            f"{name_or_path}: the tokenizer has no chat template; use the one of an instruction-tuned model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder or, for a name that is no folder, from the Hugging Face hub; runs no remote code.

    Raises InputError where it cannot be read.
    """
    folder = Path(name_or_path)
    if not folder.is_dir() and (isinstance(name_or_path, Path) or name_or_path.startswith(("/", ".", "~"))):
        raise InputError(f"{name_or_path}: no such folder; expected one with tokenizer.json and tokenizer_config.json.")
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make an empty tokenizer of the kind that config.json names.
        raise InputError(f"{folder}: expected a tokenizer there, in one of {', '.join(_TOKENIZER_FILES)}.")
    # For some kinds of models AutoTokenizer takes the vocabulary alone from tokenizer.json and makes up the rest.
    old = folder.is_dir() and not (folder / "tokenizer.json").is_file()
    try:
        return (AutoTokenizer if old else PreTrainedTokenizerFast).from_pretrained(str(name_or_path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{name_or_path}: not a tokenizer in the Hugging Face layout (a folder with tokenizer.json and "
            f"tokenizer_config.json, or a name on the hub): {' '.join(str(error).split())}"
        ) from error


_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Each file whole or not at all; other files of the folder (weights, say) stay."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a kill left
    partial.mkdir(parents=True)
    tokenizer.save_pretrained(partial, save_jinja_files=False)
    for path in sorted(partial.iterdir()):
        os.replace(path, folder / path.name)
    partial.rmdir()
