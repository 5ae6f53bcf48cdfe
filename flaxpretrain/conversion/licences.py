"""Licences as the hub names them, and how corpora spell them.

Reference: https://huggingface.co/docs/hub/repositories-licenses.
"""

import re

from flaxpretrain.errors import UserError
from flaxpretrain.overrides import nearest

HUB_LICENCES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr unknown other
    """.split()
)
"""Identifiers that the hub takes in a card's metadata; those of single model families left out."""

_SPELLINGS = (
    (r"^the-|-licen[cs]e(?=-|$)|-(international|unported)$", ""),
    (r"^creative-commons-", "cc-"),
    (r"^cc-zero|^cc-0", "cc0"),
    (r"-attribution", "-by"),
    (r"-share-?alike", "-sa"),
    (r"-non-?commercial", "-nc"),
    (r"-no-?deriv\w*", "-nd"),
)
"""How corpora spell what the hub abbreviates."""

_LINKS = {
    "public-domain": "https://creativecommons.org/publicdomain/mark/1.0/",
    "psf-2.0": "https://docs.python.org/3/license.html",
}


def licence_fields(licence: str | None) -> dict[str, str]:
    """The card's `license`, and `license_name` and `license_link` where the hub has no such name.

    The text of a corpus is read leniently ("CC BY-SA 3.0" is cc-by-sa-3.0). No licence is
    "unknown": nothing is claimed that nobody stated.
    """
    if not licence:
        return {"license": "unknown"}
    name = re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-.")
    for pattern, shorter in _SPELLINGS:
        name = re.sub(pattern, shorter, name)
    if name in HUB_LICENCES:
        return {"license": name}
    link = re.search(r"https?://\S+", licence)
    fields = {"license": "other", "license_name": name}
    if link or name in _LINKS:
        fields["license_link"] = link.group().rstrip(".,;)") if link else _LINKS[name]
    return fields


def require_licence(licence: str) -> str:
    """A licence as a user states it for a model.

    Raises:
        UserError: the hub does not know it.
    """
    if licence not in HUB_LICENCES:
        raise UserError(
            f"--license {licence}: not an identifier that the hub knows, such as apache-2.0"
            f"{nearest(licence, sorted(HUB_LICENCES)) if len(licence) > 2 else ''}"
        )
    return licence
