"""Compiles training steps for a TPU without having one, and prints their work, memory traffic and collectives.

python tests/benchmarks/tpu.py [--topology v4:2x2x4] [--batch 1024] [--only resnet50,t2t_vit_t_14] [--profile] [--out F]

`libtpu` from PyPI compiles for a described topology on any Linux machine. Install it in an environment of its own
(`pip install '.[tpu-check]'`), because JAX looks for a TPU at every start where it is installed.

Models, shapes, augmentations and optimizers are those of the full configs, except for the batch size and RandAugment:
the compiler charges each of its gathers with the whole image, which hides everything else. A row gives, for one core
and one step:

- gflop and accessed_gb, the compiler's own counts. `accessed_gb` counts a prefetch into on-chip memory up to six times,
  as operand and result of its start, its end and a final bitcast. Of a Pallas kernel the compiler counts nothing.
- hbm_gb and on_chip_gb: bytes that the instructions read and write in either memory, from the memory space in the
  layout of each operand and result. The operands of a Pallas kernel count as often as the kernel reads them.
- all_reduces, and the memory for arguments and temporaries.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import re
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from configs import resnet50_imagenet, t2t_vit_14_imagenet
from jax_transfer.data.batches import abstract_batch
from jax_transfer.data.crops import crops_of
from jax_transfer.study import settings
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps

CONFIGS = {"resnet50": resnet50_imagenet.full, "t2t_vit_t_14": t2t_vit_14_imagenet.full}
NUM_CLASSES, NUM_IMAGES = 1000, 1_281_167  # of ImageNet

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
# Instructions that move nothing, or whose traffic is counted at another instruction.
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "copy-done", "slice-done", "async-done")


def pretraining_step(config, batch_size: int, mesh):
    """Lowers the pre-training step of a config for the devices of `mesh`."""
    net = settings.make_net(config, settings.models(config)[config.model.name], NUM_CLASSES, jnp.bfloat16)
    augment = tuple(name for name in config.pretrain.augment if name != "rand_augment")
    objective = OBJECTIVES["supervised"](net, augment, **settings.objective_settings(config.pretrain))
    (feed,) = objective.views
    steps = config.pretrain.epochs * (NUM_IMAGES // config.pretrain.batch_size)
    optimizer = make_optimizer(settings.pretrain_optimizer(config.pretrain), steps)
    preprocessing, decay = settings.preprocessing(config), config.pretrain.ema_decay
    memory = {"remat": config.pretrain.remat, "microbatches": config.pretrain.microbatches}
    step = make_train_step(objective, optimizer, preprocessing, {feed: NUM_CLASSES}, decay, **memory)
    state = jax.eval_shape(lambda: init_state(objective, optimizer, 0, ema=bool(decay)))

    def placed(tree, *leading: int, spec: PartitionSpec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding), tree)

    batch = abstract_batch(preprocessing, batch_size, crops=crops_of(objective.views[feed]))
    item = placed(batch, 1, spec=PartitionSpec(None, "data"))
    run = many_steps(step, lambda held, item: item, mesh)
    return run.lower(placed(state, spec=PartitionSpec()), {feed: None}, {feed: item}, 1)


def measure(lowered) -> tuple[dict, str]:
    """Compiles a lowered program and returns its costs on one device, and its text."""
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    text, cost, memory = compiled.as_text(), compiled.cost_analysis(), compiled.memory_analysis()
    hbm, on_chip = (sum(sizes.values()) for sizes in traffic(text))
    return {
        "gflop": round(cost["flops"] / 1e9, 1),
        "accessed_gb": round(cost["bytes accessed"] / 1e9, 2),
        "hbm_gb": round(hbm / 1e9, 2),
        "on_chip_gb": round(on_chip / 1e9, 2),
        "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "temporaries_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "code_mb": round(memory.generated_code_size_in_bytes / 1e6, 1),
        "compile_cpu_seconds": round(seconds, 1),
    }, text


def traffic(text: str) -> tuple[collections.Counter, collections.Counter]:
    """Returns the bytes that each kind of instruction reads and writes in HBM, and those in on-chip memory."""
    entry = text[text.index("\nENTRY ") :]
    sizes, hbm, on_chip = {}, collections.Counter(), collections.Counter()
    for name, shape, opcode, rest in re.findall(r"^\s*(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*)$", entry, re.M):
        arrays = [array_bytes(*found) for found in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)]
        sizes[name] = tuple(map(sum, zip(*arrays, strict=True))) if arrays else (0, 0)
        if opcode in FREE or "ConcatBitcast" in rest:
            continue
        moved = [sizes[name]]
        for position, operand in enumerate(re.findall(r"%([\w.-]+)", rest.split("), ")[0])):
            moved += [sizes.get(operand, (0, 0))] * reads_of_operand(rest, position)
        if opcode in ("copy-start", "slice-start"):  # its result is a tuple: copied (or all of the source), result
            moved = arrays[:2] if opcode == "copy-start" else [tuple(sorted(arrays[1], reverse=True))]
        label = re.search(r'op_name="([^"]*)"', rest)
        kind = f"{opcode} {'/'.join(label[1].split('/')[-2:]) if label else ''}".strip()
        hbm[kind] += sum(size for size, _ in moved)
        on_chip[kind] += sum(size for _, size in moved)
    return hbm, on_chip


def reads_of_operand(rest: str, position: int) -> int:
    """Returns how often an instruction reads the operand at `position`: more than once only in flash attention.

    Its gradient of keys and values reads all but these (operands 1 and 2) again for each block of keys; its gradient of
    the queries reads only these again, for each block of queries.
    """
    block = re.search(r"bwd_(dkv.*?block_k|dq_block_q)_major=(\d+)", rest)
    tokens = re.search(r"operand_layout_constraints=\{\w+\[\d+,\d+,(\d+),", rest)
    if not (block and tokens) or (position in (1, 2)) == block[1].startswith("dkv"):
        return 1
    return int(tokens[1]) // int(block[2])


def array_bytes(dtype: str, dimensions: str, layout: str) -> tuple[int, int]:
    """Returns the bytes of an array in HBM and in on-chip memory, one of which is 0. A layout with S(n) is on the chip.

    >>> array_bytes("bf16", "32,8", "{1,0:T(8,128)(2,1)}"), array_bytes("f32", "8", "{0:T(128)S(3)}")
    ((512, 0), (0, 32))
    """
    size = BYTES.get(dtype, 0) * math.prod(int(n) for n in dimensions.split(",") if n)
    return (0, size) if re.search(r"S\([1-9]\)", layout) else (size, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v4:2x2x4", help="name of the topology (default: v4:2x2x4, 32 cores)")
    parser.add_argument("--batch", type=int, default=1024, help="images in a global batch (default: 1024)")
    parser.add_argument("--only", default=",".join(CONFIGS), help="models, comma-separated")
    parser.add_argument("--batch_norm_group", type=int, help="instead of the config's; 0 is the global batch")
    parser.add_argument("--remat", action="store_true", help="as config.pretrain.remat")
    parser.add_argument("--microbatches", type=int, default=1, help="as config.pretrain.microbatches")
    parser.add_argument("--profile", action="store_true", help="print the traffic of each kind of operation")
    parser.add_argument("--text", type=pathlib.Path, help="write the compiled programs into this folder")
    parser.add_argument("--out", type=pathlib.Path, help="write the rows as JSON lines")
    flags = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology)
    # Not `devices.make_mesh`, which refuses a topology of cores ("v4:2x2x4" has two for each chip).
    mesh = jax.sharding.Mesh(np.reshape(topology.devices, (1, -1)), ("sweep", "data"))
    rows = []
    for name in flags.only.split(","):
        config = CONFIGS[name]()
        if flags.batch_norm_group is not None and name == "resnet50":
            config.model.batch_norm_group = flags.batch_norm_group or None
        config.pretrain.remat, config.pretrain.microbatches = flags.remat, flags.microbatches
        row, text = measure(pretraining_step(config, flags.batch, mesh))
        given = {"model": name, "topology": flags.topology, "batch": flags.batch}
        if group := config.model.get("batch_norm_group"):
            given["batch_norm_group"] = group
        given |= {"remat": True} if flags.remat else {}
        given |= {"microbatches": flags.microbatches} if flags.microbatches > 1 else {}
        rows.append({**given, **row})
        print(json.dumps(rows[-1]), flush=True)
        if flags.profile:
            hbm, on_chip = traffic(text)
            for kind, size in hbm.most_common(20):
                print(f"  {size / 1e9:6.2f} GB HBM, {on_chip[kind] / 1e9:6.2f} GB on chip  {kind}")
        if flags.text:
            (flags.text / f"{name}.txt").write_text(text)
    if flags.out:
        flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
