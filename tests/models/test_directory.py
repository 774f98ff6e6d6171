"""Where a model directory comes from, against local stand-ins of the Hub and of a bucket."""

import errno
import pathlib
import re
import threading

import huggingface_hub
import pytest
from huggingface_hub import constants

from daajax import bucket as bucket_paths
from daajax.errors import UserError
from daajax.models import bucket as buckets
from daajax.models import directory
from tests import stores, worlds

HUB, BUCKET = "hf://org/model", "gs://bucket/a/model"
COMMIT = re.compile(r"[0-9a-f]{40}")
KEPT = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "LICENSE.txt": b"do as you like",
    "NOTICE": b"of whom",
    "tokenizer.json": b"{  }",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}
LEFT = {
    "README.md": b"# Model",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"a program",
    "consolidated.safetensors": b"a second copy",
    "original/config.json": b"the authors' own",
    "original/model.safetensors": b"theirs too",
    "LICENSES/program.py": b"a program",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The weights of a model in three files, and their index."""
    folder = worlds.make_model(tmp_path_factory.mktemp("model"), files=3)
    return {name: content for name, content in stores.files_of(folder).items() if ".safetensors" in name}


@pytest.fixture(params=["hub", "bucket"])
def place(request):
    """Each of them: its address for a model, and what writes files there."""
    store = request.getfixturevalue(request.param)
    if request.param == "hub":
        return HUB, store, lambda files: store.push("org/model", files)
    return BUCKET, store, lambda files: store.write("a/model", files)


def refused(address: str, **options: str) -> str:
    """The one line with which an address is refused; it has no secrets."""
    with pytest.raises(UserError) as error:
        directory.fetch(address, "reference.path", **options)
    line = str(error.value)
    assert line.startswith(f"reference.path={address}")
    assert "\n" not in line
    assert stores.TOKEN not in line
    assert stores.SIGNATURE not in line
    return line


# ---------------------------------------------------------------------- any place


def test_a_directory_is_itself(tmp_path, capsys):
    assert directory.fetch(str(tmp_path)) == directory.Fetched(str(tmp_path))
    assert directory.fetch("models/none") == directory.Fetched("models/none")
    assert capsys.readouterr().out == ""


def test_another_place_is_refused():
    assert "s3:// is not read; name a directory, hf://organization/name[@revision] or gs://" in refused("s3://bucket/m")


def test_what_a_model_needs_is_fetched_and_nothing_else(place, shards, capsys):
    address, store, write = place
    write(KEPT | shards | LEFT)
    found = directory.fetch(address)
    assert stores.files_of(pathlib.Path(found.path)) == KEPT | shards
    assert COMMIT.fullmatch(found.revision)
    assert not {pathlib.Path(name).name for name in LEFT} - {"config.json", "model.safetensors"} & set(store.names())
    assert not any("original" in line for line in store.asked)
    assert capsys.readouterr().out.endswith(f"{address} is revision {found.revision[:12]}, in {found.path}\n")


def test_without_weights_only_what_is_small_is_fetched(place, shards):
    address, _, write = place
    write(KEPT | shards)
    small = directory.fetch(address, with_weights=False)
    assert stores.files_of(pathlib.Path(small.path)) == KEPT
    whole = directory.fetch(address)
    assert stores.files_of(pathlib.Path(whole.path)) == KEPT | shards
    assert small.revision == whole.revision


def test_where_no_weights_are_needed_a_copy_that_has_them_serves(place, shards):
    address, store, write = place
    write(KEPT | shards)
    whole = directory.fetch(address)
    store.asked.clear()
    assert directory.fetch(address, with_weights=False, revision=whole.revision) == whole
    assert store.asked == []


def test_what_is_here_is_not_fetched_again(place, shards):
    address, store, write = place
    write(KEPT | shards)
    first = directory.fetch(address)
    store.asked.clear()
    assert directory.fetch(address) == first
    assert not [line for line in store.asked if "resolve" in line or "blobs" in line]
    assert sum(shard in name for name in store.names() for shard in shards) <= len(shards)  # whether they changed


def test_what_an_address_meant_earlier_needs_no_network(place, shards):
    address, store, write = place
    write(KEPT | shards)
    first = directory.fetch(address)
    write({**KEPT, **shards, "LICENSE.txt": b"do not"})
    second = directory.fetch(address)
    assert second.revision != first.revision
    assert (pathlib.Path(second.path) / "LICENSE.txt").read_bytes() == b"do not"
    store.asked.clear()
    assert directory.fetch(address, revision=first.revision) == first
    assert store.asked == []
    assert (pathlib.Path(first.path) / "LICENSE.txt").read_bytes() == b"do as you like"


# ---------------------------------------------------------------------- the Hub


def test_a_branch_a_tag_and_a_commit_are_revisions(hub):
    first = hub.push("org/model", KEPT, "v1.0")
    second = hub.push("org/model", KEPT | {"NOTICE": b"of others"})
    third = hub.push("org/model", KEPT | {"NOTICE": b"of all"}, "refs/pr/1")
    assert directory.fetch(f"{HUB}@v1.0").revision == first
    assert directory.fetch(f"{HUB}@main").revision == second
    assert directory.fetch(f"{HUB}@{first}").revision == first
    assert directory.fetch(f"{HUB}@refs/pr/1").revision == third


def test_a_token_opens_a_gated_model_and_stays_secret(hub, shards, monkeypatch, capfd):
    hub.push("org/model", KEPT | shards)
    hub.gated.add("org/model")
    monkeypatch.setenv("HF_TOKEN", stores.TOKEN)
    found = directory.fetch(HUB)
    assert stores.files_of(pathlib.Path(found.path)) == KEPT | shards
    assert stores.TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (HUB, "is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"),
        ("hf://org/none", "is not on the Hub, or is private: check the name, or log in with `hf auth login`"),
        (f"{HUB}@none", "has no revision none: name a branch, a tag or a commit"),
        ("hf://model", "is no model of the Hub; needed hf://organization/name[@revision]"),
        ("hf://org/model/config.json", "is no model of the Hub"),
        ("hf://org/model@", "is no model of the Hub"),
        ("hf://../model", "is no model of the Hub"),
        ("hf://org/mo--del", "is no name that the Hub allows"),
    ],
)
def test_what_the_hub_does_not_give_is_refused_in_one_line(hub, address, says):
    hub.push("org/model", KEPT)
    hub.gated.add("org/model")
    assert says in refused(address)


def test_a_token_that_is_not_known_is_refused(hub, monkeypatch):
    hub.push("org/model", KEPT)
    monkeypatch.setenv("HF_TOKEN", f"{stores.TOKEN}2")
    assert "is closed to your token (HTTP 401): log in with `hf auth login`" in refused(HUB)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_out_of_order_is_refused_in_one_line(hub, status):
    hub.status = status
    line = refused(HUB)
    assert f"is not in the cache, and the Hub does not give it (HTTP {status}): check the network" in line
    assert "hf download org/model" in line


def test_a_hub_out_of_reach_is_refused_in_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refused(HUB)
    assert "the Hub does not give it (ConnectError: " in line
    assert "check the network" in line


def test_what_a_message_quotes_of_an_address_on_the_web_has_no_secrets(hub, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError(f"no route to https://me:{stores.TOKEN}@mirror/blobs/1?{stores.SIGNATURE} today")

    hub.push("org/model", KEPT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    assert "(RuntimeError: no route to https://mirror/blobs/1 today)" in refused(HUB)


def test_offline_a_copy_is_used_and_said_to_be_missing(hub, shards, monkeypatch):
    commit = hub.push("org/model", KEPT | shards)
    small = directory.fetch(HUB, with_weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert directory.fetch(HUB, with_weights=False) == small
    for line in (refused(HUB), refused("hf://org/other"), refused(HUB, revision="0" * 40)):
        assert f"has no whole copy in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it" in line
    assert hub.asked == []
    assert commit == small.revision


def test_a_commit_that_a_run_began_with_and_that_is_gone_is_named(hub):
    hub.push("org/model", KEPT)
    line = refused(HUB, revision="0" * 40)
    assert f"has no revision {'0' * 40}, with which the run began" in line


def test_a_cache_of_the_hub_that_cannot_be_written_is_named(hub, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.push("org/model", KEPT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert f"cannot be kept in {constants.HF_HUB_CACHE} (No space left on device): make room" in refused(HUB)


# ---------------------------------------------------------------------- a bucket


@pytest.mark.parametrize("size", [1, 1000, 4096, 1 << 20])
def test_a_file_read_in_parts_is_the_file(bucket, shards, monkeypatch, size):
    files = {name: content[: size * 40] if size == 1 else content for name, content in shards.items()}
    files = shards if size > 1 else {"model.safetensors": (2).to_bytes(8, "little") + b"{}"}
    bucket.write("a/model", KEPT | files)
    monkeypatch.setattr(buckets, "_PART_BYTES", size)
    assert stores.files_of(pathlib.Path(directory.fetch(BUCKET).path)) == KEPT | files


def test_a_folder_may_end_with_a_slash(bucket):
    bucket.write("a/model", KEPT)
    assert directory.fetch(f"{BUCKET}/") == directory.fetch(BUCKET)


def test_an_interrupted_copy_does_not_count_and_is_gone_on_with(bucket, shards):
    bucket.write("a/model", KEPT | shards)
    last = "tokenizer.json"
    bucket.broken.add(last)
    assert "cannot be read" in refused(BUCKET)
    assert not [path for path in buckets.CACHE.glob("*/*") if path.is_dir() and path.suffix != ".partial"]
    bucket.broken.clear()
    bucket.asked.clear()
    assert stores.files_of(pathlib.Path(directory.fetch(BUCKET).path)) == KEPT | shards
    assert {name for name in bucket.names() if bucket.names().count(name) > 1} == {last}  # besides its generation


def test_a_file_that_is_written_to_while_it_is_read_is_refused(bucket, shards, monkeypatch):
    bucket.write("a/model", KEPT | shards)
    name = min(shards)
    monkeypatch.setattr(buckets, "_PART_BYTES", 1000)
    monkeypatch.setattr(buckets, "_IN_FLIGHT", 1)
    value = buckets._value

    def write_meanwhile(name_, *arguments):
        if name_ == name:
            bucket.write("a/model", {name: shards[name]})
        return value(name_, *arguments)

    monkeypatch.setattr(buckets, "_value", write_meanwhile)
    assert f"was written to while {name} was read: start again" in refused(BUCKET)


def test_that_a_bucket_changed_since_the_run_began_is_said(bucket, capsys):
    bucket.write("a/model", KEPT)
    found = directory.fetch(BUCKET, revision="0" * 40)
    assert stores.files_of(pathlib.Path(found.path)) == KEPT
    assert f"model.path: {BUCKET} has changed since the run began" in capsys.readouterr().out


def test_processes_of_one_host_copy_once(bucket, shards):
    bucket.write("a/model", KEPT | shards)
    found = []
    threads = [threading.Thread(target=lambda: found.append(directory.fetch(BUCKET).path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 3
    assert bucket.names().count("tokenizer.json") == 3 + 1  # generations, and the content


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no model that you may list: check the name, or log in with `gcloud auth"),
        ({"pytorch_model.bin": b"a pickle"}, "holds no model"),
        ({"model.safetensors": b"short"}, "holds model.safetensors cut off: upload it again"),
        ({"model.safetensors": (99).to_bytes(8, "little") + b"{}"}, "holds model.safetensors cut off"),
        (
            {"model.safetensors": b"\x80\x04}q\x00X" + bytes(99)},
            "holds model.safetensors, which is no safetensors file",
        ),
        ({"model.safetensors": (2).to_bytes(8, "little") + b"[]"}, "which is no safetensors file: upload it again"),
        ({"model.safetensors": (2**63).to_bytes(8, "little")}, "which is no safetensors file"),
    ],
    ids=["nothing", "pickle alone", "short", "header", "pickle", "list", "length"],
)
def test_what_is_no_model_in_a_bucket_is_refused_in_one_line(bucket, files, says):
    bucket.write("a/model", files)
    assert says in refused(BUCKET)


def test_weights_cut_off_in_a_bucket_are_refused(bucket, shards):
    name = min(shards)
    bucket.write("a/model", shards | {name: shards[name][:-1]})
    assert f"holds {name} cut off: upload it again" in refused(BUCKET)


@pytest.mark.parametrize("address", ["gs://", "gs://none/model", "gs://B_/model", "gs://bucket/a?b"])
def test_an_address_of_no_bucket_is_refused(bucket, address):
    assert re.search(r"check the name.* log in with `gcloud auth application-default login`", refused(address))


def test_a_bucket_out_of_order_is_refused_in_one_line(bucket, monkeypatch):
    monkeypatch.setattr(bucket_paths, "RETRIES", {"gcs_request_retries": {"max_retries": 1}})
    bucket.status = 503
    assert "cannot be read (ValueError: ABORTED: All 1 retry attempts failed" in refused(BUCKET)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    assert "check the name and the network" in refused(BUCKET)


def test_a_cache_of_buckets_that_cannot_be_written_is_named(bucket, tmp_path, monkeypatch):
    bucket.write("a/model", KEPT)
    (tmp_path / "file").touch()
    monkeypatch.setattr(buckets, "CACHE", tmp_path / "file" / "cache")
    assert "cannot be copied to" in refused(BUCKET)
