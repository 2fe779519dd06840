"""Installs flm_jax. Versions are pinned by constraints.txt, which `make` passes to pip."""

import pathlib

import setuptools

README = pathlib.Path(__file__).parent / "README.md"

setuptools.setup(
    name="flm_jax",
    version="0.1.0",
    description="Train a Tele-FLM-style decoder in JAX, and grow it while it trains.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["flm_jax", "flm_jax.*"]),
    install_requires=[
        "absl-py",
        "chex",
        "clu",
        "datasketch",  # MinHash: near-duplicates among chat samples
        "etils[epath]",
        "flax>=0.12",
        "jax>=0.10",
        "matplotlib",
        "ml_collections",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12,<1",
        "rich",
        "safetensors",
        "scikit-learn",  # clusters of samples: choosing a diverse set
        "scipy",
        "sentencepiece",
        "seqio",
        "tensorboard",  # clu's summary writer imports it
        "tensorflow",
        "tensorstore",
        "tokenizers",  # Hugging Face's tokenizer.json
    ],
    extras_require={
        "dev": [
            "hypothesis",
            "mypy",
            "nbclient",
            "nbformat",
            "ipykernel",
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "ruff",
        ],
        # Oracles of the weights' tests, older .bin files, and EleutherAI's evaluation harness.
        "hf": ["lm-eval", "torch==2.13.0", "transformers"],
        "tpu": ["jax[tpu]"],
        # XLA's GPU compiler and ptxas, without cuDNN and the rest: experiments.compile_ahead.
        "gpu-aot": ["jax-cuda12-pjrt", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"],
    },
)
