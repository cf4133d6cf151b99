"""The FSDP2 learner: advantages, losses, packing, model, trainer loop, checkpoints, weights out."""
