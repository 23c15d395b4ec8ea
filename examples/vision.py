"""Fine-tunes a small ViT on three tasks of images drawn by code: which shape, how many dots, which way the stripes run.

python examples/vision.py
python examples/vision.py --architecture mtlora
"""

import argparse

import torch
from torch.nn.functional import avg_pool2d
from transformers import ViTConfig, ViTForImageClassification

from align_ext import align_parts, count_parameters, replace_linear_with_align_lora

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--architecture", default="align_lora", help="of the adapters; mtlora: beside blocks [%(default)s]")
parser.add_argument("--steps", type=int, default=200, help="optimizer steps, and as many of pretraining [%(default)s]")
parser.add_argument("--weight", type=float, default=0.01, help="of the alignment in the loss [%(default)s]")
args = parser.parse_args()
if args.steps < 1:
    parser.error("--steps must be at least 1")
TASKS, KINDS = ("shape", "count", "stripes"), 3  # of each task three kinds
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
SIZES |= {"image_size": 16, "patch_size": 4, "num_channels": 1}


def draw(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [rows, 1, 16, 16] of the tasks in turn, of any kind, size and place, with noise; their tasks and kinds."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    (a, b), r = torch.rand(2, rows, 1, 1) * 6 + 5, torch.rand(rows, 1, 1) * 2 + 3
    near, far = torch.stack([(x - a).abs(), (y - b).abs()]).sort(0).values
    shapes = [far < r, far**2 + near**2 < r**2, (near < 1) & (far < r)]  # a square, a disc, a cross
    cell = torch.rand(rows, 9).argsort(1)[..., None, None]
    dots = ((x - 3 - 5 * (cell % 3)) ** 2 + (y - 3 - 5 * (cell // 3)) ** 2 < 3).cumsum(1)[:, :KINDS].unbind(1)
    angles = torch.arange(KINDS) * torch.pi / KINDS
    stripes = [torch.sin(r / 4 * (x * t.cos() + y * t.sin()) + a) > 0 for t in angles]
    tasks, kinds = torch.arange(rows) % len(TASKS), torch.randint(KINDS, (rows,))
    images = torch.stack([*shapes, *dots, *stripes])[tasks * KINDS + kinds, torch.arange(rows)]
    return (images + 0.1 * torch.randn(images.shape))[:, None], tasks, kinds


def train(model: ViTForImageClassification, lr: float, steps: int, *, pretrain: bool = False) -> None:
    """Trains on the kinds of the tasks, or before that on how bright each patch is."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        images, tasks, kinds = draw(96)
        inputs = {"labels": tasks * KINDS + kinds, "task_ids": tasks}
        model(images, **({"labels": avg_pool2d(images, 4).flatten(1)} if pretrain else inputs)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


torch.manual_seed(0)
base = ViTForImageClassification(ViTConfig(**SIZES, num_labels=16, problem_type="regression"))
train(base, 1e-3, args.steps, pretrain=True)
model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=len(TASKS) * KINDS))  # its new head is trained whole
model.vit = base.vit
try:
    replace_linear_with_align_lora(model, architecture=args.architecture, align="kl", align_weight=args.weight)
except ValueError as error:  # a wrong argument
    parser.error(str(error))
print(count_parameters(model))
for when, steps in (("before", 0), ("after", args.steps)):
    train(model, 5e-3, steps)
    images, tasks, kinds = draw(600)
    right = model.eval()(images).logits.argmax(1) == tasks * KINDS + kinds
    print(f"{when}:", ", ".join(f"{name} {right[tasks == i].float().mean():.2f}" for i, name in enumerate(TASKS)))
print(f"alignment {align_parts(model).align:.3f}")
