"""Train a small transformer with FSDP2: parameters, gradients and the state of the optimizer are
divided among the ranks.

    torchrun --nproc-per-node 2 docs/examples/fsdp_train.py --steps 300 --folder checkpoints

It learns the English of Python's own help, character by character. Run it again with more steps,
also with another number of ranks, and it goes on from the last checkpoint. On GPUs it uses NCCL,
and otherwise gloo; nothing else differs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import functorch_opt as fo

TEXT = "\n\n".join(topics[name] for name in sorted(topics))
CHARACTERS = sorted(set(TEXT))
CONTEXT, BATCH = 64, 16


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norm_1(x))
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        x = x + self.out(
            scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int = 128, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.token, self.position = (
            nn.Embedding(len(CHARACTERS), width),
            nn.Embedding(CONTEXT, width),
        )
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.token(x) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).flatten(0, 1))


def batch(text: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the batch of this step.

    The whole batch is the same for any number of ranks.
    """
    starts = torch.randint(
        len(text) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step)
    )
    mine = starts.chunk(dist.get_world_size())[dist.get_rank()]
    windows = torch.stack([text[i : i + CONTEXT + 1] for i in mine])
    return windows[:, :-1], windows[:, 1:]


def save(
    model: nn.Module, opt: torch.optim.Optimizer, folder: Path, step: int
) -> None:
    model_state, opt_state = get_state_dict(model, opt)
    dcp.save(
        {"model": model_state, "optimizer": opt_state},
        checkpoint_id=folder / f"{step:08d}",
    )


def resume(model: nn.Module, opt: torch.optim.Optimizer, folder: Path) -> int:
    """Load the last finished checkpoint, whatever number of ranks wrote it; returns its step."""
    finished = sorted(folder.glob("*/.metadata"))
    if not finished:
        return 0
    model_state, opt_state = get_state_dict(model, opt)
    dcp.load(
        {"model": model_state, "optimizer": opt_state},
        checkpoint_id=finished[-1].parent,
    )
    set_state_dict(
        model, opt, model_state_dict=model_state, optim_state_dict=opt_state
    )
    return int(finished[-1].parent.name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--every", type=int, default=100, help="steps between checkpoints and lines"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="of checkpoints; by default none are written",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the step of the optimizer"
    )
    args = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(
        kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else 0
    )
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert BATCH % world == 0, (
        f"{BATCH} rows cannot be divided evenly among {world} ranks"
    )

    torch.manual_seed(0)  # the same first parameters on every rank
    model = Transformer().to(device)
    mesh = init_device_mesh(kind, (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    schedule = fo.warmup_cosine_decay_schedule(
        0.0, 3e-3, warmup_steps=20, decay_steps=1000
    )
    tx = fo.chain(
        fo.clip_by_global_norm(
            1.0
        ),  # the norm of the whole gradient, not of this rank's part
        fo.adamw(schedule, weight_decay=0.1, mask=lambda name, p: p.ndim > 1),
    )
    opt = fo.optim.Optimizer(
        model.named_parameters(), tx, compile=args.compile
    )  # after fully_shard, which replaces the parameters
    start = resume(model, opt, args.folder) if args.folder else 0
    if rank == 0:
        print(f"ranks: {world}, device: {kind}, from step {start}", flush=True)

    text = torch.tensor([CHARACTERS.index(c) for c in TEXT])
    for step in range(start, args.steps):
        x, y = (part.to(device) for part in batch(text, step))
        loss = cross_entropy(model(x), y.flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            mean = loss.detach() / world
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step + 1:5d}  loss {mean.item():.4f}", flush=True)
            if args.folder:
                save(model, opt, args.folder, step + 1)

    held = sum(
        fo.tree.part_of(x).nbytes
        for state in opt.state.values()
        for x in state.values()
    )
    everybodys: list[int] = [0] * world
    dist.all_gather_object(everybodys, held)
    if rank == 0:
        print(f"bytes of optimizer state on each rank: {everybodys}", flush=True)
    dist.barrier()  # gloo's threads must not hold tensors when Python ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
