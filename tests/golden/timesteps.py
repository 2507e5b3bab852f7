"""Write timesteps.json: what diffusers' get_timestep_embedding returns.

    pip install diffusers torch
    python tests/golden/timesteps.py

posenc is not imported.
"""

# SPDX-License-Identifier: BSD-3-Clause

import json
from pathlib import Path

import diffusers
import torch
from diffusers.models.embeddings import get_timestep_embedding

HERE = Path(__file__).resolve().parent
WHOLE = [0.0, 1.0, 500.0, 999.0]
FRACTIONS = [0.25, 1.5, 49.9375, 811.125]
CASES = [
    # dim, flip, shift, scale, max_period, steps; Stable Diffusion, DDPM, DiT, Flux, ...
    (16, True, 0, 1, 10000, WHOLE),
    (16, False, 1, 1, 10000, WHOLE),
    (16, True, 1, 1, 10000, FRACTIONS),
    (9, True, 0, 1, 10000, FRACTIONS),
    (8, False, 0, 1000, 10000, [0.0, 0.125, 0.5, 1.0]),
    (8, True, 0.5, 1, 256, FRACTIONS),
]
NAMES = "flip_sin_to_cos", "downscale_freq_shift", "scale", "max_period"


def case(dim, *options):
    *options, steps = options
    arguments = {"embedding_dim": dim, **dict(zip(NAMES, options, strict=True))}
    embedding = get_timestep_embedding(torch.tensor(steps), **arguments)
    values = [[float(value) for value in row] for row in embedding]
    return {"arguments": arguments, "timesteps": steps, "embedding": values}


def main():
    cases = ",\n".join(json.dumps(case(*c)) for c in CASES)
    made = f'{{"diffusers": "{diffusers.__version__}", "cases": [\n{cases}\n]}}\n'
    (HERE / "timesteps.json").write_text(made)


if __name__ == "__main__":
    main()
