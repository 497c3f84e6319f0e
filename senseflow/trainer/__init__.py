"""A module per recipe: `python -m senseflow.trainer.trainer_X` starts a training."""
