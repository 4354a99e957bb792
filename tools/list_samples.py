"""List the samples of latent datasets, one a line: its key, then what the dataset says about it as JSON.

    python tools/list_samples.py --data-path data/latents | grep '"pan left"' > sft.txt
    torchrun pretrain_dit.py --preset dit_14b_sft --data-path data/latents --sample-list sft.txt ...

Every line's first word is a key, so whatever filters lines (grep, jq, a model's scores joined by source and start)
makes a `--sample-list`. Only the JSON members are read, not the latents.
"""

import json
from dataclasses import dataclass

from megatron_fsvideo.config import parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText


@dataclass(frozen=True)
class ListFlags(Checked):
    """which datasets"""

    data_path: tuple[PathText, ...]
    """Latent dataset folders."""


@dataclass(frozen=True)
class ListJob:
    """List the samples of latent datasets."""

    datasets: ListFlags


def list_samples(flags: ListFlags) -> None:
    """Print one line per sample."""
    from megatron_fsvideo.data.latent_dataset import LatentDataset

    for record in LatentDataset(flags.data_path).records():
        print(record["key"], json.dumps(record, ensure_ascii=False))


def main() -> None:
    """Parse the command line and list."""
    list_samples(parse_job(ListJob).datasets)


if __name__ == "__main__":
    run_script(main)
