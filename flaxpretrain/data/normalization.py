"""How a tokenizer normalises text: Unicode form, case, accents, and the Turkish i.

The steps are part of the tokenizer's file. What is trained, built and exported with that file
normalises alike, since nothing else does.
"""

import dataclasses

from tokenizers import normalizers

from flaxpretrain.errors import UserError

FORMS = ("nfc", "nfkc")


@dataclasses.dataclass(frozen=True)
class Normalization:
    """What is done to text before it is cut into tokens; by default nothing."""

    form: str | None = None
    """Unicode's normal form: "nfc" (composed), "nfkc" (and without presentation forms), or None."""
    lowercase: bool = False
    strip_accents: bool | None = None
    """None: as BERT's code has it, together with lower case in WordPiece, and never elsewhere."""
    turkish_i: bool = False
    """Lower case of Turkish and Azerbaijani: I becomes ı and İ becomes i."""

    def __post_init__(self) -> None:
        if self.form not in (None, *FORMS):
            raise UserError(f"a Unicode form is {' or '.join(FORMS)}, or none; got {self.form!r}")
        if self.turkish_i and not self.lowercase:
            raise UserError("the Turkish i is about lower case: ask for --lowercase too")

    def before_bert(self) -> list[normalizers.Normalizer]:
        """The steps that BERT's own normaliser, which has case and accents, does not have."""
        return [*self._form(), *self._turkish()]

    def steps(self) -> list[normalizers.Normalizer]:
        """All steps, in their order."""
        steps = [*self._form(), *self._turkish()]
        if self.strip_accents:
            steps += [normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()]
        if self.lowercase:
            steps.append(normalizers.Lowercase())
        return steps

    def _form(self) -> list[normalizers.Normalizer]:
        if self.form is None:
            return []
        return [normalizers.NFC() if self.form == "nfc" else normalizers.NFKC()]

    def _turkish(self) -> list[normalizers.Normalizer]:
        if not self.turkish_i:
            return []
        # The composed letter, the same in two characters, and then the one without a dot.
        pairs = (("İ", "i"), ("I\u0307", "i"), ("I", "ı"))
        return [normalizers.Replace(there, here) for there, here in pairs]


def joined(steps: list[normalizers.Normalizer]) -> normalizers.Normalizer | None:
    """One normaliser of several steps; None of none."""
    if len(steps) < 2:
        return steps[0] if steps else None
    return normalizers.Sequence(steps)
