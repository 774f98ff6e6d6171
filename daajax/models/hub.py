"""Models of the Hugging Face Hub, `hf://organization/name[@revision]`, in the cache that all tools of the Hub share."""

import re

from daajax.errors import UserError, one_line
from daajax.models.tensor_files import SECOND_COPY, STORED
from daajax.models.weights import SMALL

_ADDRESS = re.compile(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?", re.ASCII)
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def fetch(address: str, option: str, *, with_weights: bool, revision: str) -> tuple[str, str]:
    """A snapshot of a repository in the Hub's cache, and its commit; see `directory.fetch`."""
    parsed = _ADDRESS.fullmatch(address)
    if parsed is None:
        raise UserError(f"{option}={address} is no model of the Hub; needed hf://organization/name[@revision].")
    repository, wanted = parsed[1], revision or parsed[2]
    import huggingface_hub  # half a second, which local directories need not pay

    names = [*(STORED if with_weights else ()), *SMALL]
    flat = [name for name in names if "/" not in name]
    try:
        commit = huggingface_hub.HfApi().resolve_revision(repository, revision=wanted).resolved
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=commit,
            allow_patterns=names,
            # There `*` stands for folders too, such as original/.
            ignore_patterns=[SECOND_COPY, *(f"*/{name}" for name in flat), *(f"{name}/*" for name in flat)],
        )
    except Exception as error:  # whatever the network, the Hub and the disk make of it
        asked = f"revision {wanted}{', with which the run began' if revision else ''}"
        raise UserError(f"{option}={address} {_why(error, repository, asked)}.") from None
    return folder, commit


def _why(error: Exception, repository: str, asked: str) -> str:
    """What an error means and what helps; no token is in it, and no address that is signed with one."""
    from huggingface_hub import constants, errors

    elsewhere = f"or download it elsewhere (hf download {repository} --local-dir …) and name the directory"
    match error:
        case errors.GatedRepoError():
            return f"is gated: accept its terms on its page, then {_LOG_IN}"
        case errors.RepositoryNotFoundError():
            return f"is not on the Hub, or is private: check the name, or {_LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"has no {asked}: name a branch, a tag or a commit that it has"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"is closed to your token (HTTP {error.response.status_code}): {_LOG_IN}"
        case _ if constants.is_offline_mode():
            return f"has no whole copy in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it, {elsewhere}"
        case OSError(errno=int()):
            return f"cannot be kept in {constants.HF_HUB_CACHE} ({error.strerror}): make room, or set HF_HOME"
        case errors.HFValidationError():
            return "is no name that the Hub allows: check it"
    reasons = [one for one in (error, error.__cause__) if isinstance(one, Exception)]
    codes = [f"HTTP {one.response.status_code}" for one in reasons if isinstance(one, errors.HfHubHTTPError)]
    reason = codes[0] if codes else re.sub(r"(?<=//)[^/\s]*@|\?\S*", "", one_line(reasons[-1]))
    return f"is not in the cache, and the Hub does not give it ({reason}): check the network, {elsewhere}"
