"""Files of weights with any contents: finite weights, or a one-line error that names the file."""

import json
import os
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.checkpoint_files import DESCRIBED, METADATA, TIMM_CONFIG, saved
from helpers.damaged_weights import HOW, MASK, PLACE, damaged, load
from helpers.hostile import accepted_or_refused, examples
from jax_transfer.checkpoints import expand


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    load("safetensors: whole", saved(folder / "good.safetensors", metadata=METADATA), limit=False)
    return folder


# --- .safetensors


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "bin", "tar"])
def test_random_bytes_are_refused(folder, suffix):
    if suffix != "safetensors":
        pytest.importorskip("torch")

    @examples(40)
    @given(st.binary(max_size=300))
    @example(b"\x80\x02")
    @example(b"PK\x03\x04" + bytes(40))
    @example(b"PK\x05\x06" + bytes(18))
    @example(struct.pack("<Q", 2**63) + b"{}")
    def tried(data):
        path = folder / f"random.{suffix}"
        path.write_bytes(data)
        assert load(f"{suffix}: random bytes", path) is None

    tried()


def test_damaged_safetensors(folder):
    whole = saved(folder / "whole.safetensors", metadata=METADATA).read_bytes()

    @examples(60)
    @given(HOW, PLACE, MASK)
    def tried(how, place, mask):
        path = folder / "damaged.safetensors"
        path.write_bytes(damaged(whole, how, place, mask))
        load(f"safetensors: {how}", path)

    tried()


NUMBERS = st.sampled_from((0, 1, -1, 2**31, 2**63, 2**64, 10**30, 1.5, 1e308, float("nan"), float("inf"), True))
VALUES = st.recursive(
    st.one_of(
        st.none(),
        NUMBERS,
        st.text(max_size=5),
        st.sampled_from(("F32", "I64", "F8_E5M2", "resnet18", "cifar", "\ud800", "a\nb")),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


def encode_header(entries):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text


def test_hostile_headers_of_safetensors(folder):
    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}

    @examples(150)
    @given(st.sampled_from(("dtype", "shape", "data_offsets", "__metadata__", "entry")), VALUES, st.binary(max_size=32))
    @example("shape", [2**32, 2**32], b"")
    @example("shape", [0, 2**63], b"")
    @example("data_offsets", [16, 0], bytes(16))
    @example("data_offsets", [0, 2**64 - 1], bytes(16))
    @example("__metadata__", {"jax_transfer": "[" * 100_000}, b"")
    def tried(field, value, data):
        entries = {"fc.weight": dict(good), "fc.bias": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
        if field in good:
            entries["fc.weight"][field] = value
        else:
            entries["fc.weight" if field == "entry" else field] = value
        path = folder / "header.safetensors"
        path.write_bytes(encode_header(entries) + data)
        load("safetensors: header", path)

    tried()
    path = folder / "header.safetensors"
    for text in (
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b"{}",
        b"null",
        b'{"a": 1, "a": 2}',
        b" " * 99,
        b'{"": {}}',
    ):
        path.write_bytes(encode_header(text))
        assert load("safetensors: header", path) is None


METADATA_FIELDS = ("model", "preprocessing", "source_accuracy", "name", "width", "stem", "num_classes", "image_size",
                   "crop_fraction", "mean", "std", "interpolation", "dtype", "zero_init_last", "depth")  # fmt: skip


def test_arbitrary_metadata(folder):
    @examples(150)
    @given(st.sampled_from(METADATA_FIELDS), VALUES, st.sampled_from(("resnet10", None)))
    @example("num_classes", 90_000_000, None)
    @example("width", float("nan"), None)
    @example("image_size", 10**9, None)
    def tried(field, value, model):
        described = json.loads(json.dumps(DESCRIBED))
        section = described if field in described else described["model"]
        section = described["preprocessing"] if field in METADATA_FIELDS[7:12] else section
        section[field] = value
        path = saved(folder / "described.safetensors", metadata={"jax_transfer": json.dumps(described)})
        load("safetensors: metadata", path, model)

    tried()


def test_arbitrary_config_json(folder):
    (folder / "hub").mkdir()
    path, config_file = saved(folder / "hub" / "model.safetensors"), folder / "hub" / "config.json"

    @examples(100)
    @given(st.sampled_from(("architecture", "pretrained_cfg", *TIMM_CONFIG["pretrained_cfg"])), VALUES)
    @example("input_size", [])
    @example("input_size", [float("inf")])
    @example("crop_pct", 0)
    @example("crop_pct", 1e-300)
    def tried(field, value):
        config = json.loads(json.dumps(TIMM_CONFIG))
        (config["pretrained_cfg"] if field in config["pretrained_cfg"] else config)[field] = value
        config_file.write_text(json.dumps(config))
        load("config.json", path, None)

    tried()
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"null", b"[]"):
        config_file.write_bytes(content)
        load("config.json", path, "resnet10")


@pytest.mark.parametrize(
    "name",
    ["no\nsuch.safetensors", "\x1b[2J.pth", os.fsdecode(b"\xff.pt"), "z" * 300 + ".safetensors", "a\x00.pth", "²"],
)
def test_impossible_names_are_refused(folder, name):
    assert load("a name", folder / name) is None
    (folder / "²").mkdir(exist_ok=True)
    accepted_or_refused("a name", lambda: expand(folder / "²"), "holds no checkpoints")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_pipe_is_not_waited_for(folder, suffix):
    os.mkfifo(folder / f"pipe.{suffix}")
    assert load("a pipe", folder / f"pipe.{suffix}") is None
