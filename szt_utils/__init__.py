"""Safe-Zone Training, in pieces for any training script: start with `szt_utils.safe_zone`.

safe_zone is the method; jpeg, timesteps and masks are its three parts; patch puts it into the training
scripts of Diffusers. models holds the families of diffusion models behind one protocol. poisons and pgd
attack images, purify cleans them, sensitivity and diagnosis look at them, segment and masking make masks,
generation and metrics score embeddings. export writes data sets for other trainers. pocket is the bundled
world.
"""

__version__ = "0.2.0"
