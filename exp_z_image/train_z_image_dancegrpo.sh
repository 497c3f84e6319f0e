#!/bin/sh
# Train a 4-step student of Z-Image for rewards (docs/rewards.md).
#   sh exp_z_image/train_z_image_dancegrpo.sh NODES GPUS CONFIG SAVE_DIR [key.sub=value ...]
# GPUS: processes per node. Several nodes: the same command on each, with NODE_RANK, MASTER_ADDR and
# MASTER_PORT set; Slurm: as exp_sd35/slurm_sd35.sbatch. Run again with the same SAVE_DIR, it goes on
# from the last complete checkpoint; --max-restarts N does so by itself after a failure.
export SENSEFLOW_SCRIPT="sh $0"
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # a lost connection is told in one line
exec "${PYTHON:-python}" -m senseflow.trainer.trainer_z_image_dancegrpo "$@"
