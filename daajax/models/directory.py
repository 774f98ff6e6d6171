"""Where a model directory comes from: this machine, the Hugging Face Hub, or a bucket.

Commands call `fetch` where they begin, so that everything behind them sees a local directory. To add another place,
write a function as `hub.fetch` is one and give it a line in `_PLACES`.
"""

import dataclasses
from collections.abc import Mapping

from daajax.console import say
from daajax.errors import UserError
from daajax.models import bucket, hub


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A model directory on this machine.

    Attributes:
        path: The directory.
        revision: What of the address it holds: a commit of the Hub, or a digest of what lies in a bucket; empty where
            the address is a directory.
    """

    path: str
    revision: str = ""


def fetch(address: str, option: str = "model.path", *, with_weights: bool = True, revision: str = "") -> Fetched:
    """A model directory on this machine, fetched if it is not here yet.

    Only safetensors, configs, tokenizer files and licences are fetched, never a pickle or a program. Of several
    processes each calls this for itself: those of one host wait for each other and share its cache, and every host
    fetches its own copy.

    Args:
        address: A directory, which is returned as it is; `hf://organization/name`, also with `@revision`: a branch, a
            tag or a commit; or `gs://bucket/folder`.
        option: Which names it, for messages.
        with_weights: False fetches only what is small: config, tokenizer, licence.
        revision: What was fetched earlier, to have the same again; empty: what the address means today.

    Raises:
        UserError: If the address is not understood, or what it names is not there, not open to the user, out of reach
            or too large for the disk.
    """
    scheme, found, _ = address.partition("://")
    if not found:
        return Fetched(address)
    if scheme not in _PLACES:
        raise UserError(
            f"{option}={address}: {scheme}:// is not read; name a directory, hf://organization/name[@revision] or "
            "gs://bucket/folder."
        )
    path, now = _PLACES[scheme](address, option, with_weights=with_weights, revision=revision)
    say(f"{option}: {address} is revision {now[:12]}, in {path}")
    return Fetched(path, now)


def pinned(address: str, revisions: Mapping[str, str]) -> str:
    """An address of the Hub with the commit that was fetched; any other as it is."""
    if not address.startswith("hf://") or address not in revisions:
        return address
    return f"{address.partition('@')[0]}@{revisions[address]}"


_PLACES = {"gs": bucket.fetch, "hf": hub.fetch}
