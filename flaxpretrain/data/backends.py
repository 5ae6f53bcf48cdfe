"""Parts of which tokenizers are made: roles of special tokens, models, normalisers, framing."""

from collections.abc import Mapping

import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from flaxpretrain.data.normalization import Normalization, joined
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError

USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("[BOS]", "<s>", "<|endoftext|>"),
    "eos": ("[EOS]", "</s>", "<|endoftext|>"),
    "unk": ("[UNK]", "<unk>"),
}
"""How special tokens are spelled where no configuration names them."""


def roles_by_name(tokens: Mapping[str, int]) -> dict[str, str]:
    """The roles that usual spellings suggest: [MASK] or <mask> is the mask, and so on."""
    roles = {}
    for role, names in USUAL_NAMES.items():
        found = next((name for name in names if name in tokens), None)
        if found is not None:
            roles[role] = found
    # RoBERTa and BART frame with <s> and </s>; where there is a mask, they are cls and sep too.
    if "mask" in roles and "cls" not in roles and {"bos", "eos"} <= set(roles):
        roles |= {"cls": roles["bos"], "sep": roles["eos"]}
    return {role: roles[role] for role in Vocabulary.TOKENS if role in roles}


def wordpiece_backend(
    vocabulary: Mapping[str, int], normalization: Normalization
) -> library.Tokenizer:
    """BERT's tokenizer over a vocabulary, framing with [CLS] and [SEP] where it has them."""
    model = models.WordPiece(dict(vocabulary), unk_token=_wordpiece_unknown(vocabulary))
    backend = library.Tokenizer(model)
    bert = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True,
        strip_accents=normalization.strip_accents,
        lowercase=normalization.lowercase,
    )
    backend.normalizer = joined([*normalization.before_bert(), bert])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    roles = roles_by_name(vocabulary)
    special = sorted(set(roles.values()), key=vocabulary.__getitem__)
    backend.add_special_tokens([library.AddedToken(token, special=True) for token in special])
    if "cls" in roles and "sep" in roles:
        backend.post_processor = framing_processor(backend, roles["cls"], roles["sep"])
    return backend


def byte_bpe_backend(model: models.BPE, add_prefix_space: bool) -> library.Tokenizer:
    """GPT-2's and RoBERTa's tokenizer over a byte-level BPE model, without framing yet."""
    backend = library.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def special_token(token: str) -> library.AddedToken:
    """A special token; as in RoBERTa and ALBERT, a mask takes the space before it with it."""
    return library.AddedToken(token, lstrip=token in USUAL_NAMES["mask"], special=True)


def frame_like_roberta(backend: library.Tokenizer, add_prefix_space: bool) -> dict[str, str]:
    """Adds <s> A </s></s> B </s> where the tokens are there; returns the roles of the tokens."""
    ids = backend.get_vocab(with_added_tokens=True)
    roles = roles_by_name(ids)
    if "cls" in roles and "sep" in roles:
        cls, sep = roles["cls"], roles["sep"]
        backend.post_processor = processors.RobertaProcessing(
            (sep, ids[sep]), (cls, ids[cls]), trim_offsets=True, add_prefix_space=add_prefix_space
        )
    return roles


def frame(backend: library.Tokenizer, roles: Mapping[str, str]) -> None:
    """Frames like BERT where there are a cls and a sep token, else with an eos token like T5."""
    if "cls" in roles and "sep" in roles:
        backend.post_processor = framing_processor(backend, roles["cls"], roles["sep"])
    elif "eos" in roles:
        eos = roles["eos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}",
            pair=f"$A {eos} $B {eos}",
            special_tokens=[(eos, backend.token_to_id(eos))],
        )


def add_sentinels(backend: library.Tokenizer, count: int) -> None:
    """Adds <extra_id_0>, ... as the last ids, descending, as T5 has them."""
    names = [f"<extra_id_{number}>" for number in reversed(range(count))]
    backend.add_special_tokens([library.AddedToken(name, special=True) for name in names])


def framing_processor(
    backend: library.Tokenizer, cls: str, sep: str
) -> processors.TemplateProcessing:
    """[CLS] text [SEP], and for a pair [CLS] text [SEP] text [SEP] with types 0 and 1."""
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )


def _wordpiece_unknown(vocabulary: Mapping[str, int]) -> str:
    for name in USUAL_NAMES["unk"]:
        if name in vocabulary:
            return name
    raise UserError("a WordPiece vocabulary needs an unknown token: add a line [UNK] to vocab.txt")
