"""Random models of PyTorch Transformers, and tokenizers, for the tests of this room."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = "the cat sat on a mat and dog ran in sun rain over hill tree house red blue green".split()


def tokenizer(folder: Path, size: int, family: str = "bert") -> Path:
    """Saves a WordPiece tokenizer of exactly `size` tokens as Transformers does."""
    from transformers import PreTrainedTokenizerFast

    if family == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        cls, pad, sep, unk, mask = special
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pad, unk, cls, sep, mask = special
    letters = [prefix + chr(ord("a") + i) for i in range(26) for prefix in ("", "##")]
    tokens = (special + [w for w in WORDS if len(w) > 1] + letters)[:size]
    tokens += [f"word{i}" for i in range(size - len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token=unk))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    names = {"pad": pad, "unk": unk, "cls": cls, "sep": sep, "mask": mask}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, **{f"{name}_token": token for name, token in names.items()}
    )
    fast.save_pretrained(folder)
    return folder


def original(class_name: str, seed: int = 0, extra: dict | None = None, **options):
    """A tiny model of this class with every parameter random, biases and norms too."""
    import torch
    import transformers

    sizes = {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}
    if not class_name.startswith("DistilBert"):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        sizes = dict(zip(names, sizes.values(), strict=True))
    if class_name.startswith("Albert"):
        sizes["embedding_size"] = 12
    kind = getattr(transformers, class_name).config_class
    config = kind(**{"vocab_size": 83, "max_position_embeddings": 34, **sizes, **options})
    model = getattr(transformers, class_name)(config, **(extra or {})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
        # Untied, Transformers computes with the decoder's bias and ignores the other one.
        for head in (m for m in model.modules() if hasattr(m, "decoder") and hasattr(m, "bias")):
            head.bias.copy_(head.decoder.bias)
    return model


def saved(folder: Path, class_name: str, family: str = "bert", **options) -> Path:
    """An original with its tokenizer in a folder."""
    model = original(class_name, **options)
    model.save_pretrained(folder)
    return tokenizer(folder, model.config.vocab_size, family)


def outputs(model, rows: int = 2, length: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """What a PyTorch model computes for random rows, the last one padded."""
    import torch

    generator = np.random.default_rng(seed)
    ids = generator.integers(5, model.config.vocab_size, (rows, length))
    attention = np.ones((rows, length), np.int64)
    attention[-1, length // 2 :] = 0
    ids = np.where(attention > 0, ids, model.config.pad_token_id)
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(attention))
    return {name: value.numpy() for name, value in found.items() if torch.is_tensor(value)}
