"""Package of megatron_fsvideo: pure Python, nothing is compiled at installation."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

VERSION = "0.1.0"

REQUIREMENTS = [
    "torch>=2.11,<2.14",
    # The newest release for Python 3.11; the CPU backend and the checkpoint format are tested against exactly this one.
    "megatron-core==0.16.1",
    "psutil",  # megatron-core's checkpointing imports it without declaring it
    "msgspec",
    "numpy",
    "av",
    "safetensors",
    "tqdm",
    "tensorboard",
    "transformers",
    "sentencepiece",
    "pillow>=11",
    "msgspec",
    "anyascii",  # labels of contact sheets in letters that the font has
]

EXTRAS = {
    # einops: megatron-core makes the groups of a2a+p2p with it; Transformer Engine brings it along.
    "test": ["pytest", "ruff", "diffusers", "matplotlib", "einops", "pyarrow"],
    # Already among the requirements; named for the messages of `require`.
    "train": ["tensorboard", "tqdm"],
    "encoders": ["transformers", "sentencepiece"],
    # Needs torch first: pip install torch && pip install --no-build-isolation .[gpu]
    "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", "flash-attn"],
    # Comes with torch where that is built for CUDA; elsewhere its interpreter can run the kernels' tests.
    "kernels": ["triton>=3.3"],
    # accelerate: diffusers loads Wan's folders with it, and does not declare it.
    "eval": ["matplotlib", "diffusers", "accelerate"],
    "ui": ["gradio"],
    # Manifests as Parquet files.
    "parquet": ["pyarrow"],
    # Our Gride is tested against it. It holds numpy below 2 and brings jax: an environment of its own is better.
    "intrinsic-dimension": ["dadapy"],
}

setup(
    name="megatron_fsvideo",
    version=VERSION,
    description="FSVideo: training and inference of a fast image-to-video model on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_fsvideo", "megatron_fsvideo.*"]),
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
