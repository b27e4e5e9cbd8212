"""Torch files with any contents: finite weights, or a one-line error that names the file; no code in them runs."""

import io
import pickle
import pickletools
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.checkpoint_files import METADATA, saved, state
from helpers.damaged_weights import HOW, MASK, PLACE, damaged, load
from helpers.hostile import examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    load("safetensors: whole", saved(folder / "good.safetensors", metadata=METADATA), limit=False)
    return folder


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_torch_files(folder, torch, zipped):
    held = io.BytesIO()
    tensors = {name: torch.from_numpy(value.copy()) for name, value in state().items()}
    torch.save({"state_dict": tensors, "epoch": 5}, held, _use_new_zipfile_serialization=zipped)
    whole = held.getvalue()
    (folder / "whole.pth").write_bytes(whole)
    assert load("pth: whole", folder / "whole.pth", limit=False) is not None

    @examples(60)
    @given(HOW, PLACE, MASK)
    def tried(how, place, mask):
        path = folder / "damaged.pth"
        path.write_bytes(damaged(whole, how, place, mask))
        load(f"pth: {how}", path)

    tried()


def test_strange_tensors_are_refused(folder, torch):
    one = torch.ones(1)
    for value in (
        one.expand(10**6, 10**6), torch.ones(3, dtype=torch.complex64), torch.nn.Parameter(torch.ones(3)),
        torch.ones(3, device="meta"),
        torch.eye(3).to_sparse(), torch.ones(3).to(torch.float8_e5m2), torch.tensor(float("nan")), np.float64(3),
        np.ones(3),
        torch.ones(0, 2**40), "text", 10**400, None, [one], {"a": one}, torch.quantize_per_tensor(one, 0.1, 0,
        torch.quint8),
        torch.ones(3).bool(), torch._neg_view(torch.ones(3)), range(5), torch.Size([2]), torch.float32, slice(3),
    ):  # fmt: skip
        path = folder / "strange.pth"
        try:
            torch.save({"fc.bias": value, "fc\n.weight": one, 5: one}, path)
        except (TypeError, AttributeError, pickle.PicklingError):
            continue  # not in every version of torch
        assert load("pth: strange tensors", path) is None
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in state().items()}
    torch.save(parameters, path)  # as from named_parameters()
    assert load("pth: parameters", path, limit=False) is not None


GLOBALS = (
    "os system",
    "posix system",
    "subprocess Popen",
    "builtins eval",
    "builtins exec",
    "builtins getattr",
    "builtins __import__",
    "__builtin__ eval",
    "pathlib Path.touch",
    "importlib import_module",
    "torch load",
    "torch.hub load",
    "torch.jit load",
    "numpy load",
    "operator attrgetter",
    "functools partial",
    "runpy run_path",
    "collections OrderedDict",
    "builtins bytearray",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage _load_from_bytes",
    "_codecs encode",
    "argparse Namespace",
    "collections defaultdict",
    "pathlib PosixPath",
    "numpy dtype",
    "numpy ndarray",
    "numpy._core.multiarray scalar",
    "numpy._core.multiarray _reconstruct",
    "builtins bytes",
    "datetime datetime",
    "torch.nn.modules.linear Linear",
    "os.path\nsystem os",
    "torch FloatStorage",
    "a\nb c",
)
CALLS = st.sampled_from(("reduce", "inst", "obj", "newobj", "newobj_ex", "build", "stack_global", "ext"))


def call_opcodes(how, where, argument):
    """Returns opcodes that call a global with one string."""
    module, name = (part.encode() for part in where.rsplit(" ", 1))
    text = b"X" + struct.pack("<I", len(argument)) + argument
    short = lambda word: b"\x8c" + bytes([len(word)]) + word  # noqa: E731
    found = b"c" + module + b"\n" + name + b"\n"
    return {
        "reduce": found + b"(" + text + b"tR",
        "inst": b"(" + text + b"i" + module + b"\n" + name + b"\n",
        "obj": b"(" + found + text + b"o",
        "newobj": found + b"(" + text + b"t\x81",
        "newobj_ex": found + b"(" + text + b"t}\x92",
        "build": b"ccollections\nOrderedDict\n)R}" + short(b"__setstate__") + found + b"sb}" + text + b"sb",
        "stack_global": short(module) + short(name) + b"\x93(" + text + b"tR",
        "ext": b"\x82\x01(" + text + b"tR",
    }[how]


def write_program(path, program, how):
    """Writes a pickle in one of the formats of torch."""
    if how == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    elif how == "legacy":
        head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps([], 2))
    elif how == "tar":
        with tarfile.open(path, "w") as archive:
            for name in ("storages", "tensors", "pickle", "../escaped"):
                member = tarfile.TarInfo(name)
                member.size = len(program)
                archive.addfile(member, io.BytesIO(program))
    else:
        path.write_bytes(program)


def test_no_pickle_runs_code(folder, torch, monkeypatch):
    canary = folder / "it_ran"
    commands = (
        f"touch {canary}",
        f"open({str(canary)!r}, 'w')",
        f"import pathlib; pathlib.Path({str(canary)!r}).touch()",
        str(canary),
    )
    monkeypatch.chdir(folder)

    @examples(250)
    @given(
        st.lists(st.tuples(CALLS, st.sampled_from(GLOBALS), st.sampled_from(commands)), min_size=1, max_size=3),
        st.sampled_from((0, 2, 3, 4, 5)),
        st.sampled_from(("zip", "legacy", "raw", "tar")),
        st.binary(max_size=4),
    )
    def tried(calls, protocol, how, tail):
        program = b"\x80" + bytes([protocol]) if protocol else b""
        for kind, where, command in calls:
            program += call_opcodes(kind, where, command.encode()) + b"0" * (kind != calls[-1][0])
        write_program(folder / "code.pth", program + tail + b".", how)
        assert load("pth: code", folder / "code.pth") is None
        assert not canary.exists() and not (folder.parent / "escaped").exists()

    tried()


def test_arbitrary_opcodes_are_refused(folder, torch):
    opcodes = st.sampled_from([op.code.encode("latin-1") for op in pickletools.opcodes])

    @examples(150)
    @given(
        st.lists(st.one_of(opcodes, st.binary(max_size=4), st.just(b"}q\x00X\x01\x00\x00\x00aK\x01s")), max_size=12),
        st.sampled_from(("zip", "raw")),
    )
    @example([b"cbuiltins\nbytearray\n(I9999999999999\ntR"], "zip")
    @example([b"\x8e" + struct.pack("<Q", 2**62)], "raw")
    @example([b"(" * 10**6], "zip")
    @example([b"]" * 10**5 + b"a" * (10**5 - 1)], "zip")
    def tried(codes, how):
        write_program(folder / "codes.pth", b"\x80\x02" + b"".join(codes) + b".", how)
        assert load("pth: opcodes", folder / "codes.pth") is None

    tried()


def test_an_archive_bomb_is_not_unpacked(folder, torch):
    path = folder / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(64):
                entry.write(bytes(2**20))
    assert path.stat().st_size < 2**20 and load("pth: bomb", path) is None
